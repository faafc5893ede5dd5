"""The operations beside processes that keep the cores busy, against the time of one thread on an idle machine.

A parallel region ends when its slowest thread does, and a thread that shares its core with another process is slow. So
an operation of many small regions can lose much more than the share of the machine that is gone. All providers and
loads take turns within each round.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

import pytest
import torch

from benchmarks.engine.records import Record
from benchmarks.engine.turns import Run, seconds_of, spread
from benchmarks.rivals.providers import MASKED, PASSES, TOPK, runs
from benchmarks.subjects.masks import MaskedStep
from benchmarks.subjects.neighbours import neighbours, threads
from benchmarks.subjects.scores import TopK
from benchmarks.subjects.transformers import Workload, small_llama

TESTS = {
    "run": ["tests/benchmarks/test_busy_case.py", "tests/ops/test_streaming_topk.py", "tests/laws/test_optimizers.py"]
}
ROUNDS = 5
MOST = 2.5  # of the time of one thread on an idle machine, beside one busy process


@dataclass(frozen=True)
class Load:
    """What an operation runs with.

    Args:
        neighbours: Busy processes beside it.
        one_thread: Whether torch has one thread, in place of one for each core.
    """

    neighbours: int
    one_thread: bool = False

    def measured(self, run: Run) -> float:
        """The seconds of one call under this load."""
        with neighbours(self.neighbours), threads(1 if self.one_thread else torch.get_num_threads()):
            return seconds_of(run)


ALONE, BESIDE_ONE = Load(0, one_thread=True), Load(1)
LOADS = (Load(0), ALONE, BESIDE_ONE, Load(1, one_thread=True), Load(2), Load(2, one_thread=True))


def topk(case: TopK) -> dict[str, Run]:
    scores = case.scores()
    return {name: partial(run, scores, case.k) for name, run in runs(TOPK, "fishkern", "sampled_threshold").items()}


def step(case: MaskedStep) -> dict[str, Run]:
    trained = case.trained()
    selection = case.selection(trained)
    return {name: make(trained, selection) for name, make in runs(MASKED, "fishkern", "six_lines").items()}


def passing(case: Workload) -> dict[str, Run]:
    model, data = case.model(), case.data(mask=True)
    return {name: partial(run, model, data) for name, run in runs(PASSES, "fishkern", "one_by_one").items()}


# By the name of the operation, what makes its providers, and the case.
WORK: dict[str, tuple[Callable[..., dict[str, Run]], object]] = {
    "streaming_topk": (topk, TopK(10**8, blocks=50)),
    "masked_adamw": (step, MaskedStep("llama", 0.005)),
    "masked_adamw, lora": (step, MaskedStep("lora", 0.05)),
    "whole_pass": (passing, Workload(small_llama(4, 256), T=64, batches=4)),
}


@pytest.mark.parametrize("name", WORK)
def test_beside_others(name, benchmark, record):
    make, case = WORK[name]
    seconds = measured(make(case), benchmark)
    for (provider, load), values in seconds.items():
        record("busy", {**description(name, case, provider, load), "seconds": spread(values), "rounds": len(values)})
    alone, beside = (median(seconds["fishkern", load]) for load in (ALONE, BESIDE_ONE))
    assert beside <= MOST * alone, f"{beside:.3f} s beside one busy process, {alone:.3f} s with one thread alone"


def measured(providers: dict[str, Run], benchmark, rounds: int = ROUNDS) -> dict[tuple[str, Load], list[float]]:
    """The seconds of every provider under every load, round by round."""
    seconds: dict[tuple[str, Load], list[float]] = {(name, load): [] for load in LOADS for name in providers}
    for run in providers.values():
        run()  # which makes states, and the libraries' first allocations

    def take_turns() -> None:
        for (name, load), values in seconds.items():
            values.append(load.measured(providers[name]))

    benchmark.pedantic(take_turns, rounds=rounds)
    return seconds


def description(name: str, case: object, provider: str, load: Load) -> Record:
    """The fields of a record other than its figures."""
    fields = {"op": name, "quantity": "time", "case": str(case), "dtype": "float32", "provider": provider}
    return {**fields, "neighbours": load.neighbours, "one_thread": load.one_thread}
