"""The candidates of one pass over scores: all that may still be among the ``k`` largest."""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fishkern.ops._arena import EMPTY, Arena, Span
from fishkern.ops._digits import nth_largest
from fishkern.ops._scores import Piece, floats, refuse_nan

# Candidates are thinned out when this many more are held than needed (undecided ones: than twice as many).
_SLACK = 2**22
# Where at least one score in this many is a candidate, a bit for each score is less than an index for each candidate,
# and marking candidates is quicker than sorting them.
_SPARSE = 32
# Up to this many undecided scores are concatenated to find the one that decides; more are counted in place.
_SORTED = 2**22
# Above the bracket, equal to its upper end, inside it, equal to its lower end.
_CLASSES = ("above", "high", "inside", "low")


@dataclass(frozen=True, slots=True)
class Members:
    """Some scores of a piece.

    Attributes:
        span: Their indices into the piece, ascending, int32; or a bit for each score, uint8, where that is less and no
            values go with them.
        count: How many they are.
    """

    span: Span
    count: int

    @property
    def packed(self) -> bool:
        """Whether there are bits."""
        return self.span.memory.dtype == np.uint8

    def first(self, count: int) -> Members:
        """Take the first of them.

        Args:
            count: How many at most.

        Returns:
            Those.
        """
        if count >= self.count:
            return self
        if count == 0:
            return NONE
        if not self.packed:
            return Members(Span(self.span.memory, self.span.start, self.span.start + count), count)
        marked = np.unpackbits(self.span.array)
        marked[np.flatnonzero(marked)[count] :] = 0
        return Members(_whole(np.packbits(marked)), count)


NONE = Members(EMPTY, 0)


@dataclass(slots=True)
class Chunk:
    """The candidates of one piece.

    Attributes:
        piece: The piece, without its values.
        members: Those of each class.
        values: Of the class inside the bracket.
    """

    piece: Piece
    members: dict[str, Members]
    values: Span

    def __len__(self) -> int:
        return sum(members.count for members in self.members.values())

    def indices(self) -> np.ndarray:
        """Join the classes.

        Returns:
            Indices into the piece, ascending.
        """
        members = [own for own in self.members.values() if own.count]
        bits = [own.span.array for own in members if own.packed]
        parts = [own.span.array for own in members if not own.packed]
        if bits:
            marked = np.unpackbits(np.bitwise_or.reduce(bits)).view(bool)
        elif len(parts) == 1:
            return parts[0]
        elif len(self) * _SPARSE < (end := max(int(part[-1]) for part in parts) + 1):
            return np.sort(np.concatenate(parts))
        else:
            marked = np.zeros(end, dtype=bool)
        for part in parts:
            marked[part] = True
        return np.flatnonzero(marked)


class Candidates:
    """Collect the ``k`` largest scores of a stream, given a bracket in which the ``k``-th largest is believed to lie.

    Above the bracket: places only. Inside: places and values. Below: dropped. Scores equal to a finite end are classes
    of their own, places only: a value that many scores share (zero above all) is an end of the bracket whenever it is
    near the ``k``-th largest, because a sample contains it many times.

    As soon as there are ``k`` scores at or above some value, no later score of that value can be among the first ``k``
    (ties go to the earlier one), so that from then on only larger ones are collected.

    Args:
        k: How many to select.
        low: Lower end of the bracket.
        high: Upper end; infinity to keep the value of everything above ``low``.
        largest: Whether larger scores come first. If not, all values here are the negated scores.
        dtype: float32 or float64, in which scores are compared.
    """

    def __init__(self, k: int, low: float, high: float, *, largest: bool, dtype: torch.dtype) -> None:
        self._k, self._low, self._high, self._largest, self._dtype = k, low, high, largest, dtype
        # Whether a later score must exceed the floor to be among the first k, or only reach it. The floor only rises:
        # `low` until k scores at or above it are held, then above `low`; after thinning out, above the k-th largest
        # value held, or above `high`, since ties go to the earlier score, which is held.
        self._floor, self._exceed = low, False
        self._held = dict.fromkeys(_CLASSES, 0)
        self._chunks: list[Chunk] = []
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

    def search(self, piece: Piece) -> Chunk:
        """Find what may be among the largest in a piece, by what is known from the pieces that have been added.

        This changes nothing, and with less known it only finds more, so that threads can do it for several pieces.

        Args:
            piece: Its values need not outlive the call.

        Returns:
            What was found, maybe nothing.

        Raises:
            NaNScoreError: One of the scores is NaN.
        """
        floor, exceed = self._floor, self._exceed
        sign = 1 if self._largest else -1
        above, below = (operator.gt, operator.lt) if self._largest else (operator.lt, operator.gt)
        misses = (operator.le if self._largest else operator.ge) if exceed else below
        scores = floats(piece.values, self._dtype)
        inside = ~misses(scores, sign * floor)  # NaN, too
        members = dict.fromkeys(_CLASSES, NONE)
        if self._high < math.inf:
            beyond = above(scores, sign * self._high)
            inside ^= beyond
            members["above"] = _members(beyond)
        ends = {"high": self._high} if self._high < math.inf else {}
        ends |= {"low": self._low} if self._low > -math.inf else {}
        if _SPARSE * _count(inside) > len(scores):  # maybe because many are equal
            for name, end in ends.items():
                tied = (scores == sign * end) & inside
                inside ^= tied
                members[name] = _members(tied)
            ends = {}
        indices = _places(inside)
        values = _array(scores[indices])
        indices = _array(indices)
        if np.isnan(values).any():
            refuse_nan(piece)
        if not self._largest:
            values = -values
        for name, end in ends.items():
            members[name], indices, values = _split_off(values == end, indices, values)
        members["inside"] = _listed(indices)
        return Chunk(Piece(piece.block, piece.offset, _NO_VALUES, piece.bounds), members, _whole(values))

    def add(self, chunk: Chunk) -> None:
        """Take the candidates of the next piece.

        Args:
            chunk: What :meth:`search` has found there, maybe before the last few pieces were added.
        """
        if not len(chunk):
            return
        for name, members in chunk.members.items():
            self._held[name] += members.count
            arena = self._arenas[f"bits of {name}" if members.packed else name]
            chunk.members[name] = Members(arena.put(members.span.array), members.count)
        chunk.values = self._arenas["values"].put(chunk.values.array)
        self._chunks.append(chunk)
        self._bound_memory()

    def _bound_memory(self) -> None:
        """Thin out where that is due, and raise the floor where ties can be dropped."""
        held, total = self._held, self._total
        need = max(0, self._k - held["above"] - held["high"])  # of those below the upper end
        # With k at or above the upper end, all below it can go, once: after that the floor is this end.
        decided = need == 0 and not (self._exceed and self._floor == self._high)
        # Ties at the ends can be cut to the first ones without a look at values. Undecided scores are cut to half at
        # least, so that the work of all cuts together is a multiple of that of the pass.
        surplus = min(total - self._k, held["high"] + held["low"])
        if decided or surplus > _SLACK or held["inside"] > 2 * need + _SLACK:
            self._thin_out()
        elif self._floor == self._low and total >= self._k:
            self._exceed = True

    def finish(self) -> tuple[Iterator[Chunk], float | None]:
        """Decide.

        Returns:
            For each piece with any of the ``k`` largest, the last piece first, which of its scores they are. And the
            ``k``-th largest value, ``None`` where it is only known to be above the bracket.
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
            if chunk.piece.bounds is None:
                counts[chunk.piece.block] += len(chunk)
        return counts

    def _drained(self) -> Iterator[Chunk]:
        self._arenas.clear()
        while self._chunks:  # the last ones first, whose memory is freed first
            yield self._chunks.pop()

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
            self._exceed, self._floor = True, self._high
            for chunk in self._chunks:
                chunk.members["inside"], chunk.values = NONE, EMPTY
            held["inside"] = 0
        elif held["inside"] >= need:
            threshold = self._keep_largest(need)
            self._exceed, self._floor = True, threshold
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
            chunk.members[end] = chunk.members[end].first(count)
            count -= chunk.members[end].count

    def _keep_largest(self, need: int) -> float:
        """Keep the ``need`` largest of those inside the bracket, and return the smallest of them."""
        chunks = [chunk for chunk in self._chunks if len(chunk.values)]
        rank = self._held["inside"] - need
        if self._held["inside"] <= _SORTED:
            threshold = np.partition(np.concatenate([chunk.values.array for chunk in chunks]), rank)[rank].item()
        else:
            threshold = nth_largest(
                lambda: (torch.from_numpy(chunk.values.array) for chunk in chunks), need, self._dtype
            )
        ties = need - sum(np.count_nonzero(chunk.values.array > threshold) for chunk in chunks)
        self._arenas["inside"], self._arenas["values"] = Arena(), Arena()
        for chunk in chunks:
            values = chunk.values.array
            keep = values > threshold
            equal = np.flatnonzero(values == threshold)[:ties]
            keep[equal] = True
            ties -= len(equal)
            indices = self._arenas["inside"].put(np.compress(keep, chunk.members["inside"].span.array))
            chunk.members["inside"] = Members(indices, len(indices))
            chunk.values = self._arenas["values"].put(np.compress(keep, values))
        self._held["inside"] = need
        return threshold


_NO_VALUES = torch.empty(0)


def _count(which: np.ndarray | Tensor) -> int:
    return np.count_nonzero(which) if isinstance(which, np.ndarray) else int(which.sum())


def _places(which: np.ndarray | Tensor) -> np.ndarray | Tensor:
    """Find where a mask ``[n]`` is true, in ascending order."""
    return np.flatnonzero(which) if isinstance(which, np.ndarray) else which.nonzero().view(-1)


def _array(entries: np.ndarray | Tensor) -> np.ndarray:
    return entries if isinstance(entries, np.ndarray) else entries.cpu().numpy()


def _whole(array: np.ndarray) -> Span:
    return Span(array, 0, len(array))


def _listed(indices: np.ndarray) -> Members:
    return Members(_whole(indices.astype(np.int32)), len(indices))


def _members(which: np.ndarray | Tensor) -> Members:
    """Keep where a mask ``[n]`` is true in the form that takes less memory."""
    if _SPARSE * (count := _count(which)) > len(which):
        return Members(_whole(np.packbits(_array(which))), count)
    return _listed(_array(_places(which)))


def _split_off(which: np.ndarray, indices: np.ndarray, values: np.ndarray) -> tuple[Members, np.ndarray, np.ndarray]:
    """Return some scores, and the remaining indices and values."""
    if not which.any():
        return NONE, indices, values
    rest = ~which
    return _listed(np.compress(which, indices)), np.compress(rest, indices), np.compress(rest, values)
