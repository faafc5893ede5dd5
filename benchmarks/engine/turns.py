"""Timing in turns: a machine that slows down then slows every provider."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

Run = Callable[[], object]
T = TypeVar("T")


def in_turns(
    benchmark: BenchmarkFixture, timed: Mapping[str, Callable[[], float]], rounds: int
) -> dict[str, list[float]]:
    """Run every provider once in each round, ``fishkern`` last.

    Args:
        benchmark: pytest-benchmark's fixture; its table shows ``fishkern``, with the medians of the others.
        timed: By provider, ``fishkern`` among them, a function that runs once and returns its seconds.
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


def there_and_back(runs: Mapping[str, T], rounds: int, measure: Callable[[T], float]) -> dict[str, list[float]]:
    """Measure each once a round, in the order of the round before backwards."""
    values: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        for name in list(runs)[:: -1 if number % 2 else 1]:
            values[name].append(measure(runs[name]))
    return values


def seconds_of(run: Run) -> float:
    """The wall-clock time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def spread(values: list[float]) -> dict[str, float]:
    """The figures of a record from those of all rounds."""
    return {"median": median(values), "min": min(values), "max": max(values)}
