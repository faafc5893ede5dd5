"""Entries of parameters that FSDP2 shards, followed by the ranks that hold them."""

from __future__ import annotations

from collections.abc import Sequence

from fishkern.statistics.following import Following


class ShardedFollowing(Following):
    """Follow entries of the sums of all ranks, whose batches of a turn are one batch: each rank those of its shards.

    Nothing is exchanged before the overlap is looked at, except where an entry's sum is not on one rank alone: of HSDP,
    and of parameters that every rank holds whole, what the turn has added is summed first.
    """

    def _add(self, units: Sequence[int], turn: int) -> int:
        every, first = sum(units), self._in_step.rank == 0
        added = self._added()
        if not self._states.disjoint:
            self._in_step.sum_(added)
        if first or self._states.disjoint:
            self._put(added, every, turn)
        if first:
            self._count(every, turn)
        return 1
