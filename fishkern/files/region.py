"""The part of a tensor that one process holds, and where its entries are in the whole tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from fishkern import hosts
from fishkern.files.gathering import is_sharded
from fishkern.files.tensors import PIECE, AnyTensor, StoredTensor


@dataclass(frozen=True)
class Region:
    """The part of a tensor that one process holds: a range along each axis.

    Attributes:
        shape: The whole tensor's.
        ranges: ``(start, stop)`` along each axis.
        counted: Whether this process speaks for the part in sums over all processes: of several that hold the same
            part, the first does; of several sets of processes that hold the whole, that of process 0.
    """

    shape: torch.Size
    ranges: tuple[tuple[int, int], ...]
    counted: bool = True

    @property
    def sizes(self) -> torch.Size:
        """Shape of the part."""
        return torch.Size(stop - start for start, stop in self.ranges)

    @property
    def is_whole(self) -> bool:
        """Whether it is the whole tensor."""
        return self.sizes == self.shape

    def splits(self, width: int) -> bool:
        """Tell whether some neighbours that belong together are partly in the part, and partly not.

        Args:
            width: How many neighbours of the whole tensor belong together, from its first entry on: a divisor of the
                length of a row, which is everything at one index of the first axis.

        Returns:
            Whether an end of the part is inside such a group.
        """
        _, start, stop = self._axes()[-1]
        return start % width != 0 or stop % width != 0

    def in_whole(self, places: Tensor) -> Tensor:
        """Find entries of the part in the whole tensor.

        Args:
            places: Flat (row-major) indices into the part, ``[K]``, int64.

        Returns:
            Flat indices into the whole tensor, ``[K]``, int64, in the same order; ascending where ``places`` are.
        """
        indices, stride = torch.zeros_like(places), 1
        first, *others = self._axes()
        for size, start, stop in reversed(others):
            length = max(1, stop - start)
            indices += (places % length + start) * stride
            places, stride = places // length, stride * size
        return indices + (places + first[1]) * stride

    def in_part(self, indices: Tensor) -> Tensor:
        """Undo :meth:`in_whole`.

        Args:
            indices: Flat indices into the whole tensor, ``[K]``, int64, all of them in the part.

        Returns:
            Flat indices into the part.
        """
        places, stride = torch.zeros_like(indices), 1
        first, *others = self._axes()
        for size, start, stop in reversed(others):
            places += (indices % size - start) * stride
            indices, stride = indices // size, stride * (stop - start)
        return places + (indices - first[1]) * stride

    def holds(self, indices: Tensor) -> Tensor:
        """Tell which entries of the whole tensor are in the part.

        Args:
            indices: Flat indices into the whole tensor, ``[K]``, int64.

        Returns:
            ``[K]``, bool.
        """
        inside = torch.ones_like(indices, dtype=torch.bool)
        for size, start, stop in reversed(self._axes()):
            place = indices % size
            inside &= (start <= place) & (place < stop)
            indices = indices // size
        return inside

    def spans(self) -> Iterator[tuple[int, int]]:
        """Find where the part's entries follow on each other in the whole tensor.

        Yields:
            Flat ``(start, stop)`` of each run, ascending; none of an empty part.
        """
        _, start, stop = self._axes()[-1]
        if not self.sizes.numel():
            return
        length = stop - start
        for first in self.in_whole(torch.arange(0, self.sizes.numel(), length)).tolist():
            yield first, first + length

    def _axes(self) -> list[tuple[int, int, int]]:
        """Give size, start and stop of each axis; one that is whole is joined to the axis before it."""
        axes = [(1, 0, 1)]
        for size, (start, stop) in zip(self.shape, self.ranges, strict=True):
            if (start, stop) == (0, size):
                before = axes.pop()
                axes.append((before[0] * size, before[1] * size, before[2] * size))
            else:
                axes.append((size, start, stop))
        return axes[1:] if axes[0] == (1, 0, 1) and len(axes) > 1 else axes


def region_of(name: str, tensor: AnyTensor) -> Region:
    """Find the part of a tensor that this process holds.

    Args:
        name: The tensor's, for the message.
        tensor: A ``DTensor``; or any other tensor, of which every process holds the whole.

    Returns:
        The part.

    Raises:
        ValueError: A ``DTensor`` is distributed in another way than ``torch.chunk`` cuts it along axes, or over a
            number of processes of which that of all is no multiple.
    """
    if not is_sharded(tensor):
        first = not dist.is_available() or not dist.is_initialized() or dist.get_rank() == 0
        return Region(tensor.shape, tuple((0, size) for size in tensor.shape), first)
    mesh, placements = tensor.device_mesh, tensor.placements
    if dist.get_world_size() % mesh.size():
        raise ValueError(_unserved(name, tensor, f"expected one of all {dist.get_world_size()} processes, or a part"))
    if (cuts := hosts.cuts_of(tensor)) is None:
        raise ValueError(_unserved(name, tensor, "Shard and Replicate alone are served, and what fully_shard makes"))
    # each of the meshes that the processes are divided into holds the whole tensor
    replicas = [number for number, one in enumerate(placements) if one.is_replicate()]
    counted = 0 in mesh.mesh and all(mesh.get_local_rank(number) == 0 for number in replicas)
    region = Region(tensor.shape, cuts[0], counted)
    if (held := tensor.to_local().shape) != region.sizes:
        raise ValueError(_unserved(name, tensor, f"this process holds {tuple(held)}, expected {tuple(region.sizes)}"))
    return region


def read_region(stored: StoredTensor, region: Region, dtype: torch.dtype) -> Tensor:
    """Read this process's part of a tensor on disk, and nothing else of it.

    Args:
        stored: The whole tensor.
        region: The part.
        dtype: To convert to.

    Returns:
        A new tensor of the part's shape, on the CPU.
    """
    part = torch.empty(region.sizes, dtype=dtype)
    rest = part.view(-1)
    runs = ((range(start, stop, PIECE), stop) for start, stop in region.spans())
    for piece in stored.spans((first, min(first + PIECE, stop)) for firsts, stop in runs for first in firsts):
        rest[: len(piece)] = piece
        rest = rest[len(piece) :]
    return part


def _unserved(name: str, tensor: Any, reason: str) -> str:
    return (
        f"{name} is distributed as {tuple(tensor.placements)} over a mesh of {tensor.device_mesh.size()} processes: "
        f"{reason}. Save the statistics, and load the file on every process; or gather the tensor (full_tensor())."
    )
