"""What one pass over scores keeps: everything that may still be among the ``k`` largest."""

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

# A piece is folded into so many rows, at least and at most, and only columns whose largest score matters are looked at.
_FEWEST_ROWS, _MOST_ROWS = 4, 32
# What is held beyond need is thinned out when there are so many more (of undecided scores twice as many, and these).
_SLACK = 2**22
# Where at least one place in so many is taken, marking them all is quicker than sorting.
_SPARSE = 32
# Up to so many undecided scores are put together to find the one that decides; more are counted where they lie.
_SORTED = 2**22


@dataclass
class _Chunk:
    """What is kept of one piece; indices into the piece, ascending."""

    block: int
    offset: int
    bounds: Tensor | None
    above: Span
    high: Span
    inside: Span
    values: Span  # of those inside
    low: Span

    def __len__(self) -> int:
        return len(self.above) + len(self.high) + len(self.inside) + len(self.low)

    @property
    def piece(self) -> Piece:
        """The piece, without its values."""
        return Piece(self.block, self.offset, EMPTY.memory, self.bounds)

    @property
    def indices(self) -> Tensor:
        parts = [part.tensor for part in (self.above, self.high, self.inside, self.low) if len(part)]
        if len(parts) == 1:
            return parts[0]
        end = max(int(part[-1]) for part in parts) + 1
        if sum(map(len, parts)) * _SPARSE < end:
            return torch.cat(parts).sort().values
        found = parts[0].new_zeros(end, dtype=torch.bool)
        for part in parts:
            found[part] = True
        return found.nonzero().view(-1)


class Candidates:
    """Collect the ``k`` largest scores of a stream, given a bracket in which the ``k``-th largest is believed to lie.

    What is above the bracket is kept as an index, what is inside with its value, what is below not at all. Scores equal
    to a finite end are classes of their own, kept as indices: a value that many scores share (zero above all) is an end
    of the bracket whenever it is near the ``k``-th largest, for a sample finds it many times.

    As soon as ``k`` scores at or above some value are held, no later score of that value can be among the first ``k``
    (ties go to the earlier one), so that from then on only larger ones are looked at.

    Args:
        k: How many are wanted.
        low: Lower end of the bracket.
        high: Upper end; infinity to keep the value of everything above ``low``.
        largest: Whether larger scores come first. If not, all values here are the negated scores.
        density: Which share of all scores ``k`` is; sets how the work is done, and nothing else.
    """

    def __init__(self, k: int, low: float, high: float, largest: bool, density: float) -> None:
        self._k, self._low, self._high, self._largest = k, low, high, largest
        self._floor, self._strict = low, False
        self._above = self._at_high = self._inside = self._at_low = 0  # how many are held
        self._rows = _rows(density)
        self._chunks: list[_Chunk] = []
        self._arenas: dict[str, Arena] = defaultdict(Arena)

    @property
    def too_many(self) -> bool:
        """Whether the ``k``-th largest lies above the bracket."""
        return self._above > self._k

    @property
    def too_few(self) -> bool:
        """Whether, at the end of the stream, it lies below."""
        return self._held < self._k

    @property
    def _held(self) -> int:
        return self._above + self._at_high + self._inside + self._at_low

    def add(self, piece: Piece) -> None:
        """Look at the next piece.

        Args:
            piece: Its values need not outlive the call.

        Raises:
            NaNScoreError: One of them is NaN.
        """
        indices, values = _reaching(piece, self._floor, self._strict, self._largest, self._rows)
        if len(indices) == 0:
            return
        values = values if self._largest else values.neg_()
        above = high = low = indices.new_empty(0)
        if self._high < math.inf:
            above, indices, values = _taken(values > self._high, indices, values)
            high, indices, values = _taken(values == self._high, indices, values)
        if self._low > -math.inf:
            low, indices, values = _taken(values == self._low, indices, values)
        self._above += len(above)
        self._at_high += len(high)
        self._inside += len(indices)
        self._at_low += len(low)
        kept = {"above": above, "high": high, "inside": indices, "values": values, "low": low}
        spans = {name: self._arenas[name].put(tensor) for name, tensor in kept.items()}
        self._chunks.append(_Chunk(piece.block, piece.offset, piece.bounds, **spans))
        need = max(0, self._k - self._above - self._at_high)
        decided = need == 0 and not (self._strict and self._floor == self._high)
        surplus = min(self._held - self._k, self._at_high + self._at_low)
        if decided or surplus > _SLACK or self._inside > 2 * need + _SLACK:
            self._thin_out()
        elif self._floor == self._low and self._held >= self._k:
            self._strict = True

    def finish(self) -> tuple[Iterator[tuple[Piece, Tensor]], float | None]:
        """Decide.

        Returns:
            For each piece that holds any, the last piece first, itself without its values and the indices of the ``k``
            largest, ascending. And the ``k``-th largest value, ``None`` where it is only known to lie above the
            bracket.
        """
        threshold = self._thin_out()
        return self._drained(), threshold

    def counts(self, num_blocks: int) -> list[int]:
        """Count what is held of each block, but for the small ones that came in pieces of several blocks.

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
        while self._chunks:  # the memory of the last ones is free first
            chunk = self._chunks.pop()
            yield chunk.piece, chunk.indices

    def _thin_out(self) -> float | None:
        """Drop what cannot be among the first ``k`` of what is held.

        Returns:
            The ``k``-th largest value held; ``None`` where it lies above the bracket, or fewer are held.
        """
        need = max(0, self._k - self._above)
        threshold = self._high if need else None
        self._at_high = self._keep_first("high", self._at_high, need)
        need -= self._at_high
        if need == 0:
            self._floor, self._strict = self._high, True
            for chunk in self._chunks:
                chunk.inside = chunk.values = EMPTY
            self._inside = 0
        elif self._inside >= need:
            threshold = self._keep_largest(need)
            self._floor, self._strict = threshold, True
        else:
            threshold = self._low if self._inside + self._at_low >= need else None
        self._at_low = self._keep_first("low", self._at_low, need - self._inside)
        self._chunks = [chunk for chunk in self._chunks if len(chunk)]
        return threshold

    def _keep_first(self, end: Literal["high", "low"], held: int, wanted: int) -> int:
        """Keep the first ``wanted`` of the scores equal to an end of the bracket."""
        left = wanted
        for chunk in self._chunks if held > wanted else ():
            kept = getattr(chunk, end).first(left)
            setattr(chunk, end, kept if len(kept) else EMPTY)
            left -= len(kept)
        return min(held, wanted)

    def _keep_largest(self, need: int) -> float:
        """Keep just as many as are needed of those inside the bracket."""
        chunks = [chunk for chunk in self._chunks if len(chunk.inside)]
        values = partial(map, lambda chunk: chunk.values.tensor, chunks)
        if self._inside <= _SORTED:
            threshold = torch.cat([part.cpu() for part in values()]).kthvalue(self._inside - need + 1).values.item()
        else:
            threshold = nth_largest(values, need, chunks[0].values.memory.dtype)
        ties = need - sum(int((part > threshold).sum()) for part in values())
        self._arenas["inside"], self._arenas["values"] = Arena(), Arena()
        for chunk, part in zip(chunks, values(), strict=True):
            keep = part > threshold
            equal = (part == threshold).nonzero().view(-1)[:ties]
            keep[equal] = True
            ties -= len(equal)
            chunk.inside = self._arenas["inside"].put(chunk.inside.tensor[keep])
            chunk.values = self._arenas["values"].put(part[keep])
        self._inside = need
        return threshold


def _taken(which: Tensor, indices: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Take the indices of some scores out; the rest of the indices and their values follow."""
    if not which.any():
        return indices.new_empty(0), indices, values
    if which.all():
        return indices, indices.new_empty(0), values.new_empty(0)
    return indices[which], indices[~which], values[~which]


def _rows(density: float) -> int:
    """Fold so that finding the columns costs about as much as looking at them, where this share of scores is found."""
    wanted = 2 ** round(math.log2(0.5 / math.sqrt(density)))
    return min(max(wanted, _FEWEST_ROWS), _MOST_ROWS)


def _reaching(piece: Piece, floor: float, strict: bool, largest: bool, rows: int) -> tuple[Tensor, Tensor]:
    """Find the scores at or above the floor (only above it, if strict): their indices, ascending, and new values."""
    values = piece.values
    reaches = (torch.gt if strict else torch.ge) if largest else (torch.lt if strict else torch.le)
    floor = floor if largest else -floor
    columns = len(values) // rows
    table, rest = values[: columns * rows].view(rows, columns), values[columns * rows :]
    best = table.amax(0) if largest else table.amin(0)  # NaN wins
    if (best.sum() + rest.sum()).isnan():  # also where infinities of both signs meet
        refuse_nan(piece)
    hits = reaches(best, floor).nonzero().view(-1)
    if 2 * len(hits) > columns:
        indices = reaches(values, floor).nonzero().view(-1)
        return _narrow(indices, values), values[indices]
    looked_at = table.index_select(1, hits).view(-1)
    found = reaches(looked_at, floor).nonzero().view(-1)  # ascending in the table too
    row = found.div(max(1, len(hits)), rounding_mode="floor")
    in_rest = reaches(rest, floor).nonzero().view(-1)
    indices = torch.cat([row * columns + hits[found - row * len(hits)], in_rest + columns * rows])
    return _narrow(indices, values), torch.cat([looked_at[found], rest[in_rest]])


def _narrow(indices: Tensor, values: Tensor) -> Tensor:
    return indices.to(torch.int32) if len(values) <= 2**31 else indices
