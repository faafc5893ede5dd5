"""The top set with which :class:`fishkern.ContributionTopK` selects as many entries as is asked for.

How many it selects is a step function of the size t of the top set, and not a monotone one, since the layer of the
smallest count divides all others. But the counts of the layers are monotone in t. So, where they are known at both ends
of a range of t, what is selected inside is bounded, and most ranges can be left out. The scores are first counted by
the leading bits of their values; then those of the few ranges that are left are read, put into order and followed.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fishkern.files import AnyTensor
from fishkern.ops.streaming_topk import Order
from fishkern.selection._in_order import ZERO, InOrder, Runs

# Scores that are read at once to follow their order.
_MOST_READ = 2**23
# A range is cut into so many blocks, of so many counts in all.
_BLOCKS, _MOST_COUNTS = 512, 2**22
_BEYOND = 2**62  # more than any count


@dataclass(frozen=True)
class Steps:
    """What one connection more of each row costs in a layer: as many entries as there are rows long enough.

    Attributes:
        layers: ``[J]`` the layer's number.
        low: ``[J]`` from so many connections on,
        high: ``[J]`` and up to so many,
        rows: ``[J]`` it costs so many entries.
    """

    layers: Tensor
    low: Tensor
    high: Tensor
    rows: Tensor

    @classmethod
    def of(cls, layers: Sequence[Mapping[int, int]], most: int | None) -> Steps:
        """Collect the steps.

        Args:
            layers: For each layer, how many rows there are of each length.
            most: The most connections of a row.

        Returns:
            The steps.
        """
        steps = []
        for number, rows in enumerate(layers):
            left = sum(rows.values())
            for low, high in pairwise([0, *sorted(rows)]):
                steps.append((number, low, high if most is None else min(high, most), left))
                left -= rows[high]
        steps = [step for step in steps if step[1] < step[2]]
        return cls(*torch.tensor(steps, dtype=torch.int64).view(-1, 4).unbind(1))

    def taken(self, connections: Tensor) -> Tensor:
        """Compute how many connections of each step are taken.

        Args:
            connections: ``[S, layers]``.

        Returns:
            ``[S, J]``.
        """
        return connections[:, self.layers].clamp(self.low, self.high) - self.low


class _Open(NamedTuple):
    """A unit in which a better size may be.

    Attributes:
        unit: Its number.
        start: ``[layers]`` counts before it.
        first: Their sum: the size of the top set before it.
        entries: How many scores it has.
        distance: No size inside is nearer to the target.
    """

    unit: int
    start: Tensor
    first: int
    entries: int
    distance: int


class Search:
    """Find the top set for which the number of selected entries is as near to a target as it ever is.

    Of several the one whose size is nearest to a usual one, and of two of these the smaller: very small top sets come
    near to many targets by chance.

    Args:
        target: How many entries to select.
        usual: A size of the top set.
        steps: What connections cost.
        per_entry: ``[layers]`` what an entry of a layer weighs in its contribution, whole numbers.
        least_per_row: Connections of each row in the layer of the smallest contribution.

    Attributes:
        counts: ``[layers]`` how many entries of each layer are in the best top set so far.
        in_zeros: Whether its last score is zero, or next to zero.
    """

    def __init__(self, target: int, usual: int, steps: Steps, per_entry: Tensor, least_per_row: int) -> None:
        self._target, self._usual, self._steps = target, usual, steps
        self._per_entry, self._least = per_entry, least_per_row
        self._best = (_BEYOND, 0, 0)  # distance from the target, distance from the usual size, size
        self.counts = torch.zeros_like(per_entry)
        self.in_zeros = False

    @property
    def size(self) -> int:
        """Entries in the best top set so far."""
        return self._best[2]

    @property
    def selected(self) -> int:
        """How many entries the best top set leads to."""
        return int(self._selected(self.counts[None])[0])

    def run(self, scores: Mapping[str, AnyTensor], layer_of: Mapping[str, int], order: Order) -> None:
        """Search all sizes of the top set.

        Args:
            scores: By name, in memory or on disk; mostly read twice.
            layer_of: The number of each parameter's layer.
            order: Which scores come first.

        Raises:
            ValueError: A score is NaN; its parameter is named.
        """
        source = InOrder(scores, layer_of, order)
        bins, runs = source.counted()
        open_bins = list(self._walk(runs, torch.zeros_like(self._per_entry)))
        while open_bins := [one for one in open_bins if self._may_improve(one)]:
            read, entries = [], 0
            while open_bins and (not read or entries + open_bins[0].entries <= _MOST_READ):
                read.append(open_bins.pop(0))
                entries += read[-1].entries
            ordered = source.ordered(bins[[one.unit for one in read]])
            for one, inside in zip(read, ordered, strict=True):
                for run in self._walk(inside, one.start):
                    self._follow(run.start, int(inside.layers[run.unit]), run.entries)
        sizes = runs.counts.cumsum(0)[runs.edges[1:] - 1]
        self.in_zeros = int(bins[torch.searchsorted(sizes, self.size)]) == ZERO

    def _walk(self, runs: Runs, start: Tensor, first: int = 0, last: int | None = None) -> Iterator[_Open]:
        """Look at every size that is between two units, and yield the units in which a better one may be.

        Args:
            runs: Scores in their order.
            start: ``[layers]`` counts before the unit ``first``.
            first: The first unit.
            last: The unit after the last; ``None`` for all.

        Yields:
            The units, in their order.
        """
        last = len(runs.edges) - 1 if last is None else last
        blocks = max(2, min(_BLOCKS, _MOST_COUNTS // len(start)))
        cuts = torch.tensor([*range(first, last, -(-(last - first) // blocks)), last])
        edges = runs.edges[cuts]
        inside = slice(int(edges[0]), int(edges[-1]))
        block = torch.repeat_interleave(torch.arange(len(cuts) - 1), edges.diff())
        table = torch.zeros((len(cuts) - 1) * len(start), dtype=torch.int64)
        table.index_add_(0, block * len(start) + runs.layers[inside], runs.counts[inside])
        table = table.view(-1, len(start))
        ends = start + table.cumsum(0)
        self._consider(ends)
        starts, entries = ends - table, table.sum(1)
        sizes = starts.sum(1)
        distances = self._distances(starts, ends)
        distances[entries == 1] = _BEYOND  # there is nothing inside
        for number in (distances <= self._best[0]).nonzero().view(-1).tolist():
            one = _Open(0, starts[number], int(sizes[number]), int(entries[number]), int(distances[number]))
            if not self._may_improve(one):
                continue
            if (unit := int(cuts[number])) + 1 == int(cuts[number + 1]):
                yield _Open(unit, *one[1:])
            else:
                yield from self._walk(runs, one.start, unit, int(cuts[number + 1]))

    def _follow(self, start: Tensor, layer: int, entries: int) -> None:
        """Look at the sizes inside one run: equal scores of one layer.

        While this layer is the smallest, more of it means less for all others; from then on it alone gets more.
        """

        def selected(more: int) -> int:
            return int(self._selected(counts(more))[0])

        def counts(more: int) -> Tensor:
            counts = start[None].clone()
            counts[0, layer] += more
            return counts

        weights = start * self._per_entry
        weights[layer] = 0
        least = int(weights[weights > 0].min()) if weights.any() else _BEYOND
        turn = least // int(self._per_entry[layer]) - int(start[layer])
        falling, rising = range(1, min(entries - 1, turn) + 1), range(max(1, turn + 1), entries)
        for sizes, sign in ((falling, -1), (rising, 1)):
            value = lambda more, sign=sign: sign * selected(more)  # noqa: E731 - which ascends
            place = bisect_left(sizes, sign * self._target, key=value)
            for near in {max(0, place - 1), min(place, len(sizes) - 1)} if sizes else ():
                equal = value(sizes[near])
                first = sizes[bisect_left(sizes, equal, key=value)]
                last = sizes[bisect_right(sizes, equal, key=value) - 1]
                self._consider(counts(min(max(first, self._usual - int(start.sum())), last)))

    def _may_improve(self, one: _Open) -> bool:
        first, last = one.first + 1, one.first + one.entries - 1
        return (one.distance, max(0, first - self._usual, self._usual - last), first) < self._best

    def _consider(self, counts: Tensor) -> None:
        """Compare top sets with the best so far: ``[S, layers]`` counts."""
        distances, sizes = (self._selected(counts) - self._target).abs(), counts.sum(1)
        nearest = (distances == distances.min()).nonzero().view(-1)
        off = sizes[nearest] - self._usual
        row = nearest[(2 * off.abs() + (off > 0)).argmin()]
        best = (int(distances[row]), abs(int(sizes[row]) - self._usual), int(sizes[row]))
        if best < self._best:
            self._best, self.counts = best, counts[row].clone()

    def _selected(self, counts: Tensor) -> Tensor:
        """Count the selected entries: ``[S, layers]`` counts to ``[S]``."""
        weights = counts * self._per_entry
        least = weights.masked_fill(weights == 0, _BEYOND).amin(1, keepdim=True)
        return (self._steps.taken(self._connections(weights, least)) * self._steps.rows).sum(1)

    def _connections(self, weights: Tensor, least: Tensor) -> Tensor:
        """Compute ``floor(least_per_row * weight / least)``, where no weight is at least ``least_per_row``."""
        return (weights * self._least).div(least, rounding_mode="floor").clamp(min=self._least)

    def _distances(self, starts: Tensor, ends: Tensor) -> Tensor:
        """Bound the distances from the target between two counts, ``[S, layers]`` each, from below, ``[S]``."""
        low, high = starts * self._per_entry, ends * self._per_entry
        # The smallest weight inside is at most that of a layer that is there at the start, and at least what the
        # smallest one had then, or one entry of a layer that is not.
        most = high.masked_fill(low == 0, _BEYOND).amin(1, keepdim=True)
        least = torch.where(low > 0, low, self._per_entry.where(high > 0, torch.tensor(_BEYOND))).amin(1, keepdim=True)
        fewest = self._steps.taken(self._connections(low, most))
        largest = self._steps.taken(self._connections(high, least))
        lowest, highest = (fewest * self._steps.rows).sum(1), (largest * self._steps.rows).sum(1)
        # All values inside differ from the lowest by a multiple of this.
        stride = _gcd(self._steps.rows.where(largest > fewest, torch.tensor(0)))
        inside = torch.tensor(self._target).clamp(lowest, highest)
        below = inside - (inside - lowest) % stride.clamp(min=1)
        above = torch.where(below + stride <= highest, below + stride, below)
        return torch.minimum((below - self._target).abs(), (above - self._target).abs())


def _gcd(numbers: Tensor) -> Tensor:
    """Compute the greatest common divisor of each row, 0 where all are 0: ``[S, J]`` to ``[S]``."""
    if not numbers.shape[1]:
        return numbers.new_zeros(len(numbers))
    while (columns := numbers.shape[1]) > 1:
        half = columns // 2
        rest = numbers[:, 2 * half :]
        numbers = torch.cat([torch.gcd(numbers[:, :half], numbers[:, half : 2 * half]), rest], 1)
    return numbers.view(-1)
