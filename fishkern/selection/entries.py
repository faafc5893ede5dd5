"""The selected entries of one parameter: all, none, ranges of its rows or columns, or a list.

Everything that a selection does with one parameter is a method here: reading, set algebra, gathering and scattering
values. None is the same as no range of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fishkern.ops.streaming_topk import index_dtype
from fishkern.selection.frozen import Frozen
from fishkern.selection.ranges import Bounds, Columns, Ranges, Rows


class Entries(Frozen):
    """The selected entries of one parameter. ``a | b``, ``a & b`` and ``a - b`` combine them; frozen.

    ``==`` compares which entries are selected, not how that is written: ranges equal a list of the same entries, and
    ranges of every row equal all. Made by :meth:`all`, :meth:`none` and :meth:`of`.

    Attributes:
        shape: The parameter's shape.
        count: How many entries are selected.
        ranges: The selected rows or columns; ``None`` where the entries are listed, or all without being ranges.
        spans: The flat ``(start, stop)`` of each range of rows, ascending, or of all entries; ``None`` for other ones.
    """

    shape: torch.Size
    count: int
    ranges: Ranges | None
    spans: Bounds | None
    _listed: Tensor | None

    def __init__(self, shape: torch.Size, selected: Ranges | Tensor | None) -> None:
        count, spans = shape.numel(), ((0, shape.numel()),)  # of all
        if isinstance(selected, Ranges):
            size, width = selected.size(shape), shape[1:].numel()
            count = len(selected) * (count // size) if size else 0
            spans = tuple((start * width, stop * width) for start, stop in selected.bounds)
            spans = spans if isinstance(selected, Rows) else None
        elif selected is not None:
            count, spans = len(selected), None
        ranges = selected if isinstance(selected, Ranges) else None
        listed = selected if isinstance(selected, Tensor) else None
        vars(self).update(shape=shape, count=count, ranges=ranges, spans=spans, _listed=listed)

    @classmethod
    def all(cls, shape: torch.Size) -> Entries:
        """Select every entry of a parameter of this shape."""
        return cls(shape, None) if shape.numel() else cls.none(shape)

    @classmethod
    def none(cls, shape: torch.Size) -> Entries:
        """Select no entry of a parameter of this shape."""
        return cls(shape, Rows())

    @classmethod
    def of(cls, shape: torch.Size, selected: Ranges | Tensor, name: str = "the parameter") -> Entries:
        """Select rows, columns or listed entries, after checking them.

        Args:
            shape: The parameter's shape.
            selected: Ranges, or flat (row-major) indices ``[K]``, distinct integers in any order, copied.
            name: The parameter's, for messages.

        Returns:
            The entries. A list of all of them becomes all.

        Raises:
            TypeError: It is neither ranges nor a tensor of indices.
            ValueError: Indices repeat, or something is outside the parameter.
        """
        if isinstance(selected, Ranges):
            return _normal(shape, _checked_ranges(shape, selected, name))
        return _normal(shape, _checked_indices(shape.numel(), selected, name))

    @property
    def is_all(self) -> bool:
        """Whether every entry is selected, of at least one."""
        return self.count == self.shape.numel() > 0

    @property
    def _width(self) -> int:
        """Entries in a row, and the number of columns of a parameter that is no vector."""
        return self.shape[1:].numel()

    def indices(self) -> Tensor:
        """List the entries.

        Returns:
            Flat (row-major) indices ``[K]``, ascending, on the CPU; int32, or int64 for a parameter of more than 2^31
            entries. Not to be changed.
        """
        dtype = index_dtype(self.shape.numel())
        if self.spans is not None:
            return _aranges(self.spans, dtype)
        if self.ranges is None:
            return self._listed
        rows = torch.arange(self.shape[0], dtype=dtype) * self._width
        return (rows[:, None] + _aranges(self.ranges.bounds, dtype)).view(-1)

    def mask(self) -> Tensor:
        """Mark the entries.

        Returns:
            Of the parameter's shape, bool on the CPU; True = selected.
        """
        mask = torch.zeros(self.shape, dtype=torch.bool)
        self.fill_(mask.view(-1), True)
        return mask

    def gather(self, tensor: Tensor) -> Tensor:
        """Read the selected entries of a parameter or of its gradient.

        Args:
            tensor: Of the parameter's shape, any strides, on any device.

        Returns:
            ``[K]`` on the same device, in ascending order of the entries. One range of rows of a contiguous tensor is
            a view of it.
        """
        flat = tensor.detach().contiguous().view(-1)
        if self.spans is not None:
            parts = [flat[start:stop] for start, stop in self.spans]
            return parts[0] if len(parts) == 1 else torch.cat([flat[:0], *parts])
        if self.ranges is not None:
            matrix = flat.view(-1, self._width)
            return torch.cat([matrix[:, start:stop] for start, stop in self.ranges.bounds], dim=1).view(-1)
        return flat.index_select(0, self._listed.to(flat.device))

    def scatter_(self, tensor: Tensor, values: Tensor) -> None:
        """Write the selected entries of a parameter.

        Args:
            tensor: Of the parameter's shape, any strides, on any device; changed in place.
            values: ``[K]`` on the same device, in ascending order of the entries; cast to the tensor's dtype.
        """
        flat = tensor.detach().contiguous().view(-1)
        if self.spans is not None:
            lengths = [stop - start for start, stop in self.spans]
            for (start, stop), part in zip(self.spans, values.split(lengths) if lengths else (), strict=True):
                flat[start:stop] = part
        else:
            flat[self.indices().long().to(flat.device)] = values.to(flat.dtype)
        if not tensor.is_contiguous():
            tensor.detach().copy_(flat.view(tensor.shape))

    def fill_(self, flat: Tensor, value: float | bool, start: int = 0) -> None:
        """Set the selected entries in one piece of a flattened parameter.

        Args:
            flat: ``[n]``, the parameter's entries from ``start`` on; changed in place.
            value: What they become.
            start: The flat index of the piece's first entry.
        """
        stop = start + len(flat)
        if self.spans is not None:
            for first, last in self.spans:
                flat[max(first - start, 0) : max(min(last, stop) - start, 0)] = value
        elif self.ranges is not None:
            columns = torch.zeros(self._width, dtype=torch.bool, device=flat.device)
            for first, last in self.ranges.bounds:
                columns[first:last] = True
            flat[columns[torch.arange(start, stop, device=flat.device) % self._width]] = value
        else:
            ends = torch.searchsorted(self._listed, torch.tensor([start, stop], dtype=self._listed.dtype))
            flat[(self._listed[ends[0] : ends[1]].long() - start).to(flat.device)] = value

    def shared(self, other: Entries) -> int:
        """Count the entries that both select.

        Args:
            other: Entries of a parameter of the same shape.

        Returns:
            Their number.
        """
        return (self & other).count

    def moves(self, other: Entries) -> Iterator[tuple[slice | Tensor, slice | Tensor]]:
        """Say where the entries that both select are in compact tensors ``[K]`` of either.

        Args:
            other: Entries of a parameter of the same shape.

        Yields:
            Places in ``[K]`` of ours, and in ``[K]`` of the other's, both ascending: slices where both are rows.
        """
        if self.spans is None or other.spans is None:
            ours, theirs = self.indices(), other.indices()
            yield _are_in(ours, theirs).nonzero().view(-1), _are_in(theirs, ours).nonzero().view(-1)
            return
        spans = (self & other).spans
        places = zip(_places_of(spans, self.spans), _places_of(spans, other.spans), strict=True)
        for (start, stop), (first, second) in zip(spans, places, strict=True):
            yield slice(first, first + stop - start), slice(second, second + stop - start)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Entries):
            return NotImplemented
        if self.shape != other.shape or self.count != other.count:
            return False
        if self.is_all:
            return True
        if self.ranges is not None and type(self.ranges) is type(other.ranges):
            return self.ranges == other.ranges
        return torch.equal(self.indices(), other.indices())

    __hash__ = None  # type: ignore[assignment]

    def __or__(self, other: Entries) -> Entries:
        if self.is_all or other.is_all:
            return self if self.is_all else other
        return self._combined(other, Ranges.__or__, lambda ours, theirs: torch.cat([ours, theirs]).unique())

    def __and__(self, other: Entries) -> Entries:
        if self.is_all or other.is_all:
            return other if self.is_all else self
        return self._combined(other, Ranges.__and__, lambda ours, theirs: ours[_are_in(ours, theirs)])

    def __sub__(self, other: Entries) -> Entries:
        if other.is_all:
            return Entries.none(self.shape)
        return self._combined(other, Ranges.__sub__, lambda ours, theirs: ours[~_are_in(ours, theirs)])

    def __repr__(self) -> str:
        how = "all" if self.is_all else "listed" if self.ranges is None else repr(self.ranges)
        return f"Entries({self.count:,} of {tuple(self.shape)}: {how})"

    def _combined(
        self,
        other: Entries,
        of_ranges: Callable[[Ranges, Ranges], Ranges],
        of_lists: Callable[[Tensor, Tensor], Tensor],
    ) -> Entries:
        """Combine ranges of one axis as ranges, everything else as lists."""
        for axis in (Rows, Columns):
            ours, theirs = self._along(axis), other._along(axis)
            if ours is not None and theirs is not None:
                return _normal(self.shape, of_ranges(ours, theirs))
        return _normal(self.shape, of_lists(self.indices(), other.indices()))

    def _along(self, axis: type[Ranges]) -> Ranges | None:
        """Give the entries as ranges of an axis; all and none of them are so along both."""
        if isinstance(self.ranges, axis):
            return self.ranges
        if self.is_all or self.count == 0:
            return axis((0, axis.size(self.shape) if self.count else 0))
        return None


def _normal(shape: torch.Size, selected: Ranges | Tensor) -> Entries:
    """Write none as no rows, a list or columns of all entries as all, and the columns of a vector as its rows."""
    entries = Entries(shape, selected)
    if entries.count == 0:
        return Entries.none(shape)
    if isinstance(selected, Columns) and len(shape) < 2:
        return Entries(shape, Rows(*selected.bounds))
    if entries.is_all and not isinstance(selected, Rows):
        return Entries.all(shape)
    return entries


def _checked_ranges(shape: torch.Size, ranges: Ranges, name: str) -> Ranges:
    if ranges.end > (size := ranges.size(shape)):
        what = type(ranges).__name__.lower()
        raise ValueError(f"{name} {tuple(shape)} has {size} {what}, but a range stops at {ranges.end}.")
    return ranges


def _checked_indices(numel: int, indices: Tensor, name: str) -> Tensor:
    """Return a copy of them, ascending, on the CPU, in the smallest dtype."""
    if not isinstance(indices, Tensor) or indices.dtype not in (torch.int64, torch.int32) or indices.ndim != 1:
        what = f"{indices.dtype} {tuple(indices.shape)}" if isinstance(indices, Tensor) else type(indices).__name__
        raise TypeError(f"indices are [K], int64 or int32; those of {name} are {what}.")
    indices = indices.detach().cpu()
    if not bool((indices[1:] > indices[:-1]).all()):
        indices = indices.sort().values
    for end in indices[[0, -1]].tolist() if len(indices) else ():
        if not 0 <= end < numel:
            raise ValueError(f"{name} has {numel} coordinates, but an index is {end}.")
    if not bool((indices[1:] > indices[:-1]).all()):
        raise ValueError(f"the indices of {name} repeat: each coordinate is selected once.")
    return indices.to(index_dtype(numel), copy=True)


def _aranges(spans: Bounds, dtype: torch.dtype) -> Tensor:
    parts = [torch.arange(start, stop, dtype=dtype) for start, stop in spans]
    return torch.cat([torch.empty(0, dtype=dtype), *parts])


def _are_in(some: Tensor, others: Tensor) -> Tensor:
    """Tell which of ``some`` are among ``others``; both ascending."""
    if len(others) == 0:
        return torch.zeros(len(some), dtype=torch.bool)
    places = torch.searchsorted(others, some).clamp_(max=len(others) - 1)
    return others[places] == some


def _places_of(parts: Bounds, spans: Bounds) -> Iterator[int]:
    """Give for each part, which is inside one of the spans, where it begins if the spans follow on each other."""
    before, spans_left = 0, iter(spans)
    span = next(spans_left, None)
    for start, _ in parts:
        while span[1] <= start:
            before += span[1] - span[0]
            span = next(spans_left)
        yield before + start - span[0]
