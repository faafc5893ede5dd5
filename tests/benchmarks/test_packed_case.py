"""The case of packed rows: both sides take the same documents, and their statistics are the same."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")
import fishkern as fk
from benchmarks.cases import packed
from benchmarks.subjects.transformers import LLAMA_TINY, Workload

SMALL = Workload(LLAMA_TINY, T=24, N=3, batches=2)
LENGTHS = packed.Lengths(middle=8, least=2, most=24)

pytestmark = packed.pytestmark


def test_lengths_are_log_normal():
    drawn = torch.tensor(packed.Lengths(least=1, most=10**6).drawn(20_000)).double().log()
    assert drawn.mean().exp() == pytest.approx(64, rel=0.05)
    assert drawn.std() == pytest.approx(1, rel=0.05)
    assert set(packed.Lengths(least=5, most=6).drawn(100)) == {5, 6}


def test_both_sides_are_the_same():
    model = SMALL.model()
    data = {name: packed.batches(name, SMALL, LENGTHS) for name in packed.PROVIDERS}
    ours, theirs = (fk.estimate(model, data[name]) for name in packed.PROVIDERS)
    assert ours.count == theirs.count == SMALL.N * SMALL.batches
    assert {one.path for one in ours.coverage.values()} == {"fused"}
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-5 * float(expected.max()))
    tokens = {name: sum(batch["input_ids"].numel() for batch in data[name]) for name in data}
    assert tokens["fishkern"] == sum(LENGTHS.drawn(SMALL.N * SMALL.batches)) < tokens["padded"]
