"""The one loop over data: batches checked, moved, cut at the number of examples, and told by."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fishkern.statistics.batches import Examples, Reader
from fishkern.statistics.shards import Ranks, length_of, shard_of


class Data:
    """Batches, moved, checked, cut at the number of examples, each with the places of its examples.

    Args:
        batches: What a ``DataLoader`` yields.
        reader: Counts the examples of a batch and says how it is cut.
        device: Where to.
        max_examples: Stop after so many, of all ranks together.
        ranks: Who takes part.

    Attributes:
        examples: Number of examples given so far, on this rank.
        batches: Number of batches given so far, on this rank.

    Raises:
        TypeError: ``batches`` is one batch.
    """

    def __init__(
        self, batches: Iterable[Any], reader: Reader, device: torch.device, max_examples: int | None, ranks: Ranks
    ) -> None:
        demand_several(batches)
        self._reader = reader
        self._batches = batches
        self._device = device
        self._shard = shard_of(batches, ranks, max_examples)
        self.examples = 0
        self.batches = 0

    @property
    def total(self) -> int | None:
        """Number of examples of this rank, where the source tells it."""
        known = length_of(getattr(self._batches, "dataset", None)) if self._shard.count == 1 else None
        sizes = [size for size in (known, self._shard.size) if size is not None]
        return min(sizes, default=None)

    def __iter__(self) -> Iterator[Examples]:
        limit = self._shard.limit
        for raw in self._batches:
            batch = self._reader(raw, self.batches)
            places = self._shard.places(self.batches, self.examples, batch.num_examples)
            if limit is not None and places[-1] >= limit:
                places = range(places.start, min(places.stop, limit), places.step)
                if not places:  # repeated, so that all ranks get equally many
                    return
                batch = batch.take(0, len(places))
            self.batches += 1
            self.examples += len(places)
            yield replace(batch.to(self._device), places=places, cut_from=None)
            if limit is not None and self._shard.places(self.batches, self.examples, 1).start >= limit:
                return


def demand_several(batches: Any) -> None:
    """Refuse a batch where batches are asked for.

    Args:
        batches: What the caller gave.

    Raises:
        TypeError: It is a mapping or a tensor.
    """
    if isinstance(batches, Mapping | Tensor):
        raise TypeError(
            f"batches is one batch (a {type(batches).__name__}): expected an iterable of batches, such as a "
            "DataLoader. Pass [batch]."
        )


class Progress:
    """A line on standard error, or the caller's function.

    Args:
        wanted: ``True`` for a line; or a function of the number of examples done and of the total, where known.
        total: Number of examples, where known.
    """

    def __init__(self, wanted: bool | Callable[[int, int | None], None], total: int | None) -> None:
        self._wanted = wanted
        self._total = total
        self._start = self._shown = time.monotonic()

    def __call__(self, done: int) -> None:
        if callable(self._wanted):
            self._wanted(done, self._total)
        elif self._wanted and time.monotonic() - self._shown > 0.2:
            self._shown = time.monotonic()
            rate = done / (self._shown - self._start)
            of_total = f"/{self._total}" if self._total else ""
            left = f", {(self._total - done) / rate:.0f} s left" if self._total else ""
            sys.stderr.write(f"\restimating: {done}{of_total} examples, {rate:.1f}/s{left}\033[K")
            sys.stderr.flush()

    def close(self) -> None:
        """End the line."""
        if self._wanted is True and self._shown != self._start:
            sys.stderr.write("\n")
