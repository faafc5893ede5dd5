"""Whole Fisher pass on a CPU, against the batch-size-1 loop and ``vmap(grad)``: time and peak memory.

All providers take turns within each round, so that a machine that slows down slows all of them. What is measured is
recorded first and judged then: ours is never slower than the loop, and keeps within the memory that a pass must have.
"""

from __future__ import annotations

from functools import partial
from statistics import median
from typing import Any

import pytest

from benchmarks.cases import CPU_CASES, WholePass
from benchmarks.memory import peak_memory
from benchmarks.providers import PROVIDERS
from benchmarks.turns import in_turns, seconds_of, spread

TESTS = ["tests/models/test_families.py", "tests/models/test_conditions.py"]
ROUNDS = 3
NEVER_SLOWER = 1.05  # of the loop's median time
MEMORY = 1.3  # of model, accumulators and the activations of the batch
COMPARED = {str(case): ["fishkern", "one_by_one"] for case in CPU_CASES[:2]}  # by `python -m benchmarks compare`


def prepare(described: str, provider: str) -> partial:
    """Make one of :data:`COMPARED`."""
    (case,) = (case for case in CPU_CASES if str(case) == described)
    return partial(PROVIDERS[provider], case.model(), case.data())


def description(case: WholePass, name: str, quantity: str) -> dict[str, Any]:
    """What each record of a provider says beside the measurement."""
    return {
        "op": "whole_pass",
        "quantity": quantity,
        "case": vars(case),
        "attention": "sdpa",
        "dtype": "float32",
        "provider": name,
    }


@pytest.mark.parametrize("case", CPU_CASES, ids=str)
def test_time(case, benchmark, record):
    model, data = case.model(), case.data()
    timed = {name: partial(seconds_of, partial(provider, model, data)) for name, provider in PROVIDERS.items()}
    seconds = in_turns(benchmark, timed, ROUNDS)
    for name, values in seconds.items():
        record("whole_pass", {**description(case, name, "time"), "seconds": spread(values), "rounds": ROUNDS})
    assert median(seconds["fishkern"]) <= NEVER_SLOWER * median(seconds["one_by_one"])


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CPU_CASES, ids=str)
def test_peak_memory(case, provider, record):
    figures = peak_memory(provider, case)
    record("whole_pass", {**description(case, provider, "memory"), **figures})
    if provider == "fishkern":
        weights, activations = figures["weights_mib"], figures["activations_mib"]
        assert weights + figures["peak_mib"] <= MEMORY * (2 * weights + activations)
