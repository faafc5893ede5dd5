"""The table of a comparison of starts."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from benchmarks.studies.comparing.runs import Log, end, spread


class StartsLog(Log):
    """The runs of one setting and model."""

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
            edge = self.mark(arm)
            lines.append(
                f"{arm:16} {records[0]['lr']:7.0e}{edge} {len(records):5} {records[0]['trained']:8,}{values}"
                f" {error:8.1e} {starting:7.2f} {seconds:8.1f}"
            )
        return "\n".join([*lines, "* the best rate is the smallest or the largest that was tried"])
