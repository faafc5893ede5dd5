"""The result of one decision of a freezer: what stops, what stays, and what that saves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fishkern.freezing.slices import Key
from fishkern.selection import Selection
from fishkern.statistics.pass_plan import bytes_in_words


@dataclass(frozen=True, repr=False)
class Freezing:
    """One decision: which slices stop training. Frozen.

    Attributes:
        step: Steps of the optimizer that were done before it.
        number: The number of the event, from 1.
        scores: The drift's score of each slice in training at that moment, by ``(parameter name, slice number)``;
            empty before the first reading. A slice without a second reading, or of zeros so far, scores 0.
        waiting: Slices that could not stop, because they have not been read twice, or were not followed yet at the
            event before this one. A slice is followed from its first reading on that is not zero everywhere.
        frozen: The slices that stop.
        selection: What stays in training.
        entries_frozen: How many entries stop.
        state_bytes: Memory of the optimizer's state of what stays, in bytes: after the next step its ``state_bytes``.
        stopped: Parameters without an entry in training whose ``requires_grad`` becomes False with this event, so that
            a backward pass no longer computes the product that gives their gradient. Which layers it no longer reaches
            at all shows in a forward pass, which no event does: see :func:`fishkern.optim.training_cost`.
    """

    step: int
    number: int
    scores: Mapping[Key, float]
    waiting: frozenset[Key]
    frozen: frozenset[Key]
    selection: Selection
    entries_frozen: int
    state_bytes: int
    stopped: tuple[str, ...]

    @property
    def entries_kept(self) -> int:
        """How many entries stay in training."""
        return self.selection.count

    def __repr__(self) -> str:
        parts = [
            f"event {self.number} after {self.step:,} steps",
            f"{len(self.frozen):,} of {len(self.scores):,} slices stop",
            f"{self.entries_kept:,} of {self.entries_kept + self.entries_frozen:,} entries stay",
            f"{bytes_in_words(self.state_bytes)} of optimizer state",
        ]
        if self.stopped:
            parts.append(f"{len(self.stopped):,} parameter{'s' * (len(self.stopped) > 1)} without a gradient from here")
        if self.waiting:
            parts.append(f"{len(self.waiting):,} slices wait")
        return f"Freezing({', '.join(parts)})"
