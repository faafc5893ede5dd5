"""Selected entries where a rank holds a share of a parameter: from the whole parameter's numbering to the shard's.

An entry has one number everywhere that is saved or compared, its flat index in the whole parameter. A rank's shard has
a numbering of its own, by which values are gathered and scattered there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fishkern import hosts
from fishkern.files import Region
from fishkern.hosts import Share
from fishkern.ops.streaming_topk import index_dtype
from fishkern.selection.entries import Entries
from fishkern.selection.ranges import Columns, Ranges, Rows
from fishkern.selection.result import Selection


def held(share: Share) -> Entries:
    """Select what a rank holds.

    Args:
        share: The rank's share of a parameter.

    Returns:
        Entries of the whole parameter: some of its rows or of its columns, or of both.
    """
    cut = share.cut
    if len(cut) > 1:
        return Entries.of(share.shape, in_whole(Entries.all(share.local_shape), share))
    return Entries.of(share.shape, _range(share, cut[0])) if cut else Entries.all(share.shape)


def in_shard(entries: Entries, share: Share) -> Entries:
    """Take those of the selected entries that a rank holds, by their place in its shard.

    Args:
        entries: Of the whole parameter; those of other ranks may be missing already.
        share: The rank's share of it.

    Returns:
        Entries of the shard. Ranges of rows and columns stay ranges, and all entries stay all.
    """
    shape = share.local_shape
    if entries.is_all and entries.ranges is None:
        return Entries.all(shape)
    if not shape.numel():
        return Entries.none(shape)
    if entries.ranges is not None:
        axis = int(isinstance(entries.ranges, Columns))
        own = _range(share, axis)
        first = own.bounds[0][0]
        return Entries.of(
            shape, type(own)(*((start - first, stop - first) for start, stop in (entries.ranges & own).bounds))
        )
    numbers = entries.indices().long()
    return Entries.of(shape, _to_shard(numbers[_region(share).holds(numbers)], share))


def in_whole(entries: Entries, share: Share) -> Tensor:
    """Give the numbers in the whole parameter of the selected entries of a shard.

    Args:
        entries: Of the shard.
        share: The rank's share of the parameter.

    Returns:
        Flat indices ``[K]``, ascending, on the CPU, of the dtype that the whole parameter's have.
    """
    return _region(share).in_whole(entries.indices().long()).to(index_dtype(share.shape.numel()))


def own_values(values: Tensor, entries: Entries, share: Share) -> Tensor:
    """Take from the values of a parameter's selected entries those of the entries that a rank holds.

    Args:
        values: ``[K]``, one for each of ``entries``, ascending.
        entries: Of the whole parameter, those of all ranks.
        share: The rank's share of it.

    Returns:
        ``[k]``, one for each of :func:`in_shard`.
    """
    places = (place for place, _ in entries.moves(entries & held(share)))
    parts = (values[place if isinstance(place, slice) else place.to(values.device)] for place in places)
    return torch.cat([values[:0], *parts])


def own_entries(selection: Selection, name: str, parameter: Tensor) -> tuple[Entries, Share | None]:
    """Give the selected entries of a parameter as this rank reaches them.

    Args:
        selection: What is selected.
        name: The parameter's, of the pool.
        parameter: The parameter.

    Returns:
        The entries, of a sharded parameter those of the local shard by their place in it, and which share that is;
        ``None`` where it is not sharded.

    Raises:
        ValueError: The parameter is sharded in another way than FSDP2 does.
    """
    entries, share = selection.entries(name), hosts.share_of(name, parameter)
    if share is None:
        return entries, None
    if selection.is_sharded and selection.counts[name] == parameter.numel():
        return Entries.all(share.local_shape), share  # which a sharded selection has as ranges
    return in_shard(entries, share), share


def _to_shard(numbers: Tensor, share: Share) -> Tensor:
    """Give the numbers in the shard of entries that the rank holds; the inverse of :func:`in_whole`."""
    return _region(share).in_part(numbers)


def _region(share: Share) -> Region:
    return Region(share.shape, share.ranges)


def _range(share: Share, axis: int) -> Ranges:
    """Give the rows or columns that a rank holds; columns are flat indices of all axes but the first."""
    if not axis:
        return Rows(share.ranges[0])
    width = share.shape[2:].numel()
    start, stop = share.ranges[1] if len(share.shape) > 1 else (0, 1)
    return Columns((start * width, stop * width))


class Joined:
    """Puts values that ranks have for their selected entries into the order of the whole parameter.

    Making it and calling it are collective operations.

    Args:
        entries: This rank's selected entries, of its shard.
        share: Its share of the parameter.

    Attributes:
        entries: The selected entries of all ranks, of the whole parameter.
    """

    def __init__(self, entries: Entries, share: Share) -> None:
        self._share = share
        numbers = share.gathered(in_whole(entries, share))
        # rows come in the order of the ranks
        self._order = numbers.argsort() if any(axis for axis in share.cut) else None
        self.entries = Entries.of(share.shape, numbers)

    def __call__(self, values: Tensor) -> Tensor:
        """Join values of all ranks.

        Args:
            values: ``[k]``, one for each of this rank's entries.

        Returns:
            ``[K]``, in ascending order of :attr:`entries`, on all ranks, on the device of ``values``.
        """
        joined = self._share.gathered(values)
        return joined if self._order is None else joined[self._order.to(joined.device)]


def without(tensor: Tensor, entries: Entries, share: Share | None) -> Tensor:
    """Copy a parameter, with zeros where it is selected.

    Args:
        tensor: The parameter.
        entries: The selected entries, of this rank's shard if there is one.
        share: This rank's share; ``None`` for a whole parameter.

    Returns:
        A copy of its shape, placed as it is.
    """
    copy = hosts.local_part(tensor.detach()).clone(memory_format=torch.contiguous_format)
    entries.fill_(copy.view(-1), 0)
    return copy if share is None else hosts.placed(copy, tensor)
