"""The Fisher of rows and of layers against that of all parameters: time, and peak memory above the activations.

A LLaMA of 104 million parameters with random weights, on short and on long examples, since squares are reduced in
different ways there. Everything is as a user calls it, self-check included, if not said otherwise. All estimators take
turns within each round.
"""

from __future__ import annotations

from functools import partial
from statistics import median

import pytest

import fishkern as fk
from benchmarks.engine.memory import kept_mib, peak_mib, rounded, weights_mib
from benchmarks.engine.process import in_process
from benchmarks.engine.records import Record
from benchmarks.engine.turns import in_turns, seconds_of, spread
from benchmarks.subjects.transformers import LLAMA_104M, LLAMA_TINY, Workload

TESTS = {"run": ["tests/laws/test_estimators.py", "tests/models/test_families.py"]}
CASES = [Workload(LLAMA_104M, T=16, N=8, batches=4), Workload(LLAMA_104M, T=256, N=4, batches=2)]
ROUNDS = 3
NEVER_SLOWER = 1.05  # than the Fisher of all parameters
CHECKED_MIB = 64  # that a pass with the check may take above the activations
UNCHECKED = 0.02  # of the weights, without it

pytestmark = pytest.mark.skipif(not hasattr(fk, "GroupFisher"), reason="this fishkern has no GroupFisher")


def estimators() -> dict[str, object]:
    """By the names of the records; ``fishkern`` is the Fisher of rows, against which the others are measured."""
    return {"fishkern": fk.GroupFisher(by="row"), "layer": fk.GroupFisher(by="layer"), "diagonal": fk.DiagonalFisher()}


def description(case: Workload, name: str, quantity: str) -> Record:
    """The fields of a record other than its figures."""
    shared = {"op": "group_fisher", "quantity": quantity, "case": case.fields, "attention": "sdpa", "dtype": case.dtype}
    return {**shared, "provider": name, "by": "row" if name == "fishkern" else name}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_time(case, benchmark, record):
    model, data = case.model(), case.data()
    timed = {
        name: partial(seconds_of, partial(fk.estimate, model, data, estimator))
        for name, estimator in estimators().items()
    }
    seconds = in_turns(benchmark, timed, ROUNDS)
    for name, values in seconds.items():
        record("group_fisher", {**description(case, name, "time"), "seconds": spread(values), "rounds": ROUNDS})
    slowest = NEVER_SLOWER * median(seconds["diagonal"])
    assert [name for name, values in seconds.items() if median(values) > slowest] == []


@pytest.mark.parametrize("check", [True, False], ids=["checked", "unchecked"])
@pytest.mark.parametrize("provider", ["fishkern", "layer", "diagonal"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_peak_memory(case, provider, check, record):
    figures = in_process("benchmarks.cases.group_fisher:memory", provider, case, {"check": check})
    record("group_fisher", {**description(case, provider, "memory"), "check": check, **figures})
    if provider != "diagonal":
        allowed = CHECKED_MIB if check else UNCHECKED * figures["weights_mib"]
        assert figures["peak_mib"] <= figures["activations_mib"] + allowed


def memory(provider: str, case: Workload, options: Record) -> Record:
    """Weights, activations, and the peak of a pass with options of ``estimate``, above the loaded model."""
    model, data = case.model(), case.data()
    tiny = Workload(LLAMA_TINY, T=4, N=2, batches=1)
    fk.estimate(tiny.model(), tiny.data(), estimators()[provider])  # libraries are loaded and allocate on first use
    figures = {"weights_mib": weights_mib(model), "activations_mib": kept_mib(model, data[0])}
    run = partial(fk.estimate, model, data, estimators()[provider], **options)
    return rounded({**figures, "peak_mib": peak_mib(run)})
