"""The case of weight syncs: its figures, in small."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")
import fishkern as fk
from benchmarks.cases import weight_sync
from benchmarks.subjects.transformers import LLAMA_TINY, Workload

pytestmark = pytest.mark.skipif(not hasattr(fk, "DeltaStream"), reason="this fishkern has no stream")


def test_bytes_of_both_ways():
    """Both make the sampler equal, which the case itself checks; every value that differs is one of those selected."""
    case = Workload(LLAMA_TINY, T=7, N=3, batches=4, dtype="bfloat16")
    figures = weight_sync.measured(case, 0.05, 1.0)
    ours, theirs = figures["fishkern"], figures["snapshot"]
    assert ours["syncs"] == 3
    assert ours["weights_bytes"] == theirs["kept_bytes"] == 2 * theirs["compared"]
    assert ours["compared"] == ours["selected"] == int(0.05 * theirs["compared"])
    assert 0 < theirs["later_bytes"] <= 6 * ours["selected"]
    assert 0 < ours["later_bytes"] <= 2 * ours["selected"] < ours["first_bytes"]
    assert ours["all_bytes"] >= ours["first_bytes"] + ours["later_bytes"]
