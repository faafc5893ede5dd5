"""The share of a parameter that a process holds, where several hold it together (``DTensor``)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from fishkern.hosts.fully_sharded import local_part, runs_on


@dataclass(frozen=True, eq=False)
class Share:
    """What this rank holds of a parameter: a range along each axis.

    Attributes:
        shape: The shape of the whole parameter.
        ranges: ``(start, stop)`` along each axis; the same twice along one of which this rank holds nothing.
        groups: The ranks that hold the parameter together, of each axis of the mesh that cuts it, the outermost cut
            first; none where each rank holds all. Others may hold the same once more (HSDP, tensor parallel).
        axes: The names of these axes, the same on all ranks.
        device: Where values are exchanged.
    """

    shape: torch.Size
    ranges: tuple[tuple[int, int], ...]
    groups: tuple[Any, ...] = ()
    axes: tuple[str, ...] = ()
    device: torch.device | None = None

    @property
    def local_shape(self) -> torch.Size:
        """Shape of what this rank holds."""
        return torch.Size(stop - start for start, stop in self.ranges)

    @property
    def cut(self) -> tuple[int, ...]:
        """The axes of the parameter along which this rank does not hold everything."""
        return tuple(axis for axis, ends in enumerate(self.ranges) if ends != (0, self.shape[axis]))

    @property
    def place(self) -> tuple[slice, ...]:
        """Where it is in the whole parameter."""
        return tuple(slice(*ends) for ends in self.ranges)

    def gathered(self, values: Tensor) -> Tensor:
        """Join values of all ranks that hold the parameter together, in their order. A collective operation.

        Args:
            values: ``[n]``, of one dtype on all ranks; ``n`` may differ.

        Returns:
            ``[sum of n]``, the same bits on all of them, on the device of ``values``. Where rows alone are cut, the
            order is that of the rows.
        """
        for group in reversed(self.groups):
            values = self._joined(values, group)
        return values

    def _joined(self, values: Tensor, group: Any) -> Tensor:
        counts = [int(one) for one in self._exchanged(torch.tensor([len(values)], device=self.device), group)]
        if not max(counts):
            return values
        padded = torch.zeros(max(counts), dtype=values.dtype, device=self.device)
        padded[: len(values)] = values
        # as bytes, since not every backend exchanges every dtype
        parts = [one.view(values.dtype) for one in self._exchanged(padded.view(torch.uint8), group)]
        return torch.cat([one[:count] for one, count in zip(parts, counts, strict=True)]).to(values.device)

    def _exchanged(self, tensor: Tensor, group: Any) -> list[Tensor]:
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, tensor, group=group)
        return parts


def share_of(name: str, parameter: Tensor) -> Share | None:
    """Describe what this rank holds of a parameter.

    Args:
        name: The parameter's, for messages.
        parameter: A parameter.

    Returns:
        Its share; ``None`` if it is no ``DTensor``, so that this rank holds the whole parameter.

    Raises:
        ValueError: It is sharded in another way than along its first two axes.
    """
    mesh: Any = getattr(parameter, "device_mesh", None)
    if mesh is None:
        return None
    cuts, placements = cuts_of(parameter), parameter.placements  # type: ignore[attr-defined]
    split = [] if cuts is None else [number for number in cuts[1] if not placements[number].is_replicate()]
    if cuts is None or any(placements[number].dim > 1 for number in split):
        raise ValueError(
            f"{name} is sharded as {tuple(placements)}: expected axes of the mesh to shard it along its axes 0 "
            "and 1, as fully_shard and tensor parallel do, and the others to replicate it (HSDP). Pieces that "
            "packed_colwise interleaves are not served: leave it out (never=, outside='freeze'), or train without that "
            "entry of the plan."
        )
    names = mesh.mesh_dim_names or [f"axis {number} of {mesh.ndim}" for number in range(mesh.ndim)]
    groups = tuple(mesh.get_group(number) for number in split)
    return Share(parameter.shape, cuts[0], groups, tuple(names[number] for number in split), runs_on(parameter))


def cuts_of(tensor: Any) -> tuple[tuple[tuple[int, int], ...], list[int]] | None:
    """Find what this process holds of a distributed tensor.

    Every axis of the mesh cuts what the ones before it have left, except for that of FSDP2 on what tensor parallel has
    cut along the same axis already (``_StridedShard``): its pieces are pieces of those of the axes after it.

    Args:
        tensor: A ``DTensor``.

    Returns:
        ``(start, stop)`` along each axis of the tensor, and the axes of the mesh in the order in which they cut it;
        ``None`` where it is distributed in another way than ``torch.chunk`` cuts along axes.
    """
    mesh, placements = tensor.device_mesh, tensor.placements
    order: list[int] = []
    inside: list[int] = []
    for number, placement in enumerate(placements):
        kind = type(placement).__name__  # not is_shard(): other relatives of Shard cut otherwise
        if kind in ("Shard", "Replicate"):
            order.append(number)
            continue
        pieces = 1
        if kind == "_StridedShard":
            later = range(number + 1, mesh.ndim)
            pieces = math.prod(mesh.size(n) for n in later if getattr(placements[n], "dim", None) == placement.dim)
        if pieces == 1 or placement.split_factor != pieces:
            return None
        inside.insert(0, number)
    ranges = [(0, size) for size in tensor.shape]
    for number in (order := order + inside):
        placement = placements[number]
        if not placement.is_replicate():
            start, stop = ranges[placement.dim]
            # as torch.chunk deals them: the last ranks may hold fewer, or none
            chunk, place = -(-(stop - start) // mesh.size(number)), mesh.get_local_rank(number)
            ranges[placement.dim] = (min(start + place * chunk, stop), min(start + (place + 1) * chunk, stop))
    return tuple(ranges), order


def placed(local: Tensor, like: Tensor) -> Tensor:
    """Make a distributed tensor of what every rank holds.

    Args:
        local: This rank's part.
        like: A ``DTensor``.

    Returns:
        A ``DTensor`` of the shape, mesh and placements of ``like``.
    """
    from torch.distributed.tensor import DTensor  # torch itself imports it with the first sharded model only

    one: Any = like
    options = {"run_check": False, "shape": one.shape, "stride": one.stride()}
    return DTensor.from_local(local, one.device_mesh, one.placements, **options)


def joined(local: Tensor, like: Tensor) -> Tensor:
    """Gather what all ranks hold of something of a parameter's shape. A collective operation.

    Args:
        local: This rank's part.
        like: A parameter.

    Returns:
        The whole tensor, on every rank; ``local`` itself where the parameter is no ``DTensor``.
    """
    return placed(local, like).full_tensor() if hasattr(like, "device_mesh") else local  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """Gather what processes hold of a tensor, where its module computes. A collective operation.

    Args:
        tensor: Any tensor.

    Returns:
        The whole of a ``DTensor``, on every rank; any other tensor itself.
    """
    if not hasattr(tensor, "device_mesh"):
        return tensor
    return joined(local_part(tensor).to(runs_on(tensor)), tensor)
