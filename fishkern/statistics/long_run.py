"""The checkpoints of a call of ``estimate``, which may take several passes, on several ranks."""

from __future__ import annotations

import math
import os

from fishkern import arguments
from fishkern.statistics.call_facts import facts_of_constants
from fishkern.statistics.keeping import Keeper
from fishkern.statistics.kept_files import KeptFiles, paths_of
from fishkern.statistics.shards import Ranks
from fishkern.statistics.states import States
from fishkern.statistics.structure import Facts


class LongRun:
    """The checkpoints of a call, one for each pass and rank.

    Args:
        path: As ``checkpoint`` of :func:`fishkern.estimate`.
        every: As ``save_every``.
        passes: Number of passes over the data.
        ranks: The ranks that take part.
        together: Those that step together.

    Raises:
        OSError: The path cannot name a file, or its folder is missing.
        ValueError: ``every`` is below 0 or not finite; or there are files of other ranks or passes.
        TypeError: ``every`` is not a number.
    """

    def __init__(self, path: str | os.PathLike[str], every: float, passes: int, ranks: Ranks, together: Ranks) -> None:
        seconds = arguments.number(every, "save_every")
        if not 0 <= seconds < math.inf:
            raise ValueError(f"save_every must be a number of seconds, at least 0, got {seconds:g}.")
        self._every = seconds
        self._paths = paths_of(path, passes, ranks)
        self._ranks, self._together = ranks, together
        # a pass that has ended is kept as long as others may fail
        self._keeps_end = passes > 1 or ranks.count > 1

    def keeper(self, number: int, facts: Facts, states: States) -> Keeper:
        """Make the keeper of a pass.

        Args:
            number: Number of the pass, from 0.
            facts: Of the call.
            states: The states of the pass, before its first batch.

        Returns:
            The keeper.
        """
        facts = facts | facts_of_constants(states)
        files = KeptFiles(self._paths[number], self._together)
        return Keeper(files, self._every, facts, self._together, keeps_end=self._keeps_end)

    def remove(self) -> None:
        """Remove the files: the call has ended on all ranks."""
        self._ranks.gathered(None)
        for path in self._paths:
            path.unlink(missing_ok=True)
        self._ranks.gathered(None)  # a later call finds none of them
