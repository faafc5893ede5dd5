"""What stops during ``fishkern tune --method fisher-adaptune``: a line for each decision, and its checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import Tensor, nn

import fishkern as fk
from fishkern.commands.freezing_options import Freezing
from fishkern.commands.output import Stopwatch
from fishkern.commands.resuming import State
from fishkern.freezing.saved import FreezerState
from fishkern.names import listed
from fishkern.optim import MaskedOptimizer
from fishkern.report import cells_of
from fishkern.report.tables import events_table

FILE = "freezer.safetensors"

_MIB = 2**20
_WIDTHS = (8, 16, 26, 16)
_HEADINGS = ("step", "slices stopped", "entries left of all", "optimizer state", "gradients no longer computed")


class Stopping:
    """A freezer during a run, which tells of each decision.

    Args:
        model: The model with its adapter.
        probe: What the Fisher information is read on.
        optimizer: Moves what is in training.
        options: When something stops, and what.
        steps: Of the whole training.
        stopwatch: Counts the seconds that reading and deciding take, as part of the training.

    Attributes:
        freezer: The freezer.
        events: Each decision so far, as plain values.
        times: Steps from one reading to the next, and from one decision to the next.
    """

    def __init__(
        self,
        model: nn.Module,
        probe: Sequence[Mapping[str, Tensor]],
        optimizer: MaskedOptimizer,
        options: Freezing,
        steps: int,
        stopwatch: Stopwatch,
    ) -> None:
        self.times = options.times(steps)
        self.events: list[dict[str, Any]] = []
        self._told, self._stopwatch = False, stopwatch
        read_every, every = self.times
        self.freezer = fk.fisher_adaptune(
            model,
            probe,
            optimizer=optimizer,
            every=every,
            read_every=read_every,
            rule=options.rule_for(optimizer.selection.names),
            slices=options.cut,
        )

    def step(self) -> None:
        """Count a step of the optimizer; read and decide where that is due, and tell of a decision."""
        with self._stopwatch.adding("reading"):
            event = self.freezer.step()
        if event is None:
            return
        self.events.append(_plain(event, self.freezer.initial.count))
        # print, and not a console of rich's, which would write into the bar that shows the progress
        if not self._told:
            print(_line(_HEADINGS), file=sys.stderr)
            self._told = True
        numbers, places = _numbers(self.events[-1]), cells_of(self.freezer.initial.names)
        stopped = [f"{place.layer or ''} {place.module}".strip() for place in map(places.__getitem__, event.stopped)]
        print(_line((*numbers, listed(stopped) or "none")), file=sys.stderr)

    def state(self) -> State:
        """Return what the rest of the training depends on, as plain values and tensors."""
        return {"freezer": self.freezer.state_dict(), "events": self.events}

    def resume(self, state: State) -> None:
        """Go on from a state.

        Args:
            state: What :meth:`state` returned. The optimizer is of the entries that were in training then, and has its
                own state back.
        """
        self.freezer.load_state_dict(state["freezer"])
        self.events = list(state["events"])

    def save(self, folder: Path) -> None:
        """Save the freezer, and what is left in training in place of what was at first.

        Args:
            folder: The folder of the run.
        """
        self.freezer.save(folder / FILE)
        self.freezer.selection.save(folder / "selection.safetensors")

    def report(self) -> dict[str, Any]:
        """Return what the report of the run says of it."""
        read_every, every = self.times
        left = self.freezer.selection.count
        return {"read_every": read_every, "freeze_every": every, "left": left, "events": self.events}


def selections_in(state: State) -> tuple[fk.Selection, fk.Selection]:
    """Read from a checkpoint what was in training.

    Args:
        state: What :meth:`Stopping.state` returned.

    Returns:
        What was in training at first, and what was when the state was kept.

    Raises:
        ValueError: It is damaged.
    """
    saved = FreezerState.from_plain(state["freezer"])
    return saved.initial, saved.selection


def decisions_table(events: Sequence[Mapping[str, Any]]) -> Table:
    """Show each decision of a run.

    Args:
        events: From its report.

    Returns:
        The table.
    """
    rows = [(*_numbers(event), f"{len(event['gradients_stopped']):,}") for event in events]
    return events_table(rows, _HEADINGS)


def _plain(event: fk.Freezing, at_first: int) -> dict[str, Any]:
    return {
        "step": event.step,
        "slices": len(event.scores),
        "slices_stopped": len(event.frozen),
        "entries_stopped": event.entries_frozen,
        "entries_left": event.entries_kept,
        "entries_at_first": at_first,
        "state_bytes": event.state_bytes,
        "gradients_stopped": list(event.stopped),
    }


def _numbers(event: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        f"{event['step']:,}",
        f"{event['slices_stopped']:,} of {event['slices']:,}",
        f"{event['entries_left']:,} of {event['entries_at_first']:,}",
        f"{event['state_bytes'] / _MIB:,.3g} MiB",
    )


def _line(cells: Sequence[str]) -> str:
    *numbers, last = cells
    return "  ".join([*(f"{cell:>{width}}" for cell, width in zip(numbers, _WIDTHS, strict=True)), last])
