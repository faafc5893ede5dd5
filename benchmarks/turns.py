"""Timing in turns, so that a machine that slows down slows every provider, and what is recorded of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture


def in_turns(
    benchmark: BenchmarkFixture, timed: Mapping[str, Callable[[], float]], rounds: int
) -> dict[str, list[float]]:
    """Run every provider once in each round.

    Args:
        benchmark: pytest-benchmark's fixture, which shows ``fishkern`` in its table, and the others' medians beside it.
        timed: By provider, ``fishkern`` among them, what runs once and returns its seconds.
        rounds: How often.

    Returns:
        The seconds of each, round by round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in timed}

    def others() -> None:
        for name, run in timed.items():
            if name != "fishkern":
                seconds[name].append(run())

    benchmark.pedantic(lambda: seconds["fishkern"].append(timed["fishkern"]()), setup=others, rounds=rounds)
    benchmark.extra_info |= {name: round(median(values), 4) for name, values in seconds.items()}
    return seconds


def seconds_of(run: Callable[[], object]) -> float:
    """The wall-clock time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def spread(values: list[float]) -> dict[str, float]:
    """What a record says of the seconds of all rounds."""
    return {"median": median(values), "min": min(values), "max": max(values)}
