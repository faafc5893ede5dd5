"""A plan against the pass that it plans: peak memory, and what the projections of energies cost in time.

A LLaMA of 104 million parameters with random weights. The peak of a whole ``estimate``, set-up and self-check included,
is compared with the plan of the same call, both above the loaded model; and so it is on each of two ranks over which
FSDP2 shards it (gloo), above the shards. Times are of one batch after the first, as a
pass begins with a set-up: a pass of ``DirectionEnergy`` against one that captures the same activations and output
gradients and does nothing with them, in turns, on four of the layers. FLOPs are those of the plan. A plan of an 8B
shape takes little time, and next to no memory.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import pytest
import torch
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard

import fishkern as fk
from benchmarks.engine.memory import MIB, peak_mib, rounded, weights_mib
from benchmarks.engine.process import in_process
from benchmarks.engine.records import Record
from benchmarks.engine.turns import spread, there_and_back
from benchmarks.subjects.transformers import LLAMA_8B, LLAMA_104M, LLAMA_TINY, Workload

TESTS = {"run": ["tests/statistics/test_plan.py", "tests/laws/test_estimators.py"]}
CASE = Workload(LLAMA_104M, T=256, N=8, batches=2)
LARGE = Workload(LLAMA_8B, T=512, N=8, batches=1, dtype="bfloat16", device="meta")
TIMED = replace(CASE, shape=replace(LLAMA_104M, layers=4), N=4, T=128, batches=4)
ROUNDS = 3
RANKS = 2
SECONDS = 900  # that a measurement in a process of its own may take
LEAST_GIB = 1  # of a plan that a peak is compared with
WITHIN = 1.1  # of the plan
PROJECTING = 2.2  # times a pass without projections
PLANNING_MIB, PLANNING_SECONDS = 256, 30  # that a plan of an 8B shape may take, on one core

pytestmark = pytest.mark.skipif(not hasattr(fk, "plan"), reason="this fishkern has no plan")

ESTIMATORS = ("DiagonalFisher", "DirectionEnergy")


@dataclass(frozen=True)
class Captured(fk.Estimator):
    """Reads activations and output gradients, and adds nothing."""

    reads: ClassVar[str] = "factors"
    by_default: ClassVar[str] = "linear"
    definition: ClassVar[dict[str, Any]] = {"estimator": "Captured", "unit": "example"}

    def init(self, parameter):
        return torch.zeros((), dtype=parameter.dtype, device=parameter.device)

    def update_(self, state, grads, parameter, backend=None):
        assert grads.activations.shape[:2] == grads.output_grads.shape[:2]

    def result(self, state, count):
        return state + 1  # of zeros alone there would be a warning


def description(case: Workload, name: str, quantity: str, provider: str = "fishkern") -> Record:
    """The fields of a record other than its figures."""
    shared = {"op": "plan", "quantity": quantity, "case": case.fields, "attention": "sdpa", "dtype": case.dtype}
    return {**shared, "provider": provider, "estimator": name}


@pytest.fixture
def say(capsys):
    """Print a line also where pytest keeps back what is printed."""

    def line(text: str) -> None:
        with capsys.disabled():
            print(f"\n    {text}", flush=True)

    return line


@pytest.mark.parametrize("name", ESTIMATORS)
def test_peak_memory(name, record, say):
    figures = in_process("benchmarks.cases.plan:memory", name, CASE, seconds=SECONDS)
    record("plan", {**description(CASE, name, "memory"), **figures})
    say(f"{name}: planned {figures['plan_mib']} MiB above the model, measured {figures['peak_mib']} MiB")
    assert figures["plan_mib"] >= 1024 * LEAST_GIB
    assert figures["peak_mib"] <= WITHIN * figures["plan_mib"], f"{figures['ratio']} of the plan, at most {WITHIN}"


def memory(name: str, case: Workload) -> Record:
    """The parts of a plan, and the peak of the pass, above the loaded model."""
    tiny = Workload(LLAMA_TINY, T=4, N=2, batches=1)
    fk.estimate(tiny.model(), tiny.data(), getattr(fk, name)())  # libraries are loaded and allocate on first use
    model, data = case.model(), case.data()
    planned = fk.plan(model, data[0], getattr(fk, name)())
    peak = peak_mib(partial(fk.estimate, model, data, getattr(fk, name)()))
    return rounded({"weights_mib": weights_mib(model), **parts(planned), "peak_mib": peak}) | {
        "ratio": round(peak / (planned.peak_bytes / MIB), 3)
    }


def test_peak_memory_of_ranks(record, say):
    """Each rank has a batch of its own, as large as that of the plan."""
    with TemporaryDirectory() as folder, ThreadPoolExecutor(RANKS) as threads:
        arguments = [("benchmarks.cases.plan:memory_of_rank", rank, folder, CASE) for rank in range(RANKS)]
        every = list(threads.map(lambda one: in_process(*one, seconds=SECONDS), arguments))
    for rank, figures in enumerate(every):
        described = description(CASE, "DiagonalFisher", "memory of ranks") | {"ranks": RANKS, "rank": rank}
        record("plan", {**described, **figures})
        say(f"rank {rank} of {RANKS}: planned {figures['plan_mib']} MiB, measured {figures['peak_mib']} MiB")
    for figures in every:
        assert figures["plan_mib"] >= 1024 * LEAST_GIB
        assert figures["peak_mib"] <= WITHIN * figures["plan_mib"], f"{figures['ratio']} of the plan, at most {WITHIN}"


def memory_of_rank(rank: int, folder: str, case: Workload) -> Record:
    """The parts of a plan for ranks, and the peak of the pass on one of them, above its shards."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    tiny = Workload(LLAMA_TINY, T=4, N=2, batches=1)
    fk.estimate(sharded(tiny.model()), iter(tiny.data()))  # libraries are loaded and allocate on first use
    whole = case.model()
    planned = fk.plan(whole, case.data()[0], ranks=RANKS)
    model, data = sharded(whole), case.data()
    peak = peak_mib(lambda: fk.estimate(model, iter(data)))
    dist.destroy_process_group()
    own = planned.per_rank
    figures = {
        "weights_mib": own.weight_bytes / MIB,
        "accumulators_mib": own.accumulator_bytes / MIB,
        "activations_mib": planned.activation_bytes / MIB,
        "blocks_mib": own.block_bytes / MIB,
        "gathered_mib": own.unit_bytes / MIB,
        "plan_mib": own.peak_bytes / MIB,
        "peak_mib": peak,
    }
    return rounded(figures) | {"ratio": round(peak / (own.peak_bytes / MIB), 3)}


def sharded(model: torch.nn.Module) -> torch.nn.Module:
    """Shard each layer, and the rest."""
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def parts(planned: fk.PassPlan) -> dict[str, float]:
    """A plan, in MiB."""
    return {
        "accumulators_mib": planned.accumulator_bytes / MIB,
        "bases_mib": planned.basis_bytes / MIB,
        "activations_mib": planned.activation_bytes / MIB,
        "plan_mib": planned.peak_bytes / MIB,
    }


@pytest.mark.parametrize("name", ESTIMATORS)
def test_large_shape_on_the_meta_device(name, record, say):
    figures = in_process("benchmarks.cases.plan:planning", name, LARGE, seconds=SECONDS)
    record("plan", {**description(LARGE, name, "planning"), **figures})
    say(f"{name} of an 8B shape: planned in {figures['cpu_seconds']} s of one core and {figures['peak_mib']} MiB")
    assert figures["peak_mib"] <= PLANNING_MIB, f"planning took {figures['peak_mib']} MiB, at most {PLANNING_MIB}"
    assert figures["cpu_seconds"] <= PLANNING_SECONDS, f"took {figures['cpu_seconds']} s, at most {PLANNING_SECONDS}"


def planning(name: str, case: Workload) -> Record:
    """What planning takes itself: seconds by the clock and of the processor, and its own peak."""
    tiny = Workload(LLAMA_TINY, T=4, N=2, batches=1)
    fk.plan(tiny.model(), tiny.data()[0], getattr(fk, name)())
    model, batch = case.model(), replace(case, device="cpu").data()[0]
    planned: list[fk.PassPlan] = []
    started, of_processor = time.perf_counter(), time.process_time()
    peak = peak_mib(lambda: planned.append(fk.plan(model, batch, getattr(fk, name)())))
    seconds, of_processor = time.perf_counter() - started, time.process_time() - of_processor
    figures = {"planned_weights_mib": planned[0].weight_bytes / MIB, **parts(planned[0]), "peak_mib": peak}
    return {**rounded(figures), "seconds": round(seconds, 1), "cpu_seconds": round(of_processor, 1)}


def test_time_of_projections(record, say):
    model, data = TIMED.model(), TIMED.data()
    flops = fk.plan(model, data[0], fk.DirectionEnergy(), check=False).flops
    counted = {"fishkern": flops["pass"], "captured": flops["pass"] - flops["estimator"]}
    providers = {"captured": Captured(), "fishkern": fk.DirectionEnergy()}
    rounds = there_and_back(providers, ROUNDS, partial(of_later_batches, model, data))
    seconds = {name: [one for values in of_rounds for one in values] for name, of_rounds in rounds.items()}
    medians = {name: median(values) for name, values in seconds.items()}
    ratio, of_flops = (figures["fishkern"] / figures["captured"] for figures in (medians, counted))
    for name, values in seconds.items():
        ratios = {"ratio": round(ratio, 3), "flops_ratio": round(of_flops, 3)} if name == "fishkern" else {}
        figures = {"seconds": spread(values), "rounds": ROUNDS, "flops": counted[name], **ratios}
        record("plan", {**description(TIMED, type(providers[name]).__name__, "time", name), **figures})
    say(
        f"a batch with projections took {medians['fishkern']:.2f} s and {counted['fishkern']:.2e} FLOPs, without "
        f"{medians['captured']:.2f} s and {counted['captured']:.2e}: {ratio:.2f} times the time, {of_flops:.2f} times "
        "the FLOPs"
    )
    assert ratio <= PROJECTING, f"{ratio:.2f} times the time of a pass without projections, at most {PROJECTING}"


def of_later_batches(model: torch.nn.Module, data: list[Any], estimator: fk.Estimator) -> list[float]:
    """Seconds of each batch after the first in one pass."""
    asked: list[float] = []

    def noted() -> Iterator[Any]:
        for batch in data:
            asked.append(time.perf_counter())
            yield batch
        asked.append(time.perf_counter())

    fk.estimate(model, noted(), estimator, check=False)
    return [end - start for start, end in pairwise(asked)][1:]
