"""Statistics on disk that report how much of them has been read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fishkern.commands.output import Report
from fishkern.files import StoredTensor
from fishkern.statistics import Statistics


@dataclass(frozen=True)
class _Watched(StoredTensor):
    """A stored tensor that reports how much of it has been read."""

    add: Callable[[int], None]

    def pieces(self, *sizes: int, **options: Any) -> Iterator[Tensor]:
        for piece in super().pieces(*sizes, **options):
            if "start" not in options:  # else it is a sample, which is no progress
                self.add(len(piece))
            yield piece


def watched(statistics: Statistics, report: Report, times: int = 1) -> Statistics:
    """Let statistics report how much of them has been read.

    Args:
        statistics: Loaded lazily.
        report: Called with the entries read so far, and how many will be.
        times: How often each is read at least.

    Returns:
        The same statistics.
    """
    total, done = statistics.total, 0

    def add(entries: int) -> None:
        nonlocal done
        done += entries
        passes = -(-done // total)  # beyond the expected ones each further pass reads everything once more
        report(done, max(times, passes) * total)

    blocks = {name: _Watched(**vars(block), add=add) for name, block in statistics.blocks.items()}
    return type(statistics)(
        blocks, count=statistics.count, provenance=statistics.provenance, coverage=statistics.coverage
    )
