"""The whole Fisher pass: time and peak memory.

On a CPU against the batch-size-1 loop and ``vmap(grad)``: ``fishkern`` must never be slower than the loop, and keep
within the memory that a pass needs. Figures are recorded first and judged afterwards. On a GPU against the ways that
people use: times are for each batch, ``forward_backward`` is one ordinary forward and backward pass of the same
batches, and ``marginal_ms`` is what one batch more costs, since a pass of ``fishkern`` begins with a set-up, which
``fishkern_one_batch`` shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import pytest
import torch
from torch import nn

import fishkern as fk
from benchmarks import rivals
from benchmarks.engine.memory import activations_mib, peak_mib, rounded, weights_mib
from benchmarks.engine.process import in_process
from benchmarks.engine.turns import in_turns, seconds_of, spread
from benchmarks.gpu import Part, Record
from benchmarks.gpu.timing import time_providers
from benchmarks.rivals import Batches
from benchmarks.rivals.providers import PASSES, runs
from benchmarks.subjects.transformers import TINYLLAMA, Workload, small_llama

TESTS = {
    "run": ["tests/models/test_families.py", "tests/models/test_conditions.py"],
    # The comparison of both backends on a small model of every layer, which runs on the device where there is one.
    "gpu": ["tests/models/test_backends.py"],
}
TESTED_IN = 45
PROVIDERS = runs(PASSES, "fishkern", "one_by_one", "vmap_grad")

# On a CPU: 128 examples, the number that FISH-Tuning takes.
CPU_CASES = [Workload(small_llama(4, 512), T, batches=16) for T in (16, 64, 256)]
ROUNDS = 3
NEVER_SLOWER = 1.05  # of the loop's median time
MEMORY = 1.3  # of model, accumulators and the activations of the batch
MEASURED_BATCHES = 2  # of a peak; accumulators are there when the second begins


def fields(case: Workload) -> Record:
    """The case of a record."""
    shape = case.shape
    return {"T": case.T, "N": case.N, "batches": case.batches, "layers": shape.layers, "hidden": shape.hidden}


def label(case: Workload) -> str:
    return ",".join(f"{name}={value}" for name, value in fields(case).items())


def compared() -> dict[str, dict[str, Callable]]:
    """For ``python -m benchmarks compare``."""

    def make(case: Workload, provider: str) -> Callable[[], object]:
        return partial(PROVIDERS[provider], case.model(), case.data(mask=True))

    return {
        label(case): {name: partial(make, case, name) for name in ("fishkern", "one_by_one")} for case in CPU_CASES[:2]
    }


def description(case: Workload, name: str, quantity: str) -> Record:
    """The fields of a record other than its figures."""
    shared = {"op": "whole_pass", "quantity": quantity, "case": fields(case), "attention": "sdpa", "dtype": "float32"}
    return {**shared, "provider": name}


@pytest.mark.parametrize("case", CPU_CASES, ids=label)
def test_time(case, benchmark, record):
    model, data = case.model(), case.data(mask=True)
    timed = {name: partial(seconds_of, partial(run, model, data)) for name, run in PROVIDERS.items()}
    seconds = in_turns(benchmark, timed, ROUNDS)
    for name, values in seconds.items():
        record("whole_pass", {**description(case, name, "time"), "seconds": spread(values), "rounds": ROUNDS})
    assert median(seconds["fishkern"]) <= NEVER_SLOWER * median(seconds["one_by_one"])


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CPU_CASES, ids=label)
def test_peak_memory(case, provider, record):
    figures = in_process("benchmarks.cases.whole_pass:memory", provider, case)
    record("whole_pass", {**description(case, provider, "memory"), **figures})
    if provider == "fishkern":
        weights, activations = figures["weights_mib"], figures["activations_mib"]
        assert weights + figures["peak_mib"] <= MEMORY * (2 * weights + activations)


def memory(provider: str, case: Workload) -> dict[str, Any]:
    """Weights, activations, and the peak of a pass above what was there with the model loaded."""
    model, data = case.model(), case.data(mask=True)
    with torch.no_grad():
        model(data[0]["input_ids"][:1, :8])  # libraries allocate on first use
    figures = {"weights_mib": weights_mib(model), "activations_mib": activations_mib(model, data[0])}
    return rounded({**figures, "peak_mib": peak_mib(lambda: PROVIDERS[provider](model, data[:MEASURED_BATCHES]))})


# On a GPU: TinyLlama's shape, 1.1 billion parameters.
FULL = Workload(TINYLLAMA, T=512, batches=16, dtype="bfloat16", device="cuda")
CASES = {
    "1B 8x512": FULL,
    "1B 8x128": replace(FULL, T=128),
    "1B 64x16": replace(FULL, N=64, T=16),
    "1B 8x512 tied": replace(FULL, shape=replace(TINYLLAMA, tied=True)),
    "1B 8x512 lora r=16": replace(FULL, lora=16),
}
# The slow ones are timed on fewer batches than all.
FEWER = {"fishkern_one_batch": 1, "forward_backward": 4, "one_by_one": 1, "one_by_one_graphed": 2, "per_layer_bmm": 2}
FEWER |= {"fishkern_checked": 4, "fishkern_torch": 2}
# A capture that fails may disturb later allocations, so it is not timed in turns with the others.
ALONE = "one_by_one_graphed"


def parts(device: torch.device) -> list[Part]:
    return [
        Part(name, partial(measure, replace(case, device=str(device)), device), seconds=65)
        for name, case in CASES.items()
    ]


def measure(case: Workload, device: torch.device) -> Iterator[Record]:
    """Time all providers on one case."""
    model, batches = case.model(), case.data()
    on_gpu = providers(case, model)
    counts = {name: min(FEWER.get(name, case.batches), case.batches) for name in on_gpu}
    timed = {name: partial(run, batches[: counts[name]]) for name, run in on_gpu.items()}
    alone = {ALONE: timed.pop(ALONE)} if ALONE in timed else {}
    figures = time_providers(timed, ours="fishkern", device=device, flush=False)
    accumulators = sum(4 * parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    error = disagreement(model, batches[:1])
    if alone:
        figures |= time_providers(alone, ours="fishkern", device=device, flush=False)
    for provider, measured in figures.items():
        if "ms" in measured:
            measured["ms"] = {key: value / counts[provider] for key, value in measured["ms"].items()}
        record = {"provider": provider, "case": case.fields, "attention": "sdpa", "dtype": case.dtype, **measured}
        if provider == "fishkern":
            first, total = figures["fishkern_one_batch"]["ms"]["median"], measured["ms"]["median"] * case.batches
            record |= {
                "error": f"{error:.1e}",
                "accumulators_mib": round(accumulators / 2**20, 1),
                "marginal_ms": (total - first) / max(case.batches - 1, 1),
            }
        yield {**record, "batches": counts[provider]}


def providers(case: Workload, model: nn.Module) -> dict[str, Callable[[Batches], object]]:
    """All that is timed; with LoRA or a tied head only ``fishkern`` and the yardstick."""
    ours = partial(fk.estimate, model, check=False, backend="triton")
    timed: dict[str, Callable[[Batches], object]] = {
        "fishkern_one_batch": ours,
        "fishkern": ours,
        "fishkern_checked": partial(fk.estimate, model, backend="triton"),
        "forward_backward": partial(rivals.forward_backward, model),
    }
    if case.shape.tied or case.lora:
        return timed
    graphed: list[Callable[[Batches], object]] = []

    def replay(batches: Batches) -> object:
        if not graphed:
            graphed.append(rivals.graphed_one_by_one(model, case.T))
        return graphed[0](batches)

    return timed | {
        "fishkern_torch": partial(fk.estimate, model, check=False, backend="torch"),
        "one_by_one": partial(rivals.one_by_one, model),
        "one_by_one_graphed": replay,
        "per_layer_bmm": partial(rivals.per_layer_bmm, model),
    }


def disagreement(model: nn.Module, batches: Batches) -> float:
    """The largest ``|triton - torch| / |torch|`` of a parameter."""
    ours, theirs = (fk.estimate(model, batches, check=False, backend=backend) for backend in ("triton", "torch"))
    return max(((ours[name] - theirs[name]).norm() / theirs[name].norm()).item() for name in ours)
