"""A Fisher pass over data, by every library that has one: time, peak memory, error, coverage of the model.

Shapes are those of BERT and LLaMA, scaled to a CPU; on a GPU they are the real ones. Weights are random and rows are
full, which suits the rivals best. Each is used as its documentation does, with the settings that its records name; one
that is not installed or fails is recorded with the reason. Providers take turns within each round.

A library that leaves layers out does less work, so its record has the coverage along with the time. Errors are of small
float32 models of the same kinds, against batch size 1 in float64. A pass over few examples is expensive for
``fishkern``, which first compares two of them with autograd; ``fishkern_unchecked`` shows the rest.
"""

from __future__ import annotations

import gc
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from statistics import median
from typing import Any

import pytest
import torch

from benchmarks.engine.memory import activations_mib, peak_mib, rounded, weights_mib
from benchmarks.engine.process import in_process, in_short
from benchmarks.engine.turns import in_turns, spread
from benchmarks.rivals import as_found
from benchmarks.rivals.oracle import coverage, float64_loop, largest_error
from benchmarks.rivals.providers import PASSES, squares
from benchmarks.subjects.transformers import BERT_BASE, BERT_MINI, LLAMA_1B, LLAMA_8B, LLAMA_21M, Workload

TESTS = {"run": ["tests/models/test_traps.py", "tests/benchmarks/test_rivals.py"]}
ROUNDS = 3
MEASURED_BATCHES = 2  # of a peak; accumulators are there when the second begins
ON_CPU = [
    Workload(BERT_MINI, 32, batches=12),
    Workload(BERT_MINI, 128),
    Workload(BERT_MINI, 512, N=4, batches=16),
    Workload(LLAMA_21M, 32, batches=6),
    Workload(LLAMA_21M, 128),
    Workload(LLAMA_21M, 512, N=4, batches=8),
]
IN_BFLOAT16 = {"dtype": "bfloat16", "device": "cuda"}
ON_GPU = [
    *(Workload(BERT_BASE, T, N=32, batches=8, device="cuda") for T in (32, 128, 512)),
    *(Workload(LLAMA_1B, T, batches=8, **IN_BFLOAT16) for T in (32, 128, 512)),
    Workload(LLAMA_1B, 2048, N=4, **IN_BFLOAT16),
    *(Workload(LLAMA_8B, T, batches=2, **IN_BFLOAT16) for T in (128, 512)),
    Workload(LLAMA_8B, 2048, N=4, batches=2, **IN_BFLOAT16),
]
HAS_GPU = torch.cuda.is_available()
CASES = ON_GPU if HAS_GPU else ON_CPU
KINDS = list({case.shape: case for case in CASES}.values())


def description(case: Workload, name: str, quantity: str) -> dict[str, Any]:
    """The fields of a record other than its figures."""
    rival = PASSES[name]
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
    """The seconds of one pass, and its result; whatever it leaves on the model is removed afterwards."""
    with as_found(model):
        synchronize()
        start = time.perf_counter()
        result = PASSES[name].run(model, data)
        synchronize()
        return time.perf_counter() - start, result


def synchronize() -> None:
    if HAS_GPU:
        torch.cuda.synchronize()


def release() -> None:
    """Give memory back: to the next provider, and to processes of their own."""
    gc.collect()  # the traceback of a failure holds its tensors
    if HAS_GPU:
        torch.cuda.empty_cache()


def tried(name: str, model: torch.nn.Module, data: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    """The coverage of a pass over some data, or why there is none; ``fishkern`` must not fail."""
    try:
        if PASSES[name].why_not:
            return {"left out": PASSES[name].why_not}
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
    attempts = {name: tried(name, model, data[:1]) for name in PASSES}
    able = [name for name in PASSES if "left out" not in attempts[name]]
    seconds = in_turns(benchmark, {name: lambda name=name: run(name, model, data)[0] for name in able}, ROUNDS)
    examples = case.N * case.batches
    for name, measured in attempts.items():
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
    names = [name for name in PASSES if name != "fishkern_unchecked"]

    def figures(name: str) -> dict[str, Any]:
        why_not = PASSES[name].why_not
        return {"left out": why_not} if why_not else in_process("benchmarks.cases.rivals:memory", name, case)

    with ThreadPoolExecutor(1 if HAS_GPU else 2) as pool:
        for name, measured in zip(names, pool.map(figures, names), strict=True):
            record("rivals", {**description(case, name, "memory"), **measured})


def memory(provider: str, case: Workload) -> dict[str, Any]:
    """Weights, activations, and the peak of a pass above what was there with the model loaded; a rival may fail."""
    model, data, small = case.model(), case.data(), case.small()
    run = PASSES[provider].run
    with torch.no_grad():
        model(data[0]["input_ids"][:1, :8])  # libraries allocate on first use
    with suppress(Exception):  # nor are a library's modules memory of the pass; a failure shows again below
        run(small.model(), small.data())
    figures: dict[str, Any] = {"weights_mib": weights_mib(model), "activations_mib": activations_mib(model, data[0])}
    try:
        figures["peak_mib"] = peak_mib(lambda: run(model, data[:MEASURED_BATCHES]))
    except Exception as error:
        if provider == "fishkern":
            raise
        figures["left out"] = in_short(error)
    return rounded(figures)


@pytest.mark.parametrize("kind", KINDS, ids=lambda case: case.shape.kind)
def test_error(kind, record):
    case = kind.small()
    model, data = case.model(), case.data()
    truth = float64_loop(model, data)
    for name in PASSES:
        measured = tried(name, model, data)
        if "coverage" in measured:
            measured |= largest_error(squares(run(name, model, data)[1]), truth)
        record(
            "rivals", {**description(case, name, "error"), "of": "a small model of this kind in float32", **measured}
        )
        if name.startswith("fishkern"):
            assert not measured["wrong"]
            assert measured["coverage"]["entries"] == 1
