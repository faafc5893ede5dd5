"""The case of preference pairs: all sides take the same pairs, and their statistics are the same."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")
import fishkern as fk
from benchmarks.cases import pairs
from benchmarks.subjects.transformers import LLAMA_TINY, Workload

SMALL = Workload(LLAMA_TINY, T=12, N=3, batches=2)

pytestmark = pairs.pytestmark


def test_all_sides_are_the_same():
    statistics = {name: pairs.passing(name, SMALL)() for name in pairs.PROVIDERS if name != "ordinary"}
    expected = statistics["two_passes"]
    for one in statistics.values():
        assert one.count == SMALL.N * SMALL.batches
        assert {covered.path for covered in one.coverage.values()} == {"fused"}
        for name, each in expected.items():
            torch.testing.assert_close(one[name], each, rtol=1e-4, atol=1e-5 * float(each.max()))


def test_an_ordinary_pass_leaves_no_gradient():
    model, data = SMALL.model(), pairs.batches("ordinary", SMALL)
    assert bool(fk.Preference(pairs.BETA).predictive(model, data[0]).losses().isfinite().all())
    pairs.ordinary(model, data)
    assert all(one.grad is None for one in model.parameters())
