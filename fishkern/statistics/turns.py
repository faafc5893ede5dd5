"""Batches in turns: one of each of the ranks that step together, until none of them has another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from typing import NamedTuple

from fishkern.statistics.batches import Examples
from fishkern.statistics.known import Kind
from fishkern.statistics.shards import Ranks


class Turn(NamedTuple):
    """One batch of each rank.

    Args:
        number: Of the turn, from 0.
        batch: This rank's; ``None`` if its data has ended before that of another.
        kinds: The kind of each rank's batch; ``None`` where it has none.
        sizes: Number of examples in each rank's batch; 0 where it has none.
        again: Whether it is counted already, and runs for what it shows only.
    """

    number: int
    batch: Examples | None
    kinds: list[Kind | None]
    sizes: list[int]
    again: bool = False


def turns(batches: Iterator[Examples], together: Ranks, everyone: Ranks | None = None) -> Iterator[Turn]:
    """Read batches in turns.

    Args:
        batches: This rank's.
        together: The ranks that step together.
        everyone: The ranks that all end where one of them cannot read; by default those.

    Yields:
        The turns.
    """
    for number in count():
        turn = next_turn(number, lambda: next(batches, None), together, everyone)
        if turn is None:
            return
        yield turn


def next_turn(
    number: int,
    read: Callable[[], Examples | None],
    together: Ranks,
    everyone: Ranks | None = None,
    *,
    again: bool = False,
) -> Turn | None:
    """Read one batch on each rank. A collective operation: where one of them raises, all do.

    Args:
        number: Of the turn.
        read: Gives this rank's batch, or ``None``.
        together: The ranks that step together.
        everyone: As for :func:`turns`.
        again: As in :class:`Turn`.

    Returns:
        The turn; ``None`` if no rank has a batch.
    """
    with (everyone or together).failing_together():
        batch = read()
    own = None if batch is None else (kind_of(batch), batch.num_examples)
    every = together.gathered(own)
    if not any(one is not None for one in every):
        return None
    kinds = [None if one is None else one[0] for one in every]
    return Turn(number, batch, kinds, [0 if one is None else one[1] for one in every], again)


def kind_of(batch: Examples) -> Kind:
    """Say by which plans a batch runs.

    Args:
        batch: The batch.

    Returns:
        Its kind.
    """
    return Kind(batch.num_examples == 1, batch.kind)
