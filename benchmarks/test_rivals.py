"""A Fisher pass over data by everybody's ways to it: time, peak memory, error, and how much of the model is covered.

Shapes are those of BERT and LLaMA, scaled to a CPU; on a GPU they are the real ones. Weights are random and rows are
full, which suits the rivals best. Each is used as its documentation does, with the settings that its records name; one
that is not installed or fails is recorded with the reason. Providers take turns within each round.

A library that leaves layers out does less work: its time stands beside its coverage. Errors are of small float32
models of the same kinds, against batch size 1 in float64. A pass of few examples is dear for ``fishkern``, which first
compares two of them with autograd; ``fishkern_unchecked`` shows the rest.
"""

from __future__ import annotations

import gc
import time
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any

import pytest
import torch

from benchmarks.cases import SHAPES_CPU, SHAPES_GPU, FullRows
from benchmarks.memory import peak_memory
from benchmarks.providers import RIVALS, in_short, squares
from benchmarks.rivals import as_found
from benchmarks.rivals.oracle import coverage, float64_loop, largest_error
from benchmarks.turns import in_turns, spread

TESTS = ["tests/models/test_traps.py", "tests/benchmarks/test_rivals.py"]
ROUNDS = 3
ON_GPU = torch.cuda.is_available()
CASES = SHAPES_GPU if ON_GPU else SHAPES_CPU
KINDS = list({case.shape: case for case in CASES}.values())


def description(case: FullRows, name: str, quantity: str) -> dict[str, Any]:
    """What each record of a provider says beside the measurement."""
    rival = RIVALS[name]
    return {
        "op": "rivals",
        "quantity": quantity,
        "case": case.fields,
        "attention": "sdpa",
        "dtype": case.dtype,
        "provider": name,
        **({rival.package: rival.version} if rival.version else {}),
        "settings": rival.settings,
        "opt_einsum": torch.backends.opt_einsum.is_available(),  # BackPACK's einsum needs it to be fast
    }


def run(name: str, model: torch.nn.Module, data: list[dict[str, torch.Tensor]]) -> tuple[float, Any]:
    """The seconds of one pass, and its result; whatever it leaves on the model is taken away after."""
    with as_found(model):
        synchronize()
        start = time.perf_counter()
        result = RIVALS[name].run(model, data)
        synchronize()
        return time.perf_counter() - start, result


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def release() -> None:
    """Give memory back: to the next provider, and to processes of their own."""
    gc.collect()  # the traceback of a failure holds its tensors
    if ON_GPU:
        torch.cuda.empty_cache()


def tried(name: str, model: torch.nn.Module, data: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    """Coverage from a pass over some data, or why there is none; ours must not fail."""
    try:
        if RIVALS[name].why_not:
            return {"left out": RIVALS[name].why_not}
        return {"coverage": coverage(model, squares(run(name, model, data)[1]))}
    except Exception as error:
        if name.startswith("fishkern"):
            raise
        return {"left out": in_short(error)}
    finally:
        release()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_time(case, benchmark, record):
    model, data = case.model(), case.data()
    found = {name: tried(name, model, data[:1]) for name in RIVALS}
    able = [name for name in RIVALS if "left out" not in found[name]]
    seconds = in_turns(benchmark, {name: lambda name=name: run(name, model, data)[0] for name in able}, ROUNDS)
    examples = case.N * case.batches
    for name, measured in found.items():
        if values := seconds.get(name):
            measured |= {
                "examples_per_second": examples / median(values),
                "seconds": spread(values),
                "examples": examples,
                "rounds": ROUNDS,
            }
        record("rivals", {**description(case, name, "time"), **measured})


@pytest.mark.parametrize("case", CASES, ids=str)
def test_peak_memory(case, record):
    """In processes of their own, two at a time where they do not share a device's memory."""
    release()
    names = [name for name in RIVALS if name != "fishkern_unchecked"]

    def figures(name: str) -> dict[str, Any]:
        why_not = RIVALS[name].why_not
        return {"left out": why_not} if why_not else peak_memory(name, case)

    with ThreadPoolExecutor(1 if ON_GPU else 2) as pool:
        for name, found in zip(names, pool.map(figures, names), strict=True):
            record("rivals", {**description(case, name, "memory"), **found})


@pytest.mark.parametrize("kind", KINDS, ids=lambda case: case.shape.kind)
def test_error(kind, record):
    case = kind.small()
    model, data = case.model(), case.data()
    truth = float64_loop(model, data)
    for name in RIVALS:
        measured = tried(name, model, data)
        if "coverage" in measured:
            measured |= largest_error(squares(run(name, model, data)[1]), truth)
        record(
            "rivals", {**description(case, name, "error"), "of": "a small model of this kind in float32", **measured}
        )
        if name.startswith("fishkern"):
            assert not measured["wrong"]
            assert measured["coverage"]["entries"] == 1
