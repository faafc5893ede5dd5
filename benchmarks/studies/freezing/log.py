"""The table of a comparison of freezing, and how many entries our arm kept."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from benchmarks.studies.comparing.runs import Log, Step, end, spread
from benchmarks.studies.freezing.arms import OURS


class FreezingLog(Log):
    """The runs of one setting and model."""

    def kept(self, lr: float, seed: int) -> list[int]:
        """Entries that our arm kept after each event, with the same seed and, where it ran, the same learning rate.

        Raises:
            LookupError: It has not run with this seed.
        """
        record = self.find(Step(OURS, lr, seed)) or self.find(Step(OURS, None, seed))
        if record is None:
            raise LookupError(f"a control keeps as many entries as {OURS}: run that with seed {seed} first")
        return [event["kept"] for event in record["events"]]

    def table(self, arms: Sequence[str], seeds: int) -> str:
        """Mean and spread over seeds of what is measured at the end; what is kept, lost at an event, and saved."""
        ran, planned = self.ran(arms, seeds)
        shifts = ("inverted", "blurred", "noisy") if self.setting.task == "nuclei" else ()
        heads = "".join(f"{figure:>18}" for figure in ("score", *shifts, "nll"))
        lines = [
            f"{self.setting.task}: {ran} of {planned} runs",
            f"{'arm':16} {'lr':>8} {'seeds':>5} {'kept':>7}{heads} {'shock':>8} {'s/step':>13} "
            f"{'seconds':>8} {'peak':>7}",
        ]
        for arm in arms:
            if records := self.of(arm, seeds):
                lines.append(self._line(arm, records, ("score", *shifts, "nll")))
        return "\n".join([*lines, *NOTES])

    def _line(self, arm: str, records: Sequence[dict], figures: Sequence[str]) -> str:
        values = "".join(f"{spread([end(record)[figure] for record in records]):>18}" for figure in figures)
        kept = statistics.mean(record["kept"] / record["trained"] for record in records)
        first, last = (statistics.median(r["events"][n]["seconds_a_step"] for r in records) for n in (0, -1))
        seconds = statistics.median(record["seconds"] for record in records)
        peak = statistics.mean(record["events"][-1]["peak_mib"] for record in records)
        edge = self.mark(arm)
        return (
            f"{arm:16} {records[0]['lr']:7.0e}{edge} {len(records):5} {kept:7.1%}{values} {shock(records):8.4f}"
            f" {first:6.3f}{last:7.3f} {seconds:8.1f} {peak:7.0f}"
        )


NOTES = (
    "* the best rate is the smallest or the largest that was tried",
    "kept: of all entries, at the end; shock: the largest fall of the score after an event, mean over seeds;",
    "s/step: before the first event and before the last; peak: MiB that a step after the last event takes at most",
)


def shock(records: Sequence[dict]) -> float:
    """By how much the score falls around the worst event of a run, the mean over runs."""
    measured = [[event for event in record["events"] if event.get("after") is not None] for record in records]
    return statistics.mean(
        max((event["before"] - event["after"] for event in events), default=0.0) for events in measured
    )
