"""The candidates of one pass over scores: all that may still be among the ``k`` largest."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from fishkern.ops._arena import EMPTY, Arena, Span
from fishkern.ops._digits import nth_largest
from fishkern.ops._scores import Piece, refuse_nan

# A piece is folded into this many rows, at least and at most, and only columns whose largest score matters are read.
_FEWEST_ROWS, _MOST_ROWS = 4, 32
# Candidates are thinned out when this many more are held than needed (undecided ones: than twice as many).
_SLACK = 2**22
# Where at least one index in this many is a candidate, marking them all is quicker than sorting.
_SPARSE = 32
# Up to this many undecided scores are concatenated to find the one that decides; more are counted in place.
_SORTED = 2**22
# Above the bracket, equal to its upper end, inside it, equal to its lower end.
_CLASSES = ("above", "high", "inside", "low")


@dataclass
class _Chunk:
    """The candidates of one piece."""

    block: int
    offset: int
    bounds: Tensor | None
    spans: dict[str, Span]  # of each class: indices into the piece, ascending
    values: Span  # of those inside the bracket

    def __len__(self) -> int:
        return sum(map(len, self.spans.values()))

    @property
    def piece(self) -> Piece:
        """The piece, without its values."""
        return Piece(self.block, self.offset, EMPTY.memory, self.bounds)

    @property
    def indices(self) -> Tensor:
        parts = [span.tensor for span in self.spans.values() if len(span)]
        if len(parts) == 1:
            return parts[0]
        end = max(int(part[-1]) for part in parts) + 1
        if sum(map(len, parts)) * _SPARSE < end:
            return torch.cat(parts).sort().values
        marked = parts[0].new_zeros(end, dtype=torch.bool)
        for part in parts:
            marked[part] = True
        return marked.nonzero().view(-1)


class Candidates:
    """Collect the ``k`` largest scores of a stream, given a bracket in which the ``k``-th largest is believed to lie.

    Above the bracket: indices only. Inside: indices and values. Below: dropped. Scores equal to a finite end are
    classes of their own, indices only: a value that many scores share (zero above all) is an end of the bracket
    whenever it is near the ``k``-th largest, because a sample contains it many times.

    As soon as there are ``k`` scores at or above some value, no later score of that value can be among the first ``k``
    (ties go to the earlier one), so that from then on only larger ones are collected.

    Args:
        k: How many to select.
        low: Lower end of the bracket.
        high: Upper end; infinity to keep the value of everything above ``low``.
        largest: Whether larger scores come first. If not, all values here are the negated scores.
        density: The share of all scores that ``k`` is; only the speed depends on it.
    """

    def __init__(self, k: int, low: float, high: float, *, largest: bool, density: float) -> None:
        self._k, self._low, self._high, self._largest = k, low, high, largest
        # A later score can be among the first k only if it is at least `_floor`, or if `_strict`, above it. The floor
        # only rises: `low` until k scores at or above it are held, then `low` strictly; after thinning out, the k-th
        # largest value held, or `high`, strictly, since ties go to the earlier score, which is held.
        self._floor, self._strict = low, False
        self._held = dict.fromkeys(_CLASSES, 0)
        self._rows = _rows(density)
        self._chunks: list[_Chunk] = []
        self._arenas: dict[str, Arena] = defaultdict(Arena)

    @property
    def too_many(self) -> bool:
        """Whether the ``k``-th largest is above the bracket."""
        return self._held["above"] > self._k

    @property
    def too_few(self) -> bool:
        """Whether, at the end of the stream, it is below."""
        return self._total < self._k

    @property
    def _total(self) -> int:
        return sum(self._held.values())

    def add(self, piece: Piece) -> None:
        """Collect the candidates of the next piece.

        Args:
            piece: Its values need not outlive the call.

        Raises:
            NaNScoreError: One of them is NaN.
        """
        indices, values = _reaching(piece, self._floor, self._rows, strict=self._strict, largest=self._largest)
        if len(indices) == 0:
            return
        values = values if self._largest else values.neg_()
        above = high = low = indices.new_empty(0)
        if self._high < math.inf:
            above, indices, values = _split_off(values > self._high, indices, values)
            high, indices, values = _split_off(values == self._high, indices, values)
        if self._low > -math.inf:
            low, indices, values = _split_off(values == self._low, indices, values)
        spans = {}
        for name, members in zip(_CLASSES, (above, high, indices, low), strict=True):
            self._held[name] += len(members)
            spans[name] = self._arenas[name].put(members)
        self._chunks.append(_Chunk(piece.block, piece.offset, piece.bounds, spans, self._arenas["values"].put(values)))
        self._bound_memory()

    def _bound_memory(self) -> None:
        """Thin out where that is due, and raise the floor where ties can be dropped."""
        held, total = self._held, self._total
        need = max(0, self._k - held["above"] - held["high"])  # of those below the upper end
        # With k at or above the upper end, all below it can go, once: after that the floor is this end.
        decided = need == 0 and not (self._strict and self._floor == self._high)
        # Ties at the ends can be cut to the first ones without a look at values. Undecided scores are cut to half at
        # least, so that the work of all cuts together is a multiple of that of the pass.
        surplus = min(total - self._k, held["high"] + held["low"])
        if decided or surplus > _SLACK or held["inside"] > 2 * need + _SLACK:
            self._thin_out()
        elif self._floor == self._low and total >= self._k:
            self._strict = True

    def finish(self) -> tuple[Iterator[tuple[Piece, Tensor]], float | None]:
        """Decide.

        Returns:
            For each piece with any of the ``k`` largest, the last piece first: the piece without its values, and the
            indices, ascending. And the ``k``-th largest value, ``None`` where it is only known to be above the bracket.
        """
        threshold = self._thin_out()
        return self._drained(), threshold

    def counts(self, num_blocks: int) -> list[int]:
        """Count the candidates of each block, except for small ones that came in pieces of several blocks.

        Args:
            num_blocks: Of the stream.

        Returns:
            The counts.
        """
        counts = [0] * num_blocks
        for chunk in self._chunks:
            if chunk.bounds is None:
                counts[chunk.block] += len(chunk)
        return counts

    def _drained(self) -> Iterator[tuple[Piece, Tensor]]:
        self._arenas.clear()
        while self._chunks:  # the last ones first, whose memory is freed first
            chunk = self._chunks.pop()
            yield chunk.piece, chunk.indices

    def _thin_out(self) -> float | None:
        """Drop candidates that cannot be among the first ``k`` of those held.

        Returns:
            The ``k``-th largest value held; ``None`` where it is above the bracket, or fewer are held.
        """
        held = self._held
        need = max(0, self._k - held["above"])
        threshold = self._high if need else None
        self._keep_first("high", need)
        need -= held["high"]
        if need == 0:
            self._floor, self._strict = self._high, True
            for chunk in self._chunks:
                chunk.spans["inside"] = chunk.values = EMPTY
            held["inside"] = 0
        elif held["inside"] >= need:
            threshold = self._keep_largest(need)
            self._floor, self._strict = threshold, True
        else:
            threshold = self._low if held["inside"] + held["low"] >= need else None
        self._keep_first("low", need - held["inside"])
        self._chunks = [chunk for chunk in self._chunks if len(chunk)]
        return threshold

    def _keep_first(self, end: Literal["high", "low"], count: int) -> None:
        """Keep the first ``count`` of the scores equal to an end of the bracket."""
        if self._held[end] <= count:
            return
        self._held[end] = count
        for chunk in self._chunks:
            first = chunk.spans[end].first(count)
            chunk.spans[end] = first if len(first) else EMPTY  # which frees the memory
            count -= len(first)

    def _keep_largest(self, need: int) -> float:
        """Keep the ``need`` largest of those inside the bracket, and return the smallest of them."""
        chunks = [chunk for chunk in self._chunks if len(chunk.spans["inside"])]
        values = partial(map, lambda chunk: chunk.values.tensor, chunks)
        inside = self._held["inside"]
        if inside <= _SORTED:
            threshold = torch.cat([part.cpu() for part in values()]).kthvalue(inside - need + 1).values.item()
        else:
            threshold = nth_largest(values, need, chunks[0].values.memory.dtype)
        ties = need - sum(int((part > threshold).sum()) for part in values())
        self._arenas["inside"], self._arenas["values"] = Arena(), Arena()
        for chunk, part in zip(chunks, values(), strict=True):
            keep = part > threshold
            equal = (part == threshold).nonzero().view(-1)[:ties]
            keep[equal] = True
            ties -= len(equal)
            chunk.spans["inside"] = self._arenas["inside"].put(chunk.spans["inside"].tensor[keep])
            chunk.values = self._arenas["values"].put(part[keep])
        self._held["inside"] = need
        return threshold


def _split_off(which: Tensor, indices: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the indices of some scores, and the remaining indices and values."""
    if not which.any():
        return indices.new_empty(0), indices, values
    if which.all():
        return indices, indices.new_empty(0), values.new_empty(0)
    return indices[which], indices[~which], values[~which]


def _rows(density: float) -> int:
    """Choose the fold for which finding the columns costs about as much as reading them, at this share of hits."""
    balanced = 2 ** round(math.log2(0.5 / math.sqrt(density)))
    return min(max(balanced, _FEWEST_ROWS), _MOST_ROWS)


def _reaching(piece: Piece, floor: float, rows: int, *, strict: bool, largest: bool) -> tuple[Tensor, Tensor]:
    """Find the scores at or above the floor (only above it, if strict): their indices, ascending, and new values."""
    values = piece.values
    reaches = (torch.gt if strict else torch.ge) if largest else (torch.lt if strict else torch.le)
    floor = floor if largest else -floor
    columns = len(values) // rows
    table, rest = values[: columns * rows].view(rows, columns), values[columns * rows :]
    best = table.amax(0) if largest else table.amin(0)  # NaN wins
    if (best.sum() + rest.sum()).isnan():  # also where infinities of both signs meet
        refuse_nan(piece)
    hit_columns = reaches(best, floor).nonzero().view(-1)
    if 2 * len(hit_columns) > columns:
        indices = reaches(values, floor).nonzero().view(-1)
        return _narrow(indices, values), values[indices]
    narrow_table = table.index_select(1, hit_columns).view(-1)  # [rows * hit columns]
    hits = reaches(narrow_table, floor).nonzero().view(-1)  # ascending, so that they are in the whole table too
    row = hits.div(max(1, len(hit_columns)), rounding_mode="floor")
    in_rest = reaches(rest, floor).nonzero().view(-1)
    indices = torch.cat([row * columns + hit_columns[hits - row * len(hit_columns)], in_rest + columns * rows])
    return _narrow(indices, values), torch.cat([narrow_table[hits], rest[in_rest]])


def _narrow(indices: Tensor, values: Tensor) -> Tensor:
    return indices.to(torch.int32) if len(values) <= 2**31 else indices
