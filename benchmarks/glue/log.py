"""The runs of the comparison on GLUE that are there, and what they say."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.glue.setting import Setting
from benchmarks.provenance import machine, software

CHOOSING_SEED = 1000  # of the runs that choose the learning rate; their scores are not averaged


class Log:
    """One line for each run; what is there is not run again."""

    def __init__(self, path: Path, setting: Setting, encoder: str) -> None:
        self._path, self._setting = path, setting
        self._shared: dict[str, Any] = {"setting": asdict(setting), "encoder": encoder}
        lines = path.read_text().splitlines() if path.exists() else []
        records = [json.loads(line) for line in lines]
        self._records = [record for record in records if all(record[key] == self._shared[key] for key in self._shared)]

    def find(self, arm: str, lr: float, seed: int) -> dict[str, Any] | None:
        key = {"arm": arm, "lr": lr, "seed": seed}
        return next((record for record in self._records if all(record[k] == v for k, v in key.items())), None)

    def run(self, arm: str, lr: float, seed: int, work: Callable[[], dict[str, Any]]) -> None:
        if self.find(arm, lr, seed):
            return
        print(f"{self._setting.task}: {arm}, lr {lr:g}, seed {seed}", file=sys.stderr, flush=True)
        record = {**self._shared, "arm": arm, "lr": lr, "seed": seed, **work(), **machine(), **software()}
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self._records.append(record)

    def chosen(self, arm: str) -> float:
        """The learning rate of an arm; the smallest of equally good ones."""
        return max(self._setting.rates, key=lambda lr: self.find(arm, lr, CHOOSING_SEED)["score"])

    def of(self, arm: str, seeds: int) -> list[dict[str, Any]]:
        return [self.find(arm, self.chosen(arm), seed) for seed in range(seeds)]

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
