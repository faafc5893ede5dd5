"""The runs of a comparison of arms, the order in which they are made, and their records.

Each arm chooses its learning rate among as many as the others, on a seed and on rows of its own, and then runs with
the same seeds as all others.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.engine.origin import origin
from benchmarks.engine.records import Record, Records

CHOOSING_SEED = 1000  # of the runs that choose the learning rate
EARLY_SEEDS = 3  # before the arms after the first ones
STAGES = 3
FIRST = 6  # arms that run before all others

Rates = Callable[[str], Sequence[float]]
"""From an arm to the learning rates that it tries."""


class Step(NamedTuple):
    """One run; ``lr`` is None for the rate that the arm has chosen."""

    arm: str
    lr: float | None
    seed: int


def stages(arms: Sequence[str], rates: Rates, seeds: int) -> list[list[Step]]:
    """All runs, the most important first. Every arm has the same seeds.

    The first stage is that of the first arms: each chooses its rate, then they run with three seeds, one seed after the
    other. The second is the same of the further arms, arm by arm. The third has the other seeds of all arms.
    """
    early = min(EARLY_SEEDS, seeds)

    def of(group: Sequence[str]) -> Iterator[Step]:
        yield from (Step(arm, lr, CHOOSING_SEED) for arm in group for lr in rates(arm))
        yield from (Step(arm, None, seed) for seed in range(early) for arm in group)

    further = [step for arm in arms[FIRST:] for step in of([arm])]
    late = [Step(arm, None, seed) for seed in range(early, seeds) for arm in arms]
    return [list(of(arms[:FIRST])), further, late]


def plan(arms: Sequence[str], rates: Rates, seeds: int) -> list[Step]:
    """All runs of all stages in their order."""
    return list(itertools.chain.from_iterable(stages(arms, rates, seeds)))


class Log:
    """The runs of one setting and model; a run that is there is not repeated.

    Args:
        path: Of the records.
        study: Name of the comparison.
        setting: What all arms share, a dataclass.
        model: Name of the model.
        revision: Of the sources, where there is no git.
    """

    def __init__(self, path: Path, study: str, setting: Any, model: str, revision: str | None = None) -> None:
        self.setting = setting
        about = {"study": study, "quantity": "run", "setting": asdict(setting), "model": model}
        self._records = Records(path, origin=partial(origin, revision), **about)

    def rates(self, arm: str) -> Sequence[float]:
        """The learning rates that an arm tries: those of the setting, where it has the same for all."""
        return self.setting.rates

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
        tried = [self.find(Step(arm, lr, CHOOSING_SEED)) for lr in sorted(self.rates(arm))]
        if None in tried:
            return None
        return max(tried, key=lambda record: _choice(record))["lr"]

    def of(self, arm: str, seeds: int) -> list[Record]:
        """The runs of an arm at its chosen rate, in the order of their seeds."""
        records = [self.find(Step(arm, None, seed)) for seed in range(seeds)]
        return [record for record in records if record is not None]

    def ran(self, arms: Sequence[str], seeds: int) -> tuple[int, int]:
        """How many of how many runs there are."""
        steps = plan(arms, self.rates, seeds)
        return sum(self.find(step) is not None for step in steps), len(steps)

    def mark(self, arm: str) -> str:
        """A star where the chosen rate is the smallest or the largest of those that were tried."""
        tried = self.rates(arm)
        return "*" if self.best_rate(arm) in (min(tried), max(tried)) else " "


def end(record: Record) -> Record:
    """What was measured at the end of training; NaN where training diverged."""
    return {name: float("nan") if value is None else value for name, value in record["curve"][-1].items()}


def _choice(record: Record) -> tuple[float, float]:
    last = record["curve"][-1]
    values = last["choice"], None if last["nll"] is None else -last["nll"]
    return tuple(float("-inf") if value is None else value for value in values)


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.4f} +- {deviation:.4f}"
