"""The exact top-k of scores of which each rank holds a part, without gathering them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fishkern.ops._digits import nth_largest, nth_smallest_index
from fishkern.ops.streaming_topk import Order
from fishkern.selection.shards import Shards


@torch.no_grad()
def topk_on_ranks(shards: Shards, k: int, order: Order) -> tuple[dict[str, Tensor], float | None]:
    """Select the ``k`` first scores of all ranks together. A collective operation.

    The ``k``-th score is found by its digits, 16 bits at a time: the histograms of the ranks are added up. Of scores
    that equal it, as many as there is room for are taken, of earlier parameters first; where a parameter has more, the
    last index to take is found by its digits, too. So the ranks send 2^19 bytes for every 16 bits of a score or an
    index, and 16 bytes for each name, however many scores there are. The scores are read four times, float64 six times.

    Args:
        shards: Without NaN.
        k: How many, at most the number of scores.
        order: Which come first.

    Returns:
        This rank's flat indices by name, in the numbering of the whole tensor, ascending, int64, on the CPU; and the
        last score selected (``None`` for ``k = 0``).
    """
    if k == 0:
        return {name: torch.empty(0, dtype=torch.int64) for name in shards}, None
    ascending = _Ascending(shards, order)
    last = nth_largest(ascending.counted_values, k, shards.dtype, total=shards.summed)
    better, equal = shards.summed(lambda: ascending.compared(last)).unbind(1)
    room = (k - better.sum() - equal.cumsum(0) + equal).clamp(min=0)
    taken = torch.minimum(equal, room)
    ends = {}
    for name, count, of in zip(shards, taken.tolist(), equal.tolist(), strict=True):
        ends[name] = numel = shards[name].numel()
        if count < of:
            ends[name] = ascending.end_of_equals(name, last, count, numel) if count else 0
    with shards.together():
        selected = {name: ascending.selected(name, last, end) for name, end in ends.items()}
    return selected, last if order == "largest" else -last


class _Ascending:
    """The scores of this rank, negated where the smallest come first."""

    def __init__(self, shards: Shards, order: Order) -> None:
        self._shards, self._largest = shards, order == "largest"

    def counted_values(self) -> Iterator[Tensor]:
        for name in self._shards.counted():
            for _, values in self._pieces(name):
                yield values

    def compared(self, last: float) -> Tensor:
        """Count for each name the scores above a value, and those equal to it, ``[P, 2]``."""
        counts = torch.zeros(len(self._shards), 2, dtype=torch.int64)
        counted = set(self._shards.counted())
        for row, name in zip(counts, self._shards, strict=True):
            for _, values in self._pieces(name) if name in counted else ():
                row += torch.stack([(values > last).sum(), (values == last).sum()]).cpu()
        return counts

    def end_of_equals(self, name: str, last: float, count: int, numel: int) -> int:
        """Find the index after the ``count``-th of a parameter's scores that equal a value."""
        region = self._shards.regions[name]

        def walk() -> Iterator[Tensor]:
            for first, values in self._pieces(name) if region.counted else ():
                yield region.in_whole((values == last).nonzero().view(-1).cpu() + first)

        return nth_smallest_index(walk, count, numel, total=self._shards.summed) + 1

    def selected(self, name: str, last: float, end: int) -> Tensor:
        """List this rank's scores above a value, and those equal to it before an index of the whole tensor."""
        region, parts = self._shards.regions[name], [torch.empty(0, dtype=torch.int64)]
        for first, values in self._pieces(name):
            places = (values >= last).nonzero().view(-1)
            indices = region.in_whole(places.cpu() + first)
            parts.append(indices[(values[places] > last).cpu() | (indices < end)])
        return torch.cat(parts)

    def _pieces(self, name: str) -> Iterator[tuple[int, Tensor]]:
        for first, values in self._shards.pieces(name):
            yield first, values if self._largest else -values
