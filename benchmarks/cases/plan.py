"""A plan against the pass that it plans: peak memory, and what the projections of energies cost in time.

A LLaMA of 104 million parameters with random weights. The peak of a whole ``estimate``, set-up and self-check included,
is compared with the plan of the same call, both above the loaded model. Times are of one more batch, as a pass begins
with a set-up: a pass of ``DirectionEnergy`` against one that captures the same activations and output gradients and
does nothing with them. FLOPs are those of the plan, counted at torch's dispatcher. A plan of an 8B shape takes next to
no memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any, ClassVar

import pytest
import torch

import fishkern as fk
from benchmarks.engine.memory import MIB, peak_mib, rounded, weights_mib
from benchmarks.engine.process import in_process
from benchmarks.engine.records import Record
from benchmarks.engine.turns import in_turns, seconds_of, spread
from benchmarks.subjects.transformers import LLAMA_8B, LLAMA_104M, LLAMA_TINY, Workload

TESTS = {"run": ["tests/statistics/test_plan.py", "tests/laws/test_estimators.py"]}
CASE = Workload(LLAMA_104M, T=256, N=8, batches=2)
LARGE = Workload(LLAMA_8B, T=512, N=8, batches=1, dtype="bfloat16", device="meta")
TIMED = replace(CASE, N=4, T=128, batches=3)
ROUNDS = 3
LEAST_GIB = 1  # of a plan that a peak is compared with
WITHIN = 1.1  # of the plan
PROJECTING = 2.2  # times a pass without projections
PLANNING_MIB = 256  # that a plan of an 8B shape may take

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


@pytest.mark.parametrize("name", ESTIMATORS)
def test_peak_memory(name, record):
    figures = in_process("benchmarks.cases.plan:memory", name, CASE)
    record("plan", {**description(CASE, name, "memory"), **figures})
    assert figures["plan_mib"] >= 1024 * LEAST_GIB
    assert figures["peak_mib"] <= WITHIN * figures["plan_mib"]


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


def parts(planned: fk.PassPlan) -> dict[str, float]:
    """A plan, in MiB."""
    return {
        "accumulators_mib": planned.accumulator_bytes / MIB,
        "bases_mib": planned.basis_bytes / MIB,
        "activations_mib": planned.activation_bytes / MIB,
        "plan_mib": planned.peak_bytes / MIB,
    }


@pytest.mark.parametrize("name", ESTIMATORS)
def test_large_shape_on_the_meta_device(name, record):
    figures = in_process("benchmarks.cases.plan:planning", name, LARGE)
    record("plan", {**description(LARGE, name, "planning"), **figures})
    assert figures["peak_mib"] <= PLANNING_MIB


def planning(name: str, case: Workload) -> Record:
    """What planning takes itself: seconds, and its own peak."""
    tiny = Workload(LLAMA_TINY, T=4, N=2, batches=1)
    fk.plan(tiny.model(), tiny.data()[0], getattr(fk, name)())
    model, batch = case.model(), replace(case, device="cpu").data()[0]
    planned: list[fk.PassPlan] = []
    seconds: list[float] = []

    def run() -> None:
        seconds.append(seconds_of(lambda: planned.append(fk.plan(model, batch, getattr(fk, name)()))))

    peak = peak_mib(run)
    figures = {"planned_weights_mib": planned[0].weight_bytes / MIB, **parts(planned[0]), "peak_mib": peak}
    return {**rounded(figures), "seconds": round(seconds[0], 1)}


def test_time_of_projections(benchmark, record):
    model, data = TIMED.model(), TIMED.data()
    flops = fk.plan(model, data[0], fk.DirectionEnergy(), check=False).flops
    providers = {"fishkern": fk.DirectionEnergy(), "captured": Captured()}
    timed = {name: partial(one_more_batch, model, data, estimator) for name, estimator in providers.items()}
    seconds = in_turns(benchmark, timed, ROUNDS)
    counted = {"fishkern": flops["pass"], "captured": flops["pass"] - flops["estimator"]}
    for name, values in seconds.items():
        figures = {"seconds": spread(values), "rounds": ROUNDS, "flops": counted[name]}
        record("plan", {**description(TIMED, type(providers[name]).__name__, "time", name), **figures})
    assert median(seconds["fishkern"]) <= PROJECTING * median(seconds["captured"])


def one_more_batch(model: torch.nn.Module, data: list[Any], estimator: fk.Estimator) -> float:
    """Seconds of each batch after the first."""
    whole, first = (seconds_of(partial(fk.estimate, model, part, estimator, check=False)) for part in (data, data[:1]))
    return (whole - first) / (len(data) - 1)
