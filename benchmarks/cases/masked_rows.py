"""A masked AdamW step over row ranges, against torch's fused AdamW on the same rows, on all linears of a LLaMA.

Row ranges are stepped in place, so a masked step has nothing to gather: it should cost what torch's own costs. Both
take turns within each round, on weights and gradients of their own. One range in the middle of each weight of a large
model shows the arithmetic; quarters of the rows of small models, and of their LoRA, as freezing leaves them, show what
the host does for each of many small pieces.
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
from benchmarks.subjects.transformers import LLAMA_104M, Shape, small_llama

TESTS = {"run": ["tests/laws/test_optimizers.py", "tests/optim"]}
SHAPE = LLAMA_104M
DENSITIES = (0.1, 0.5, 1.0)  # of the rows
# By name a shape, and the rank of LoRA on its linears, whose factors are trained instead of them; 0 for the weights.
SMALL = {
    f"{kind} {hidden}": (small_llama(layers, hidden), rank)
    for hidden in (384, 768, 1024)
    for kind, layers, rank in (("llama", 4, 0), ("lora", 8, 16))
}
QUARTERS = ((0,), (0, 2), (1, 2, 3))  # which of the rows train: one range, two, and one
Part = float | tuple[int, ...]  # a density, or numbers of quarters
ROUNDS = 9
MANY_ROUNDS = 31  # of steps of a few milliseconds
GOAL = 1.1  # times torch's step

pytestmark = pytest.mark.skipif(not hasattr(fk, "Rows"), reason="this fishkern selects no row ranges")


def linears(shape: Shape, rank: int = 0) -> nn.ParameterList:
    """The weights of all linears, or the factors of LoRA on them, with gradients that stay the same."""
    generator = torch.Generator().manual_seed(0)
    sizes = shape.linears() * shape.layers
    if rank:
        sizes = [size for O, I in sizes for size in ((rank, I), (O, rank))]
    weights = nn.ParameterList([torch.randn(size, generator=generator) for size in sizes])
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator)
    return weights


def rows(weight: nn.Parameter, part: Part) -> fk.Rows:
    """So many rows, in the middle; or these quarters."""
    size = len(weight)
    if isinstance(part, tuple):
        return fk.Rows(*((size * number // 4, size * (number + 1) // 4) for number in part))
    count = int(part * size)
    start = (size - count) // 2
    return fk.Rows((start, start + count))


def fishkern(weights: nn.ParameterList, part: Part) -> Run:
    """A masked optimizer of a selection of row ranges."""
    parameters = dict(weights.named_parameters())
    ranges = {name: rows(weight, part) for name, weight in parameters.items()}
    selection = fk.Selection({name: weight.shape for name, weight in parameters.items()}, {}, ranges=ranges)
    return fk.MaskedAdamW(weights, selection, max_grad_norm=math.inf).step


def fused_on_rows(weights: nn.ParameterList, part: Part) -> Run:
    """Torch's fused AdamW, with each range of rows of each weight as a parameter."""
    views = []
    for weight in weights:
        for start, stop in rows(weight, part).bounds:
            view = nn.Parameter(weight.detach()[start:stop])
            view.grad = weight.grad[start:stop]
            views.append(view)
    return torch.optim.AdamW(views, fused=True).step


PROVIDERS: dict[str, Callable[[nn.ParameterList, Part], Run]] = {"fishkern": fishkern, "fused_on_rows": fused_on_rows}


def compared() -> dict[str, dict[str, Callable[[], Run]]]:
    """For ``python -m benchmarks compare``, in revisions that select row ranges."""
    if not hasattr(fk, "Rows"):
        return {}

    def make(provider: str, shape: Shape, rank: int, part: Part) -> Run:
        return PROVIDERS[provider](linears(shape, rank), part)

    runs = {f"rows={density}": (SHAPE, 0, density) for density in DENSITIES}
    runs |= {f"{name},quarters={part}": (*model, part) for name, model in SMALL.items() for part in QUARTERS}
    return {run: {name: partial(make, name, *case) for name in PROVIDERS} for run, case in runs.items()}


def description(provider: str, shape: Shape, rank: int, part: Part) -> Record:
    """The fields of a record other than its figures."""
    case = {"layers": shape.layers, "hidden": shape.hidden, "intermediate": shape.intermediate}
    case |= {"lora": rank} if rank else {}
    case |= {"quarters": part} if isinstance(part, tuple) else {"rows": part}
    return {"op": "masked_adamw", "quantity": "time", "case": case, "dtype": "float32", "provider": provider}


@pytest.mark.parametrize("density", DENSITIES)
def test_time(density, benchmark, record):
    measure(SHAPE, 0, density, ROUNDS, benchmark, record)


@pytest.mark.parametrize("quarters", QUARTERS, ids=str)
@pytest.mark.parametrize("model", SMALL)
def test_quarters_of_small_matrices(model, quarters, benchmark, record):
    measure(*SMALL[model], quarters, MANY_ROUNDS, benchmark, record)


def measure(shape: Shape, rank: int, part: Part, rounds: int, benchmark, record) -> None:
    steps = {name: provider(linears(shape, rank), part) for name, provider in PROVIDERS.items()}
    for step in steps.values():  # which makes its state
        step()
    seconds = in_turns(benchmark, {name: partial(seconds_of, step) for name, step in steps.items()}, rounds)
    for name, values in seconds.items():
        own = description(name, shape, rank, part)
        record("masked_rows", {**own, "seconds": spread(values), "rounds": rounds})
    assert median(seconds["fishkern"]) <= GOAL * median(seconds["fused_on_rows"])
