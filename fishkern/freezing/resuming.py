"""Whether a saved state is that of the training that goes on from it."""

from __future__ import annotations

from collections.abc import Container, Mapping

from fishkern.freezing.saved import FreezerState
from fishkern.freezing.slices import Key
from fishkern.names import listed
from fishkern.selection import Selection


def demand_fits(
    state: FreezerState,
    selection: Selection,
    slices: Container[Key],
    settings: Mapping[str, str],
    digest: str | None,
) -> None:
    """Refuse the state of another training.

    Args:
        state: What was saved.
        selection: What the optimizer trains.
        slices: Of the pool.
        settings: The freezer's own slices, drift and statistic, in words.
        digest: Of the freezer's probe, ``None`` where there is none.

    Raises:
        ValueError: Parameters, settings, probe or selection differ; the message says which.
    """
    ours, theirs = selection.shapes, state.selection.shapes
    if other := [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]:
        raise ValueError(
            f"the state is of other parameters: {len(other)} are not in both pools in one shape, such as "
            f"{listed(other)}."
        )
    for what, said in settings.items():
        if (saved := state.settings.get(what, said)) != said:
            raise ValueError(f"the state was made with another {what}: {saved}, and this freezer has {said}.")
    if None not in (state.digest, digest) and state.digest != digest:
        raise ValueError(
            f"the state was made on another probe ({state.digest[:8]}, and this freezer's is {digest[:8]}): its "
            "references say nothing of this one. Give the same batches."
        )
    if state.selection != selection:
        raise ValueError(
            f"the optimizer trains {selection.count:,} entries, and {state.selection.count:,} others were in training "
            "when the state was saved: make the optimizer on freezer.selection of then "
            "(fishkern.Freezer.saved_selection(path) reads it)."
        )
    if strange := [key for key in state.tracks if key not in slices]:
        raise ValueError(f"the state is damaged: it follows {strange[0]}, which is no slice of the pool.")
