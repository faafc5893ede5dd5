"""The share of a parameter that a process holds, where several hold it together (``DTensor``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from fishkern.hosts.fully_sharded import local_part, runs_on


@dataclass(frozen=True, eq=False)
class Share:
    """What this rank holds of a parameter: a range along its first or its second axis.

    Attributes:
        shape: The shape of the whole parameter.
        axis: The axis along which it is sharded, 0 or 1.
        start: The first index along this axis that this rank holds.
        stop: The index after the last one; ``start`` where this rank holds nothing.
        group: The ranks that hold the parameter together. Others may hold the same once more (HSDP).
        device: Where values are exchanged.
    """

    shape: torch.Size
    axis: int
    start: int
    stop: int
    group: Any = None
    device: torch.device | None = None

    @property
    def local_shape(self) -> torch.Size:
        """Shape of what this rank holds."""
        return torch.Size((*self.shape[: self.axis], self.stop - self.start, *self.shape[self.axis + 1 :]))

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks of the group."""
        return tuple(dist.get_process_group_ranks(self.group))

    def gathered(self, values: Tensor) -> Tensor:
        """Join values of all ranks of the group, in their order. A collective operation.

        Args:
            values: ``[n]``, of one dtype on all ranks; ``n`` may differ.

        Returns:
            ``[sum of n]``, the same bits on all of them, on the device of ``values``.
        """
        counts = [int(one) for one in self._exchanged(torch.tensor([len(values)], device=self.device))]
        if not max(counts):
            return values
        padded = torch.zeros(max(counts), dtype=values.dtype, device=self.device)
        padded[: len(values)] = values
        # as bytes, since not every backend exchanges every dtype
        parts = [one.view(values.dtype) for one in self._exchanged(padded.view(torch.uint8))]
        return torch.cat([one[:count] for one, count in zip(parts, counts, strict=True)]).to(values.device)

    def _exchanged(self, tensor: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, tensor, group=self.group)
        return parts


def share_of(name: str, parameter: Tensor) -> Share | None:
    """Describe what this rank holds of a parameter.

    Args:
        name: The parameter's, for messages.
        parameter: A parameter.

    Returns:
        Its share; ``None`` if this rank holds the whole parameter.

    Raises:
        ValueError: It is sharded in another way than along one of its first two axes.
    """
    mesh: Any = getattr(parameter, "device_mesh", None)
    if mesh is None:
        return None
    placements = parameter.placements  # type: ignore[attr-defined]
    split = [place for place, one in enumerate(placements) if type(one).__name__ == "Shard"]
    others = [one for one in placements if not one.is_replicate()]
    if len(split) != 1 or len(others) != 1 or others[0].dim > 1:
        raise ValueError(
            f"{name} is sharded as {tuple(placements)}: expected one axis of the mesh to shard it, along its axis 0 or "
            "1, as fully_shard does, and the others to replicate it (HSDP)."
        )
    axis, place = others[0].dim, split[0]
    size = parameter.shape[axis]
    chunk = -(-size // mesh.size(place))  # as torch.chunk deals them: the last ranks may hold fewer, or none
    start = min(chunk * mesh.get_local_rank(place), size)
    stop = min(start + chunk, size)
    return Share(parameter.shape, axis, start, stop, mesh.get_group(place), runs_on(parameter))


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


def whole(tensor: Tensor) -> Tensor:
    """Gather what processes hold of a tensor, where its module computes. A collective operation.

    Args:
        tensor: Any tensor.

    Returns:
        The whole of a ``DTensor``, on every rank; any other tensor itself.
    """
    if not hasattr(tensor, "device_mesh"):
        return tensor
    return placed(local_part(tensor).to(runs_on(tensor)), tensor).full_tensor()  # type: ignore[attr-defined]
