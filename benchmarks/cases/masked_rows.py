"""A masked AdamW step over row ranges, against torch's fused AdamW on the same rows, on all linears of a LLaMA.

Row ranges are stepped in place, so a masked step has nothing to gather: it should cost what torch's own costs. Both
take turns within each round, on weights and gradients of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from statistics import median

import pytest
import torch
from torch import nn

import fishkern as fk
from benchmarks.engine.records import Record
from benchmarks.engine.turns import Run, in_turns, seconds_of, spread
from benchmarks.subjects.transformers import LLAMA_104M, Shape

TESTS = {"run": ["tests/laws/test_optimizers.py", "tests/optim"]}
SHAPE = LLAMA_104M
DENSITIES = (0.1, 0.5, 1.0)  # of the rows
ROUNDS = 9
GOAL = 1.1  # times torch's step

pytestmark = pytest.mark.skipif(not hasattr(fk, "Rows"), reason="this fishkern selects no row ranges")


def linears(shape: Shape) -> nn.ParameterList:
    """The weights of all linears, with gradients that stay the same."""
    generator = torch.Generator().manual_seed(0)
    sizes = shape.linears() * shape.layers
    weights = nn.ParameterList([torch.randn(size, generator=generator) for size in sizes])
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator)
    return weights


def rows(weight: nn.Parameter, density: float) -> slice:
    """So many rows, in the middle."""
    count = int(density * len(weight))
    start = (len(weight) - count) // 2
    return slice(start, start + count)


def fishkern(weights: nn.ParameterList, density: float) -> Run:
    """A masked optimizer of a selection of row ranges."""
    parameters = dict(weights.named_parameters())
    ranges = {name: fk.Rows(rows(weight, density)) for name, weight in parameters.items()}
    selection = fk.Selection({name: weight.shape for name, weight in parameters.items()}, {}, ranges=ranges)
    return fk.MaskedAdamW(weights, selection, max_grad_norm=math.inf).step


def fused_on_rows(weights: nn.ParameterList, density: float) -> Run:
    """Torch's fused AdamW, with the rows of each weight as a parameter."""
    views = []
    for weight in weights:
        at = rows(weight, density)
        view = nn.Parameter(weight.detach()[at])
        view.grad = weight.grad[at]
        views.append(view)
    return torch.optim.AdamW(views, fused=True).step


PROVIDERS: dict[str, Callable[[nn.ParameterList, float], Run]] = {"fishkern": fishkern, "fused_on_rows": fused_on_rows}


def compared() -> dict[str, dict[str, Callable[[], Run]]]:
    """For ``python -m benchmarks compare``, in revisions that select row ranges."""
    if not hasattr(fk, "Rows"):
        return {}

    def make(provider: str, density: float) -> Run:
        return PROVIDERS[provider](linears(SHAPE), density)

    return {f"rows={density}": {name: partial(make, name, density) for name in PROVIDERS} for density in DENSITIES}


def description(provider: str, density: float) -> Record:
    """The fields of a record other than its figures."""
    case = {"layers": SHAPE.layers, "hidden": SHAPE.hidden, "intermediate": SHAPE.intermediate, "rows": density}
    return {"op": "masked_adamw", "quantity": "time", "case": case, "dtype": "float32", "provider": provider}


@pytest.mark.parametrize("density", DENSITIES)
def test_time(density, benchmark, record):
    steps = {name: provider(linears(SHAPE), density) for name, provider in PROVIDERS.items()}
    for step in steps.values():  # which makes its state
        step()
    seconds = in_turns(benchmark, {name: partial(seconds_of, step) for name, step in steps.items()}, ROUNDS)
    for name, values in seconds.items():
        record("masked_rows", {**description(name, density), "seconds": spread(values), "rounds": ROUNDS})
    assert median(seconds["fishkern"]) <= GOAL * median(seconds["fused_on_rows"])
