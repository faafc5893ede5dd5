"""What a freezer has stopped: its events, and the entries that stay in training by layer and type of module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fishkern.files import in_brief
from fishkern.freezing import Key
from fishkern.freezing.saved import FreezerState
from fishkern.report.grouped import Grouped


@dataclass(frozen=True)
class Stop:
    """An event at which something stopped, as the readings tell it.

    Attributes:
        step: The step of the last reading before it.
        slices: The slices that stopped.
        entries: How many entries stopped.
        left: How many entries stayed.
    """

    step: int
    slices: tuple[Key, ...]
    entries: int
    left: int


@dataclass
class FrozenPart:
    """What is in training of one part of a model.

    Attributes:
        entries: How many entries were in training at first.
        kept: How many still are.
        slices: How many slices have been followed.
        stopped: How many of these have stopped.
    """

    entries: int = 0
    kept: int = 0
    slices: int = 0
    stopped: int = 0

    def add(self, other: FrozenPart) -> None:
        """Add another part to this one.

        Args:
            other: The other part.
        """
        for name in ("entries", "kept", "slices", "stopped"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass
class FreezerSummary(Grouped[FrozenPart]):
    """The result of :func:`summarise_freezer`.

    Attributes:
        steps: Steps of the readings, ascending.
        kept: Entries in training after each reading, and after the event that followed it, if one did.
        scores: By followed slice, in the order of the pool: its score at each reading, ``None`` where it had none.
        events: Those at which something stopped.
        end: Steps that were counted in all.
    """

    steps: list[int]
    kept: list[int]
    scores: dict[Key, list[float | None]]
    events: list[Stop]
    end: int

    @property
    def stopped(self) -> dict[Key, int]:
        """The step of the last reading before it stopped, of each slice that has."""
        return {key: event.step for event in self.events for key in event.slices}

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain values.

        Returns:
            Dictionaries and numbers, for JSON.
        """
        slices: dict[str, list[dict[str, Any]]] = {}
        stopped = self.stopped
        for (name, number), scores in self.scores.items():
            slices.setdefault(name, []).append(
                {"slice": number, "scores": scores, "stopped_after": stopped.get((name, number))}
            )
        return {
            "steps": self.steps,
            "kept": self.kept,
            "events": [
                {"step": one.step, "slices": len(one.slices), "entries": one.entries, "left": one.left}
                for one in self.events
            ],
            "slices": slices,
            **super().to_dict(),
        }


def summarise_freezer(state: FreezerState) -> FreezerSummary:
    """Read out of a freezer's state what has stopped, and when.

    Events are told by what is missing at the next reading: decisions at which nothing stopped are not among them. A
    slice that was zero everywhere at every reading has no score and is not among the slices.

    Args:
        state: What a freezer has saved.

    Returns:
        The summary.

    Raises:
        ValueError: The state follows a parameter that its pool has not.
    """
    history = state.history
    followed = {key for read in history for key in read.scores}
    at_first, now = state.initial.counts, state.selection.counts
    order = {name: place for place, name in enumerate(at_first) if at_first[name]}
    if strange := [name for name, _ in followed if name not in order]:
        raise ValueError(f"the freezer is damaged: it follows {in_brief(min(strange), 80)}, which is not in its pool.")
    keys = sorted(followed, key=lambda key: (order[key[0]], key[1]))
    kept = [*(read.kept for read in history[1:]), state.selection.count] if history else []
    going = [*(read.scores.keys() for read in history[1:]), state.tracks.keys()]
    events = []
    for read, left, on in zip(history, kept, going, strict=False):
        if left != read.kept:
            missing = read.scores.keys() - on
            events.append(Stop(read.step, tuple(key for key in keys if key in missing), read.kept - left, left))
    gone = {key for event in events for key in event.slices}
    parts = {name: FrozenPart(at_first[name], now[name]) for name in order}
    for key in keys:
        parts[key[0]].add(FrozenPart(slices=1, stopped=int(key in gone)))
    scores = {key: [read.scores.get(key) for read in history] for key in keys}
    return FreezerSummary(FrozenPart, parts, [read.step for read in history], kept, scores, events, state.count)
