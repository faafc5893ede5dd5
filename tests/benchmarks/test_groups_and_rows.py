"""The cases of group Fishers and of row ranges: what they compare is the same in small."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")
import fishkern as fk
from benchmarks.cases import group_fisher, masked_rows
from benchmarks.subjects.transformers import LLAMA_104M, LLAMA_TINY, Workload

NEEDS_ROWS = pytest.mark.skipif(not hasattr(fk, "Rows"), reason="this fishkern selects no row ranges")
NEEDS_GROUPS = pytest.mark.skipif(not hasattr(fk, "GroupFisher"), reason="this fishkern has no GroupFisher")


PARTS = [*masked_rows.DENSITIES, *masked_rows.QUARTERS]


@NEEDS_ROWS
@pytest.mark.parametrize("part", PARTS, ids=str)
@pytest.mark.parametrize("rank", [0, 4])
def test_the_rival_steps_its_rows_alone(part, rank):
    """As AdamW steps them where it trains everything."""
    weights, dense = masked_rows.linears(LLAMA_TINY, rank), masked_rows.linears(LLAMA_TINY, rank)
    before = [weight.detach().clone() for weight in weights]
    masked_rows.fused_on_rows(weights, part)()
    torch.optim.AdamW(dense.parameters(), fused=True).step()
    for weight, old, expected in zip(weights, before, dense, strict=True):
        selected = torch.zeros(len(weight), dtype=torch.bool)
        for start, stop in masked_rows.rows(weight, part).bounds:
            selected[start:stop] = True
        density = len(part) / 4 if isinstance(part, tuple) else part
        assert selected.sum() == int(density * len(weight))
        torch.testing.assert_close(weight, torch.where(selected[:, None], expected, old))


@NEEDS_ROWS
@pytest.mark.parametrize("part", PARTS, ids=str)
def test_a_masked_step_moves_the_same_rows(part):
    ours, theirs = masked_rows.linears(LLAMA_TINY), masked_rows.linears(LLAMA_TINY)
    masked_rows.fishkern(ours, part)()
    masked_rows.fused_on_rows(theirs, part)()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("shape", [LLAMA_104M, LLAMA_TINY], ids=["own keys", "shared keys"])
def test_sizes_of_the_model(shape):
    """All linears of the LLaMA; the rest is embedding, head and norms."""
    linears = sum(O * I for O, I in shape.linears()) * shape.layers
    ends = 2 * shape.vocabulary * shape.hidden + (2 * shape.layers + 1) * shape.hidden
    assert linears + ends == sum(shape.sizes())


def test_a_model_of_104_million_parameters():
    assert {case.shape for case in group_fisher.CASES} == {LLAMA_104M}


@NEEDS_GROUPS
def test_all_estimators_are_of_the_same_squares():
    """The sum over all groups is the trace of the Fisher, whatever the groups are."""
    case = Workload(LLAMA_TINY, T=7, N=3, batches=2)
    model, data = case.model(), case.data()
    traces = [
        sum(values.double().sum() for values in fk.estimate(model, data, estimator).values())
        for estimator in group_fisher.estimators().values()
    ]
    torch.testing.assert_close(traces[:2], [traces[2]] * 2, rtol=1e-5, atol=0)


@NEEDS_GROUPS
@pytest.mark.parametrize("provider", ["fishkern", "layer", "diagonal"])
def test_figures_of_memory(provider):
    figures = group_fisher.memory(provider, Workload(LLAMA_TINY, T=7, N=3, batches=2), {"check": True})
    assert figures.keys() == {"weights_mib", "activations_mib", "peak_mib"}
