"""The table of a comparison of TR-PTS."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from benchmarks.engine.records import Record
from benchmarks.studies.comparing.runs import Log, end, spread
from benchmarks.studies.tr_pts.arms import ARMS


class TrPtsLog(Log):
    """The runs of one setting and model."""

    def rates(self, arm: str) -> Sequence[float]:
        return self.setting.rates[ARMS[arm].rates]

    def table(self, arms: Sequence[str], seeds: int) -> str:
        """Mean and spread over seeds of what is measured at the end, and what training and evaluation cost."""
        ran, planned = self.ran(arms, seeds)
        lines = [
            f"{self.setting.task}: {ran} of {planned} runs",
            f"{'arm':12} {'lr':>8} {'seeds':>5} {'trained':>8} {'accuracy':>18} {'nll':>18} {'GFLOP':>6} {'a step':>7}"
            f" {'ms':>6} {'s/step':>7} {'ranking':>8} {'seconds':>8} {'peak':>6} {'state':>6}",
        ]
        lines += [self._line(arm, records) for arm in arms if (records := self.of(arm, seeds))]
        return "\n".join([*lines, *NOTES])

    def _line(self, arm: str, records: Sequence[Record]) -> str:
        score, loss = (spread([end(record)[figure] for record in records]) for figure in ("score", "nll"))
        trained = statistics.mean(record["trained"] / record["of"] for record in records)
        forward, step = (1e-9 * statistics.mean(record["flops"][part] for record in records) for part in PARTS)
        image, a_step, ranking, seconds, peak, state = (
            statistics.median(record[key] for record in records)
            for key in ("seconds_an_image", "seconds_a_step", "ranking", "seconds", "peak_mib", "state_mib")
        )
        return (
            f"{arm:12} {records[0]['lr']:7.0e}{self.mark(arm)} {len(records):5} {trained:8.2%} {score:>18} {loss:>18}"
            f" {forward:6.2f} {step:7.2f} {1e3 * image:6.2f} {a_step:7.3f} {ranking:8.1f} {seconds:8.1f} {peak:6.0f}"
            f" {state:6.1f}"
        )


PARTS = ("forward", "step")
NOTES = (
    "* the best rate is the smallest or the largest that was tried",
    "GFLOP: counted, of an image's forward pass and of its part in a training step; ms: of an evaluated image;",
    "seconds: ranking and training; state: of the optimizer, MiB; peak: of a step, MiB above weights and that",
)
