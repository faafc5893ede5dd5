"""Statistics on disk that tell how much of them is read."""

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
    """A stored tensor that tells how much of it is read."""

    tell: Callable[[int], None]

    def pieces(self, *sizes: int, **options: Any) -> Iterator[Tensor]:
        for piece in super().pieces(*sizes, **options):
            if "start" not in options:  # a sample says where it begins
                self.tell(len(piece))
            yield piece


def watched(statistics: Statistics, report: Report, times: int = 1) -> Statistics:
    """Let statistics tell how much of them is read.

    Args:
        statistics: Loaded lazily.
        report: Told the entries read so far, and how many will be.
        times: How often each is read at least.

    Returns:
        The same statistics.
    """
    total, done = statistics.total, 0

    def tell(entries: int) -> None:
        nonlocal done
        done += entries
        report(done, max(times, -(-done // total)) * total)  # what has to be read again is as much once more

    blocks = {name: _Watched(**vars(block), tell=tell) for name, block in statistics.blocks.items()}
    return type(statistics)(
        blocks, count=statistics.count, provenance=statistics.provenance, coverage=statistics.coverage
    )
