"""The selected entries of a parameter as a step reaches them: as views of its rows, or by indices on its device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fishkern.hosts import Share
from fishkern.ops.streaming_topk import index_dtype
from fishkern.selection import Entries

ENTRIES = ("indices", "rows")  # keys of a state that say which entries it is of; without either, of all


class Selected(NamedTuple):
    """The selected entries of a parameter, and how a step reaches them.

    Of a parameter that is sharded, everything here is about the local shard, as if that were the parameter.

    Attributes:
        entries: The selected entries.
        indices: Their flat indices ``[K]`` on the parameter's device, by which they are gathered; ``None`` where they
            are reached as views: all entries, or ranges of rows.
        share: Which part of the whole parameter the shard is; ``None`` where it is not sharded.
    """

    entries: Entries
    indices: Tensor | None
    share: Share | None = None

    @classmethod
    def of(cls, entries: Entries, parameter: Tensor, share: Share | None = None, *, with_master: bool) -> Selected:
        """Find out how a step reaches the entries of a parameter, and list those that it gathers.

        Args:
            entries: The selected entries.
            parameter: The parameter, or the local shard of one.
            share: Which part of the parameter the shard is.
            with_master: Whether its 16-bit weights have a master.

        Returns:
            The entries, with indices where they are needed.
        """
        needed = _needs_indices(entries, parameter, with_master)
        return cls(entries, entries.indices().to(parameter.device) if needed else None, share)

    def fits(self, parameter: Tensor, *, with_master: bool) -> bool:
        """Tell whether a parameter still has the dtype, device and layout that this was made for.

        Args:
            parameter: The parameter, or the local shard of one.
            with_master: Whether its 16-bit weights have a master.

        Returns:
            Whether :meth:`of` would give the same.
        """
        if self.entries.shape != parameter.shape:
            return False
        if _needs_indices(self.entries, parameter, with_master):
            return self.indices is not None and self.indices.device == parameter.device
        return self.indices is None

    def gather(self, tensor: Tensor) -> Tensor:
        """Read the selected entries of a parameter or of its gradient.

        Args:
            tensor: Of the parameter's shape, any strides.

        Returns:
            ``[K]``; of all entries, and of one range of rows, a view where the tensor is contiguous.
        """
        if self.indices is None:
            return self.entries.gather(tensor)
        return tensor.detach().contiguous().view(-1).index_select(0, self.indices)

    @property
    def in_one_piece(self) -> bool:
        """Whether a step takes the parameter as it is: with its indices, or all of it."""
        return self.indices is not None or self.entries.is_all

    def views(self, tensor: Tensor) -> list[Tensor]:
        """Cut a parameter or its gradient into its ranges of rows, or into all of it.

        Args:
            tensor: Of the parameter's shape, or ``[K]``, of the selected entries alone; contiguous, or a gradient.

        Returns:
            ``[n]`` for each range; views, where the tensor is contiguous.
        """
        spans = self.entries.spans
        if len(spans) == 1 and tensor.is_contiguous() and tensor.numel() != self.entries.count:
            ((start, stop),) = spans  # the usual case, in one call: every call costs the host
            return [tensor.detach().as_strided((stop - start,), (1,), tensor.storage_offset() + start)]
        flat = tensor.detach().contiguous().view(-1)
        if flat.numel() == self.entries.count:
            return list(flat.split_with_sizes([stop - start for start, stop in spans]))
        sizes, end = [], 0
        for start, stop in spans:
            sizes += [start - end, stop - start]
            end = stop
        return list(flat.split_with_sizes([*sizes, flat.numel() - end])[1::2])  # one call, faster than as many slices

    def key(self) -> dict[str, Tensor]:
        """Say for a saved state which entries it is of: by ``"rows"`` ``[R, 2]``, by ``"indices"``, or by neither."""
        if self.entries.is_all:
            return {}
        if self.entries.spans is not None:
            return {"rows": torch.tensor(self.entries.ranges.bounds, dtype=torch.int64)}
        return {"indices": self.indices}


def key_bytes(entries: Entries, parameter: Tensor, *, with_master: bool) -> int:
    """Compute the memory of what says which entries of a parameter a state is of, and how a step reaches them.

    Args:
        entries: The selected entries.
        parameter: The parameter.
        with_master: Whether its 16-bit weights have a master.

    Returns:
        Bytes of :meth:`Selected.key` and of the indices, which are not listed for it.
    """
    rows = 0 if entries.is_all or entries.spans is None else torch.tensor(entries.ranges.bounds).nbytes
    width = index_dtype(parameter.numel()).itemsize
    return rows + (entries.count * width if _needs_indices(entries, parameter, with_master) else 0)


def _needs_indices(entries: Entries, parameter: Tensor, with_master: bool) -> bool:
    if entries.is_all:
        return False
    # Some of PyTorch's 16-bit operations round otherwise at the end of a tensor: rows step to the same bits as a list
    # of their entries only if they are gathered into one tensor, too.
    rounds = parameter.dtype.itemsize < 4 and not with_master
    return entries.spans is None or not parameter.is_contiguous() or rounds
