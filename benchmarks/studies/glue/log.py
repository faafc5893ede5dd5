"""The runs of the comparison on GLUE, and tables of them."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.engine.records import Record, Records
from benchmarks.studies.glue.setting import Setting

CHOOSING_SEED = 1000  # of the runs that choose the learning rate; their scores are not averaged


class Log:
    """The runs of one setting and encoder; a run that is there is not repeated."""

    def __init__(self, path: Path, setting: Setting, encoder: str) -> None:
        self._setting = setting
        self._records = Records(path, setting=asdict(setting), encoder=encoder)

    def find(self, arm: str, lr: float, seed: int) -> Record | None:
        return next(iter(self._records.find(arm=arm, lr=lr, seed=seed)), None)

    def run(self, arm: str, lr: float, seed: int, work: Callable[[], Record]) -> None:
        if self.find(arm, lr, seed):
            return
        print(f"{self._setting.task}: {arm}, lr {lr:g}, seed {seed}", file=sys.stderr, flush=True)
        self._records.append({"arm": arm, "lr": lr, "seed": seed, **work()})

    def best_rate(self, arm: str) -> float:
        """The learning rate of an arm with the best score; the smallest of equally good ones."""
        return max(self._setting.rates, key=lambda lr: self.find(arm, lr, CHOOSING_SEED)["score"])

    def of(self, arm: str, seeds: int) -> list[Record]:
        return [self.find(arm, self.best_rate(arm), seed) for seed in range(seeds)]

    def table(self, arms: Sequence[str], seeds: int) -> str:
        """Mean and spread over seeds, the paired difference from fish, and what the selection costs."""
        lines = [f"{'arm':9} {'lr':>8} {'trained':>8} {'score':>16} {'fish - arm':>16} {'seconds':>8} {'selection':>9}"]
        for arm in arms:
            records = self.of(arm, seeds)
            gap = ""
            if "fish" in arms and arm != "fish":
                pairs = zip(self.of("fish", seeds), records, strict=True)
                gap = spread([fish["score"] - other["score"] for fish, other in pairs])
            score = spread([record["score"] for record in records])
            seconds, selecting = (statistics.median(r[key] for r in records) for key in ("seconds", "selecting"))
            lr, trained = records[0]["lr"], records[0]["trained"]
            lines.append(f"{arm:9} {lr:8.1e} {trained:8,} {score:>16} {gap:>16} {seconds:8.1f} {selecting:9.1f}")
        return "\n".join(lines)


def averages(logs: Sequence[Log], arms: Sequence[str], seeds: int) -> str:
    """Of each arm over the tasks, seed by seed."""
    lines = [f"average of {len(logs)} task{'s' * (len(logs) > 1)}, WNLI left out"]
    for arm in arms:
        scores = zip(*([record["score"] for record in log.of(arm, seeds)] for log in logs), strict=True)
        lines.append(f"{arm:10} {spread([statistics.mean(values) for values in scores]):>16}")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):.2f} +- {100 * deviation:.2f}"
