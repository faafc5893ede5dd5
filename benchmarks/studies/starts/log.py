"""The runs of a comparison of starts, the order in which they are made, and tables of them."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

from benchmarks.engine.origin import origin
from benchmarks.engine.records import Record, Records
from benchmarks.studies.starts.arms import FIRST
from benchmarks.studies.starts.setting import Setting

CHOOSING_SEED = 1000  # of the runs that choose the learning rate
EARLY_SEEDS = 3  # before the arms after the first ones


class Step(NamedTuple):
    """One run; ``lr`` is None for the rate that the arm has chosen."""

    arm: str
    lr: float | None
    seed: int


def stages(arms: Sequence[str], rates: Sequence[float], seeds: int) -> list[list[Step]]:
    """All runs, the most important first. Every arm has the same rates and the same seeds.

    The first stage is that of the first arms: each chooses its rate, then they run with three seeds, one seed after the
    other. The second is the same of the further arms, arm by arm. The third has the other seeds of all arms.
    """
    early = min(EARLY_SEEDS, seeds)

    def of(group: Sequence[str]) -> Iterator[Step]:
        yield from (Step(arm, lr, CHOOSING_SEED) for arm in group for lr in rates)
        yield from (Step(arm, None, seed) for seed in range(early) for arm in group)

    further = [step for arm in arms[FIRST:] for step in of([arm])]
    late = [Step(arm, None, seed) for seed in range(early, seeds) for arm in arms]
    return [list(of(arms[:FIRST])), further, late]


def plan(arms: Sequence[str], rates: Sequence[float], seeds: int) -> list[Step]:
    """All runs of all stages in their order."""
    return list(itertools.chain.from_iterable(stages(arms, rates, seeds)))


class Log:
    """The runs of one setting and model; a run that is there is not repeated."""

    def __init__(self, path: Path, setting: Setting, model: str, revision: str | None = None) -> None:
        self.setting = setting
        about = {"study": "starts", "quantity": "run", "setting": asdict(setting), "model": model}
        self._records = Records(path, origin=partial(origin, revision), **about)

    def find(self, step: Step) -> Record | None:
        """The record of a run; of one with the chosen rate only if that is chosen."""
        lr = self.best_rate(step.arm) if step.lr is None else step.lr
        if lr is None:
            return None
        return next(iter(self._records.find(arm=step.arm, lr=lr, seed=step.seed)), None)

    def append(self, step: Step, measured: Record) -> None:
        self._records.append({"arm": step.arm, "lr": step.lr, "seed": step.seed, **measured})

    def best_rate(self, arm: str) -> float | None:
        """The rate that was best where rates are chosen; None before all ran.

        Of equal scores, such as those of classifiers that always answer the same, the one of least loss wins.
        """
        tried = [self.find(Step(arm, lr, CHOOSING_SEED)) for lr in sorted(self.setting.rates)]
        if None in tried:
            return None
        return max(tried, key=lambda record: _choice(record))["lr"]

    def of(self, arm: str, seeds: int) -> list[Record]:
        """The runs of an arm at its chosen rate, in the order of their seeds."""
        found = [self.find(Step(arm, None, seed)) for seed in range(seeds)]
        return [record for record in found if record is not None]

    def ran(self, arms: Sequence[str], seeds: int) -> tuple[int, int]:
        """How many of how many runs there are."""
        steps = plan(arms, self.setting.rates, seeds)
        return sum(self.find(step) is not None for step in steps), len(steps)

    def table(self, arms: Sequence[str], seeds: int) -> str:
        """Mean and spread over seeds of what is measured at the end, with the cost of the start."""
        ran, planned = self.ran(arms, seeds)
        figures = ("nll", "story_nll", "kl") if self.setting.stories else ("score", "nll")
        heads = "".join(f"{figure:>18}" for figure in figures)
        lines = [
            f"{self.setting.task}: {ran} of {planned} runs",
            f"{'arm':16} {'lr':>8} {'seeds':>5} {'trained':>8}{heads} {'step 0':>8} {'start':>7} {'seconds':>8}",
        ]
        for arm in arms:
            if not (records := self.of(arm, seeds)):
                continue
            values = "".join(f"{spread([end(record)[figure] for record in records]):>18}" for figure in figures)
            starting, seconds = (statistics.median(r[key] for r in records) for key in ("starting", "seconds"))
            error = max(record["step_0_error"] for record in records)
            edge = "*" if records[0]["lr"] in (min(self.setting.rates), max(self.setting.rates)) else " "
            lines.append(
                f"{arm:16} {records[0]['lr']:7.0e}{edge} {len(records):5} {records[0]['trained']:8,}{values}"
                f" {error:8.1e} {starting:7.2f} {seconds:8.1f}"
            )
        return "\n".join([*lines, "* the best rate is the smallest or the largest that was tried"])


def end(record: Record) -> Record:
    """What was measured at the end of training; NaN where training diverged."""
    return {name: float("nan") if value is None else value for name, value in record["curve"][-1].items()}


def _choice(record: Record) -> tuple[float, float]:
    last = record["curve"][-1]
    values = last["choice"], None if last["nll"] is None else -last["nll"]
    return tuple(float("-inf") if value is None else value for value in values)


def spread(values: Sequence[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.4f} +- {deviation:.4f}"
