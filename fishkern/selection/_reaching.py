"""The top set with which :class:`fishkern.ContributionTopK` selects as many entries as is asked for.

How many it selects is a step function of the size t of the top set, and not a monotone one, since the layer of the
smallest count divides all others. But the counts of the layers are monotone in t. So, where they are known at both ends
of a range of t, what is selected inside is bounded, and most ranges can be left out. The scores are first counted by
the leading bits of their values; then those of the few ranges that are left are read, put into order and followed.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fishkern.files import AnyTensor, pieces
from fishkern.ops._digits import ordered_keys
from fishkern.ops.streaming_topk import Order
from fishkern.selection.ranking import no_rank

# Leading bits of a score by which scores are counted: of a float32 sign, exponent and 7 bits of the mantissa.
_BITS = 16
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


@dataclass(frozen=True)
class _Runs:
    """Scores in their order, those of one value and one layer as one entry.

    Attributes:
        layers: ``[M]`` the layer's number.
        counts: ``[M]`` how many scores.
        edges: ``[U + 1]`` where each unit begins, and the end: inside a unit the order is not known.
    """

    layers: Tensor
    counts: Tensor
    edges: Tensor


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
    """Find the smallest top set for which the number of selected entries is as near to a target as it ever is.

    Args:
        target: How many entries to select.
        steps: What connections cost.
        units: ``[layers]`` what an entry of a layer weighs in its contribution, whole numbers.
        least_per_row: Connections of each row in the layer of the smallest contribution.

    Attributes:
        size: Of the best top set so far.
        counts: ``[layers]`` how many entries of each layer are in it.
        selected: How many entries it leads to.
        in_zeros: Whether its last score is zero, or next to zero.
    """

    def __init__(self, target: int, steps: Steps, units: Tensor, least_per_row: int) -> None:
        self._target, self._steps, self._units, self._least = target, steps, units, least_per_row
        self._best = (_BEYOND, 0)  # distance from the target, size
        self.counts = torch.zeros_like(units)
        self.in_zeros = False

    @property
    def size(self) -> int:
        return self._best[1]

    @property
    def selected(self) -> int:
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
        source = _Source(scores, layer_of, order)
        bins, runs = source.counted()
        open_bins = list(self._walk(runs, torch.zeros_like(self._units)))
        while open_bins := [one for one in open_bins if self._may_improve(one.distance, one.first)]:
            read, entries = [], 0
            while open_bins and (not read or entries + open_bins[0].entries <= _MOST_READ):
                read.append(open_bins.pop(0))
                entries += read[-1].entries
            ordered = source.ordered(bins[[one.unit for one in read]])
            for one, inside in zip(read, ordered, strict=True):
                for run in self._walk(inside, one.start):
                    self._follow(run.start, int(inside.layers[run.unit]), run.entries)
        before = runs.counts.cumsum(0)[runs.edges[1:] - 1]
        self.in_zeros = int(bins[torch.searchsorted(before, self.size)]) == 0

    def _walk(self, runs: _Runs, start: Tensor, first: int = 0, last: int | None = None) -> Iterator[_Open]:
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
            if not self._may_improve(one.distance, one.first):
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

        weights = start * self._units
        weights[layer] = 0
        least = int(weights[weights > 0].min()) if weights.any() else _BEYOND
        turn = least // int(self._units[layer]) - int(start[layer])
        falling, rising = range(1, min(entries - 1, turn) + 1), range(max(1, turn + 1), entries)
        for sizes, sign in ((falling, -1), (rising, 1)):
            place = bisect_left(sizes, sign * self._target, key=lambda more, sign=sign: sign * selected(more))
            if place < len(sizes):
                self._consider(counts(sizes[place]))
            if place > 0:  # and the first of those that are as near on the other side
                other = sign * selected(sizes[place - 1])
                place = bisect_left(sizes, other, key=lambda more, sign=sign: sign * selected(more))
                self._consider(counts(sizes[place]))

    def _may_improve(self, distance: int, first: int) -> bool:
        return (distance, first + 1) < self._best

    def _consider(self, counts: Tensor) -> None:
        """Compare top sets with the best so far: ``[S, layers]`` counts, each row larger than the one before."""
        distances = (self._selected(counts) - self._target).abs()
        row = int((distances == distances.min()).nonzero()[0])
        best = (int(distances[row]), int(counts[row].sum()))
        if best < self._best:
            self._best, self.counts = best, counts[row].clone()

    def _selected(self, counts: Tensor) -> Tensor:
        """Count the selected entries: ``[S, layers]`` counts to ``[S]``."""
        weights = counts * self._units
        least = weights.masked_fill(weights == 0, _BEYOND).amin(1, keepdim=True)
        return (self._steps.taken(self._connections(weights, least)) * self._steps.rows).sum(1)

    def _connections(self, weights: Tensor, least: Tensor) -> Tensor:
        """Compute ``floor(least_per_row * weight / least)``, where no weight is at least ``least_per_row``."""
        return (weights * self._least).div(least, rounding_mode="floor").clamp(min=self._least)

    def _distances(self, starts: Tensor, ends: Tensor) -> Tensor:
        """Bound the distances from the target between two counts, ``[S, layers]`` each, from below, ``[S]``."""
        low, high = starts * self._units, ends * self._units
        # The smallest weight inside is at most that of a layer that is there at the start, and at least what the
        # smallest one had then, or one entry of a layer that is not.
        most = high.masked_fill(low == 0, _BEYOND).amin(1, keepdim=True)
        least = torch.where(low > 0, low, self._units.where(high > 0, torch.tensor(_BEYOND))).amin(1, keepdim=True)
        fewest = self._steps.taken(self._connections(low, most))
        largest = self._steps.taken(self._connections(high, least))
        lowest, highest = (fewest * self._steps.rows).sum(1), (largest * self._steps.rows).sum(1)
        # All values inside differ from the lowest by a multiple of this.
        stride = _gcd(self._steps.rows.where(largest > fewest, torch.tensor(0)))
        inside = torch.tensor(self._target).clamp(lowest, highest)
        below = inside - (inside - lowest) % stride.clamp(min=1)
        above = torch.where(below + stride <= highest, below + stride, below)
        distances = torch.minimum((below - self._target).abs(), (above - self._target).abs())
        # Where nothing differs, the size at the start is the first of this distance.
        return distances.masked_fill((stride == 0) & starts.any(1), _BEYOND)


class _Source:
    """Scores by name, in the order in which the top set takes them.

    Args:
        scores: In memory or on disk.
        layer_of: The number of each parameter's layer.
        order: Which scores come first.
    """

    def __init__(self, scores: Mapping[str, AnyTensor], layer_of: Mapping[str, int], order: Order) -> None:
        self._scores = {name: score for name, score in scores.items() if score.numel()}
        self._layer_of, self._largest = layer_of, order == "largest"
        double = any(score.dtype == torch.float64 for score in scores.values())
        self._dtype = torch.float64 if double else torch.float32  # which holds every score exactly
        self._shift = 8 * self._dtype.itemsize - _BITS

    def _keys(self, name: str, score: AnyTensor) -> Iterator[Tensor]:
        """Yield a parameter's scores as integers, the first one of the order the largest."""
        first = 0
        for piece in pieces(score):
            if (nan := piece.isnan()).any():
                raise ValueError(no_rank(name, first + int(nan.nonzero()[0])))
            values = piece.to(self._dtype)
            yield ordered_keys(values if self._largest else -values)
            first += len(piece)

    def counted(self) -> tuple[Tensor, _Runs]:
        """Count the scores of each layer by their leading bits; reads all of them.

        Returns:
            ``[U]`` the leading bits, those that come first first; and the counts, a unit for each.
        """
        bins, layers, counts = [], [], []
        for name, score in self._scores.items():
            histogram = torch.zeros(2**_BITS, dtype=torch.int64)
            for keys in self._keys(name, score):
                leading = (keys >> self._shift) + 2 ** (_BITS - 1)
                histogram += torch.bincount(leading, minlength=2**_BITS).cpu()
            filled = histogram.nonzero().view(-1)
            bins.append(filled)
            counts.append(histogram[filled])
            layers.append(torch.full_like(filled, self._layer_of[name]))
        bins, order = torch.cat(bins).sort(descending=True, stable=True)
        bins, entries = bins.unique_consecutive(return_counts=True)
        edges = torch.cat([entries.new_zeros(1), entries.cumsum(0)])
        return bins - 2 ** (_BITS - 1), _Runs(torch.cat(layers)[order], torch.cat(counts)[order], edges)

    def ordered(self, bins: Tensor) -> list[_Runs]:
        """Put the scores of some leading bits into order; reads all scores.

        Args:
            bins: ``[U]`` as in :meth:`counted`, and in that order.

        Returns:
            For each of them its scores, every run a unit.
        """
        wanted = torch.zeros(2**_BITS, dtype=torch.bool)
        wanted[bins + 2 ** (_BITS - 1)] = True
        keys, layers, counts = [], [], []
        for name, score in self._scores.items():
            own = wanted.to(score.device)
            parts = [
                part[own[(part >> self._shift).long() + 2 ** (_BITS - 1)]].cpu() for part in self._keys(name, score)
            ]
            values, count = torch.cat(parts).unique(return_counts=True) if parts else (bins.new_empty(0),) * 2
            keys.append(values)
            counts.append(count)
            layers.append(torch.full_like(count, self._layer_of[name]))
        keys, order = torch.cat(keys).sort(descending=True, stable=True)  # of equal scores the earlier parameter's
        layers, counts = torch.cat(layers)[order], torch.cat(counts)[order]
        sizes = (keys >> self._shift).unique_consecutive(return_counts=True)[1].tolist()
        return [
            _Runs(own, count, torch.arange(len(own) + 1))
            for own, count in zip(layers.split(sizes), counts.split(sizes), strict=True)
        ]


def _gcd(numbers: Tensor) -> Tensor:
    """Compute the greatest common divisor of each row, 0 where all are 0: ``[S, J]`` to ``[S]``."""
    if not numbers.shape[1]:
        return numbers.new_zeros(len(numbers))
    while (columns := numbers.shape[1]) > 1:
        half = columns // 2
        rest = numbers[:, 2 * half :]
        numbers = torch.cat([torch.gcd(numbers[:, :half], numbers[:, half : 2 * half]), rest], 1)
    return numbers.view(-1)
