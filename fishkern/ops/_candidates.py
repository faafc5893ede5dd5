"""What one pass over scores keeps: everything that may still be among the ``k`` largest."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fishkern.ops._scores import Piece, refuse_nan

# A piece is folded into so many rows, at least and at most, and only columns whose largest score matters are looked at.
_FEWEST_ROWS, _MOST_ROWS = 4, 32
# Undecided scores are thinned out when there are twice as many as needed, and so many more.
_SLACK = 2**22


@dataclass
class _Chunk:
    """What is kept of one piece; indices into the piece, ascending."""

    piece: Piece
    sure: Tensor
    open: Tensor
    values: Tensor  # of the open ones


class Candidates:
    """Collect the ``k`` largest scores of a stream, given a bracket in which the ``k``-th largest is believed to lie.

    What is above the bracket is kept as an index, what is inside with its value, what is below not at all. As soon as
    ``k`` scores at or above some value are held, no later score of that value can be among the first ``k`` (ties go to
    the earlier one), so that from then on only larger ones are looked at.

    Args:
        k: How many are wanted.
        low: Lower end of the bracket.
        high: Upper end; infinity to keep the value of everything above ``low``.
        largest: Whether larger scores come first. If not, all values here are the negated scores.
        density: Which share of all scores ``k`` is; sets how the work is done, and nothing else.
    """

    def __init__(self, k: int, low: float, high: float, largest: bool, density: float) -> None:
        self.k, self.high, self.largest = k, high, largest
        self.floor, self.strict = low, False
        self.num_sure = self.num_open = 0
        self._rows = _rows(density)
        self._chunks: list[_Chunk] = []

    @property
    def too_many(self) -> bool:
        """Whether the ``k``-th largest lies above the bracket."""
        return self.num_sure > self.k

    @property
    def too_few(self) -> bool:
        """Whether, at the end of the stream, it lies below."""
        return self.num_sure + self.num_open < self.k

    def add(self, piece: Piece) -> None:
        """Look at the next piece.

        Args:
            piece: Its values need not outlive the call.

        Raises:
            NaNScoreError: One of them is NaN.
        """  # noqa: DOC502
        indices, values = _reaching(piece, self.floor, self.strict, self.largest, self._rows)
        if len(indices) == 0:
            return
        values = values if self.largest else values.neg_()
        sure = indices.new_empty(0)
        if self.high < float("inf"):
            above = values > self.high
            sure, indices, values = indices[above], indices[~above], values[~above]
        self.num_sure += len(sure)
        self.num_open += len(indices)
        self._chunks.append(_Chunk(_without_values(piece), sure, indices, values))
        if self.num_open > 2 * max(0, self.k - self.num_sure) + _SLACK:
            self._thin_out()

    def finish(self) -> tuple[Iterator[tuple[Piece, Tensor]], float | None]:
        """Decide.

        Returns:
            For each piece that holds any, itself without its values and the indices of the ``k`` largest, ascending;
            and the ``k``-th largest value, ``None`` where it is only known to lie above the bracket.
        """
        threshold = self._thin_out()
        return self._drained(), threshold

    def _drained(self) -> Iterator[tuple[Piece, Tensor]]:
        self._chunks.reverse()
        while self._chunks:  # each one's memory is free once it is written to its place
            chunk = self._chunks.pop()
            if len(chunk.sure) == 0:
                yield chunk.piece, chunk.open
            elif len(chunk.open) == 0:
                yield chunk.piece, chunk.sure
            else:
                yield chunk.piece, torch.cat([chunk.sure, chunk.open]).sort().values

    def _thin_out(self) -> float | None:
        """Keep just as many open ones as are still needed, if there are as many."""
        need = self.k - self.num_sure
        if need <= 0:
            for chunk in self._chunks:
                chunk.open, chunk.values = chunk.open.new_empty(0), chunk.values.new_empty(0)
            self.num_open, self.floor, self.strict = 0, self.high, True
            return None
        if self.num_open < need:
            return None
        values = torch.cat([chunk.values.cpu() for chunk in self._chunks])
        threshold = _nth_largest(values, need)
        ties = need - int((values > threshold).sum())
        del values
        for chunk in self._chunks:
            keep = chunk.values > threshold
            equal = (chunk.values == threshold).nonzero().view(-1)[:ties]
            keep[equal] = True
            ties -= len(equal)
            chunk.open, chunk.values = chunk.open[keep], chunk.values[keep]
        self._chunks = [chunk for chunk in self._chunks if len(chunk.sure) or len(chunk.open)]
        self.num_open, self.floor, self.strict = need, threshold, True
        return threshold


def _nth_largest(values: Tensor, n: int) -> float:
    return values.kthvalue(len(values) - n + 1).values.item()


def _without_values(piece: Piece) -> Piece:
    return Piece(piece.block, piece.offset, torch.empty(0), piece.bounds)  # a view would keep the memory


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
