"""Ranges of rows or of columns of a parameter, which need no list of indices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Self, TypeAlias

import torch

from fishkern.arguments import count_of
from fishkern.selection.frozen import Frozen

Bounds: TypeAlias = tuple[tuple[int, int], ...]  # (start, stop) of each range, ascending, apart from each other


class Ranges(Frozen):
    """Ranges along one axis of a parameter; see :class:`Rows` and :class:`Columns`. Frozen.

    Args:
        ranges: Each a ``slice(start, stop)`` or a pair ``(start, stop)``, in any order. Those that overlap or touch
            become one, and empty ones are dropped.

    Raises:
        TypeError: A range is neither.
        ValueError: A range has a step, no stop, or ends before it starts.
    """

    bounds: Bounds
    """``(start, stop)`` of each range, ascending; between two of them is a gap."""

    def __init__(self, *ranges: slice | Sequence[int]) -> None:
        vars(self).update(bounds=_merged(map(_pair, ranges)))

    def __len__(self) -> int:
        """Count the rows or columns in the ranges."""
        return sum(stop - start for start, stop in self.bounds)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.bounds == self.bounds

    def __hash__(self) -> int:
        return hash((type(self), self.bounds))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.bounds))})"

    def __or__(self, other: Self) -> Self:
        return type(self)(*self.bounds, *other.bounds)

    def __and__(self, other: Self) -> Self:
        return type(self)(*_overlaps(self.bounds, other.bounds))

    def __sub__(self, other: Self) -> Self:
        return type(self)(*_overlaps(self.bounds, _gaps(other.bounds, self.end)))

    @property
    def end(self) -> int:
        """Where the last range stops; 0 without any."""
        return self.bounds[-1][1] if self.bounds else 0

    @staticmethod
    def size(shape: torch.Size) -> int:
        """Count all rows or columns of a parameter.

        Args:
            shape: The parameter's.

        Returns:
            Their number.
        """
        raise NotImplementedError


class Rows(Ranges):
    """Ranges of rows: of indices of the first axis of a parameter as it is stored.

    The entries of a vector are its rows. Rows are contiguous in memory, so a masked optimizer steps them in place.
    Frozen.

    Args:
        ranges: Each a ``slice(start, stop)`` or a pair ``(start, stop)``: ``Rows(slice(0, 64), slice(128, 192))``.

    Raises:
        TypeError: A range is neither.
        ValueError: A range has a step, no stop, or ends before it starts.
    """

    @staticmethod
    def size(shape: torch.Size) -> int:
        return shape[0] if shape else 1


class Columns(Ranges):
    """Ranges of columns: of flat indices of all axes of a parameter but the first.

    The entries of a vector are its columns. The entries of a column are apart in memory, so a masked optimizer gathers
    them by their indices, as it does those of a list. Frozen.

    Args:
        ranges: Each a ``slice(start, stop)`` or a pair ``(start, stop)``.

    Raises:
        TypeError: A range is neither.
        ValueError: A range has a step, no stop, or ends before it starts.
    """

    @staticmethod
    def size(shape: torch.Size) -> int:
        return shape[1:].numel() if len(shape) > 1 else shape.numel()


def _pair(given: Any) -> tuple[int, int]:
    """Read one range as it was given."""
    if isinstance(given, slice):
        if given.step not in (None, 1) or given.stop is None:
            raise ValueError(f"a range has a stop and no step, got {given}.")
        given = (given.start or 0, given.stop)
    if not isinstance(given, Sequence) or isinstance(given, str) or len(given) != 2:
        raise TypeError(f"a range is slice(start, stop) or (start, stop), got {given!r}.")
    start, stop = count_of(given[0], "the start of a range"), count_of(given[1], "the stop of a range")
    if stop < start:
        raise ValueError(f"a range starts before it stops, got ({start}, {stop}).")
    return start, stop


def _merged(pairs: Iterable[tuple[int, int]]) -> Bounds:
    """Sort ranges, join those that overlap or touch, and drop those that are empty."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(pair for pair in pairs if pair[0] < pair[1]):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return tuple(merged)


def _overlaps(ours: Bounds, theirs: Bounds) -> list[tuple[int, int]]:
    """Intersect two lists of ranges in one walk through both."""
    overlaps = []
    i = j = 0
    while i < len(ours) and j < len(theirs):
        start, stop = max(ours[i][0], theirs[j][0]), min(ours[i][1], theirs[j][1])
        if start < stop:
            overlaps.append((start, stop))
        if ours[i][1] < theirs[j][1]:
            i += 1
        else:
            j += 1
    return overlaps


def _gaps(bounds: Bounds, end: int) -> Bounds:
    """Give the ranges between those given, up to ``end``."""
    stops = [0, *(stop for _, stop in bounds)]
    starts = [*(start for start, _ in bounds), end]
    return _merged((stop, max(stop, start)) for stop, start in zip(stops, starts, strict=True))
