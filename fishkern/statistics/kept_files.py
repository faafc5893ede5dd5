"""The files of a checkpoint: one for each pass and rank, of which those of ranks that step together are of one turn.

Where FSDP2 shards a model, the sums of a rank are those of the examples of all ranks, so the files of all ranks make
one checkpoint. Each rank writes a second file beside its own; when all have done so, the second ones take the places of
the first. Whenever the ranks are killed, each has a file of the last turn that all of them have written.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path

from fishkern.files import check_target, remove_leftovers
from fishkern.statistics.checkpoint import Checkpoint
from fishkern.statistics.shards import Ranks

_RANKS = ("the number of", "ranks")  # among the facts of a call


def paths_of(checkpoint: str | os.PathLike[str], passes: int, ranks: Ranks) -> list[Path]:
    """Name this rank's file of each pass.

    Args:
        checkpoint: As for :func:`fishkern.estimate`.
        passes: Number of passes over the data.
        ranks: The ranks that take part.

    Returns:
        The files.

    Raises:
        OSError: The path cannot name a file.
        FileNotFoundError: Its folder is missing.
        ValueError: There are files of another number of ranks, or of one pass where there are several, or the other
            way round.
    """
    check_target(checkpoint, "fisher.part")
    path = Path(checkpoint)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {path.parent} of checkpoint={str(path)!r} does not exist: create it.")
    _demand_same_layout(path, passes, ranks)
    of_rank = f".rank-{ranks.rank}" if ranks.count > 1 else ""
    of_pass = [f".pass-{number + 1}" if passes > 1 else "" for number in range(passes)]
    return [path.with_name(f"{path.name}{one}{of_rank}") for one in of_pass]


class KeptFiles:
    """This rank's file of one pass.

    Args:
        path: Its name.
        together: The ranks that step together, all of which call each method.
    """

    def __init__(self, path: Path, together: Ranks) -> None:
        self.path = path
        self._next = path.with_name(f"{path.name}.next")
        self._together = together

    def read(self) -> Checkpoint | None:
        """Read the file from which the pass goes on, and remove what a process that was killed has left.

        Returns:
            What it holds, except for the values of its tensors; ``None`` if there is none.

        Raises:
            ValueError: It is damaged or holds something else; or some ranks lack it.
        """
        together = self._together
        with together.failing_together():
            remove_leftovers(self.path)  # each may be as large as the checkpoint
            if together.count == 1:
                return Checkpoint.read(self.path)
            remove_leftovers(self._next)
            read = [(path, Checkpoint.read(path)) for path in (self.path, self._next)]
            held = {one.turn: (path, one) for path, one in read if one is not None}
        # of the last turn, or of the first one: those that were written or removed when the ranks were killed
        at_an_end = all(one.place.first or one.place.ended for _, one in held.values())
        turns, at_ends = zip(*together.gathered((set(held), at_an_end)), strict=True)
        common = set.intersection(*turns)
        if not common and not all(at_ends):
            counted = {rank: max((number for number, _ in one), default=0) for rank, one in enumerate(turns)}
            raise ValueError(
                f"the files of {self.path.name.rpartition('.rank-')[0]} do not fit together, one for each rank: they "
                f"are of turns {counted} by rank, where 0 is none. Bring back those that are missing, or delete all of "
                "them to begin at the first batch."
            )
        chosen = max(common, default=None)
        for turn, (path, _) in held.items():
            if turn != chosen:
                path.unlink()
        if chosen is None:
            return None
        path, stored = held[chosen]
        if path == self._next:
            os.replace(path, self.path)
            stored = Checkpoint.read(self.path)
        return stored

    def write(self, checkpoint: Checkpoint) -> None:
        """Write the file, which replaces the older one on all ranks or on none.

        Args:
            checkpoint: What it holds.

        Raises:
            OSError: As in :func:`fishkern.files.atomic_write`; the older files are then unchanged.
            RuntimeError: Another rank has failed.
        """
        together = self._together
        if together.count == 1:
            checkpoint.write(self.path)
            return
        last = checkpoint.tensors["digests"][-1:].numpy().tobytes()
        of_all = blake2b(b"".join(together.gathered(last)), digest_size=16).hexdigest()
        checkpoint = replace(checkpoint, place=checkpoint.place._replace(of_all=of_all))
        try:
            with together.failing_together():
                checkpoint.write(self._next)
        except Exception:
            with suppress(OSError):
                self._next.unlink(missing_ok=True)
            raise
        with together.failing_together():
            os.replace(self._next, self.path)


def _demand_same_layout(path: Path, passes: int, ranks: Ranks) -> None:
    """Refuse files of other processes or of other passes, which this call would leave aside."""
    name = re.compile(rf"{re.escape(path.name)}(\.pass-\d+)?(\.rank-\d+)?(\.next)?")
    for file in sorted(path.parent.iterdir()):
        if (match := name.fullmatch(file.name)) is None or (stored := Checkpoint.read(file)) is None:
            continue
        before, several = stored.facts.get(_RANKS), match[1] is not None
        if before != str(ranks.count):
            change = f"the number of ranks was {before} and is {ranks.count}"
        elif several != (passes > 1):
            change = f"it took {'several passes' if several else 'one pass'} over the data, and this one takes {passes}"
        else:
            continue
        raise ValueError(
            f"{file} is the checkpoint of another call: {change}. Make the call that it is of, or delete it to begin "
            "at the first batch."
        )
