"""The one loop over data: batches are checked, moved to the device, cut to ``max_examples``, and numbered."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fishkern.statistics.batches import Examples, Reader
from fishkern.statistics.shards import Ranks, length_of, shard_of


class Data:
    """Batches on the device, checked, cut to ``max_examples``, each with the indices of its examples.

    Args:
        batches: An iterable of batches, such as a ``DataLoader``.
        reader: Counts the examples of a batch and decides how it is cut.
        device: The device to move them to.
        max_examples: Stop after so many, of all ranks together.
        ranks: The ranks that take part.

    Attributes:
        device: The device of the batches.
        examples: Number of examples given so far, on this rank.
        batches: Number of batches given so far, on this rank.
        dropped: Number of documents without a label in the packed rows given so far, on this rank.

    Raises:
        TypeError: ``batches`` is one batch.
    """

    def __init__(
        self, batches: Iterable[Any], reader: Reader, device: torch.device, max_examples: int | None, ranks: Ranks
    ) -> None:
        demand_several(batches)
        self._reader = reader
        self._batches = batches
        self.device = device
        self._shard = shard_of(batches, ranks, max_examples)
        self.examples = 0
        self.batches = 0
        self.dropped = 0
        self._users: Tensor | None = None

    @property
    def total(self) -> int | None:
        """Number of examples of this rank, if the data has a length."""
        known = length_of(getattr(self._batches, "dataset", None)) if self._shard.count == 1 else None
        sizes = [size for size in (known, self._shard.size) if size is not None]
        return min(sizes, default=None)

    @property
    def learned(self) -> Hashable:
        """What changes when a batch settles how later ones are read."""
        return self._reader.learned

    @property
    def has_state(self) -> bool:
        """Whether the iterable knows where it is, as torchdata's ``StatefulDataLoader`` does."""
        # accelerate's loaders have the methods in any case, and a loader inside that may lack them
        inner = getattr(self._batches, "base_dataloader", self._batches)
        return all(callable(getattr(inner, name, None)) for name in ("state_dict", "load_state_dict"))

    def state(self) -> Any:
        """Return where the iterable is, after the batches given so far.

        Returns:
            What its ``state_dict()`` gives.
        """
        return self._batches.state_dict()

    def go_on(self, state: Any, users: Tensor, *, examples: int, batches: int, dropped: int) -> None:
        """Let the next iteration go on where an earlier one was.

        Args:
            state: From :meth:`state`.
            users: State of the user's generator then, from which the data may draw.
            examples: Number of examples given by then.
            batches: Number of batches.
            dropped: Number of documents without a label.
        """
        self._batches.load_state_dict(state)
        self._users = users
        self.examples, self.batches, self.dropped = examples, batches, dropped

    def __iter__(self) -> Iterator[Examples]:
        limit = self._shard.limit
        raws = iter(self._batches)
        if self._users is not None:  # here, since the iterable itself may draw when an iteration begins
            torch.set_rng_state(self._users)
            self._users = None
        for raw in raws:
            batch = self._reader(raw, self.batches)
            if batch.documents is not None and self._shard.by_rows:
                raise ValueError(
                    f"batch {self.batches} is packed, and the sampler deals rows to {self._shard.count} ranks, which "
                    "hold several documents each: which documents it repeats at the end cannot be told. Give each rank "
                    "its own part of the data, as an iterator, iter(loader)."
                )
            places = self._shard.places(self.batches, self.examples, batch.num_examples)
            if limit is not None and places[-1] >= limit:
                places = range(places.start, min(places.stop, limit), places.step)
                if not places:  # repeated examples, which the sampler adds to give all ranks the same number
                    return
                batch = batch.take(0, len(places))
            self.batches += 1
            self.examples += len(places)
            self.dropped += batch.dropped
            yield replace(batch.to(self.device), places=places, cut_from=None)
            # checked here as well, so that no batch beyond the limit is fetched from the user's iterator
            if limit is not None and self._shard.places(self.batches, self.examples, 1).start >= limit:
                return


def demand_several(batches: Any) -> None:
    """Refuse anything but an iterable of batches, such as a single batch.

    Args:
        batches: The argument of the caller.

    Raises:
        TypeError: It is a mapping or a tensor, or cannot be iterated over.
    """
    if not hasattr(batches, "__iter__") and not hasattr(batches, "__getitem__"):
        raise TypeError(f"batches must be an iterable of batches, such as a DataLoader, got {batches!r:.80}.")
    if isinstance(batches, Mapping | Tensor):
        raise TypeError(
            f"batches is one batch (a {type(batches).__name__}): expected an iterable of batches, such as a "
            "DataLoader. Pass [batch]."
        )


class Progress:
    """A line on standard error, or the caller's function.

    Args:
        report: ``True`` for a line; or a function of the number of examples done and of the total, if known.
        total: Number of examples of a pass, if known.
        number: Number of the pass, from 0.
        passes: Number of passes over the data.

    Attributes:
        overlap: The expected overlap of the top with that of all further examples, for the line; ``None`` if unknown.
    """

    def __init__(
        self,
        report: bool | Callable[[int, int | None], None],
        total: int | None,
        number: int = 0,
        passes: int = 1,
    ) -> None:
        self._report = report
        self._total = total
        self._number, self._passes = number, passes
        self._start = self._shown = time.monotonic()
        self._begun = 0
        self.overlap: float | None = None

    @property
    def shows(self) -> bool:
        """Whether there is a line."""
        return self._report is True

    def go_on(self, begun: int) -> None:
        """Begin where an earlier run was.

        Args:
            begun: Number of examples that it had done.
        """
        self._start, self._begun = time.monotonic(), begun
        self(begun)

    def __call__(self, done: int) -> None:
        if callable(self._report):
            before = 0 if self._total is None else self._number * self._total
            self._report(before + done, None if self._total is None else self._passes * self._total)
        elif self._report and time.monotonic() - self._shown > 0.2:
            self._shown = time.monotonic()
            rate = (done - self._begun) / (self._shown - self._start)
            of_total = f"/{self._total}" if self._total else ""
            remaining = f", {(self._total - done) / rate:.0f} s left" if self._total and rate else ""
            which = f" (pass {self._number + 1} of {self._passes})" if self._passes > 1 else ""
            top = "" if self.overlap is None else f", overlap {self.overlap:.1%}"
            sys.stderr.write(f"\restimating{which}: {done}{of_total} examples, {rate:.1f}/s{remaining}{top}\033[K")
            sys.stderr.flush()

    def close(self) -> None:
        """End the line."""
        if self._report is True and self._shown != self._start:
            sys.stderr.write("\n")
