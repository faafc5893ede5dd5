"""Parameters that FSDP2 shards: which part of each a rank holds, and the sum over ranks of what they all add to it.

Every rank computes its own examples' squares of the whole parameter, some columns at a time, and the sum over ranks is
scattered: each rank gets the entries of its shard (reduce-scatter). Of a linear map the factors may be fewer bytes, see
:mod:`fishkern.statistics.sharded_factors`. Where replicas hold the same shards (HSDP), each
replica adds up its own ranks' examples, and the replicas are added once, at the end.

Where tensor parallel splits the model beside FSDP2, a rank computes with its processes' part of each parameter, and
FSDP2 shards that part over the ranks that have the same one. These are the ranks whose examples differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from fishkern import hosts
from fishkern.files.region import Region
from fishkern.layers import Columns, UnsupportedModuleError, has_gradient_dtype
from fishkern.statistics.ranks_plan import BLOCK_BYTES as _BLOCK
from fishkern.statistics.shards import Ranks

# torch 2.13 has renamed it
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)

Fill = Callable[[Tensor, Columns | None], None]
"""Adds a rank's squares to a block of zeros ``[shape[0], C]``: those of some columns, or of the whole parameter."""


@dataclass(frozen=True, eq=False)
class Part:
    """The part of a parameter that this rank holds.

    Args:
        parameter: The sharded parameter, a ``DTensor``.
        whole: Shape of what these ranks hold together: of the parameter, or of its part by tensor parallel.
        axis: The axis along which it is sharded, 0 or 1.
        group: The ranks that hold one replica of it.
        replicas: The ranks that hold the same part; ``None`` if there is one replica.
    """

    parameter: nn.Parameter
    whole: torch.Size
    axis: int
    group: Any
    replicas: Any

    @property
    def shape(self) -> torch.Size:
        """Shape of the local shard."""
        return hosts.local_part(self.parameter).shape

    @property
    def count(self) -> int:
        """Number of parts."""
        return dist.get_world_size(self.group)

    @property
    def width(self) -> int:
        """Number of entries of a row of the whole parameter."""
        return self.whole[1:].numel()

    @property
    def chunk(self) -> int:
        """The most rows that a rank holds, of a parameter that is sharded by rows."""
        return -(-self.whole[0] // self.count)  # as torch.chunk deals them

    @property
    def rows(self) -> list[slice]:
        """The rows of each rank, of a parameter that is sharded by rows; the last ranks may hold fewer, or none."""
        ends = [min(number * self.chunk, self.whole[0]) for number in range(self.count + 1)]
        return [slice(start, stop) for start, stop in pairwise(ends)]

    @property
    def replica(self) -> int:
        """Number of the replica that this rank belongs to."""
        return 0 if self.replicas is None else dist.get_rank(self.replicas)

    def held(self, indices: Tensor) -> tuple[slice | Tensor, Tensor]:
        """Find entries in this part.

        Args:
            indices: Flat indices in the whole parameter, ascending.

        Returns:
            Which of them are here, and their flat indices in the part.
        """
        share = hosts.share_of("", self.parameter)
        region = Region(share.shape, share.ranges)
        which = region.holds(indices).nonzero().flatten()
        return which, region.in_part(indices[which])

    def add_(self, state: Tensor, fill: Fill) -> None:
        """Add the squares of all ranks of a replica to their parts. A collective operation.

        Args:
            state: Of :attr:`shape`; changed in place.
            fill: Adds this rank's squares to a block.
        """
        device = hosts.runs_on(self.parameter)
        add_ = self._add_rows_ if self.axis == 0 else self._add_columns_
        add_(state, fill, device)

    def sum_over_replicas_(self, state: Tensor, ranks: Ranks) -> None:
        """Replace a state by its sum over the replicas.

        Args:
            state: Of :attr:`shape`.
            ranks: All ranks.
        """
        if self.replicas is not None:
            ranks.sum_(state, self.replicas)

    def placed(self, values: Tensor) -> Tensor:
        """Make a distributed tensor of the parts.

        Args:
            values: This rank's part, of :attr:`shape`.

        Returns:
            A ``DTensor`` of the parameter's shape, mesh and placements.
        """
        return hosts.placed(values.view(self.shape), self.parameter)

    def _add_rows_(self, state: Tensor, fill: Fill, device: torch.device) -> None:
        """Each rank holds some rows, and a block is a range of columns."""
        rows, width, chunk = self.whole[0], self.width, self.chunk
        local = state.view(len(state), width)
        step = self._step(self.count * chunk, width, state.dtype)
        for first in range(0, width, step):
            columns = slice(first, min(first + step, width))
            count = columns.stop - first
            block = torch.zeros(self.count * chunk, count, dtype=state.dtype, device=device)
            fill(block[:rows].view(self.whole) if count == width else block[:rows], None if count == width else columns)
            local[:, columns] += self._scattered(block.view(self.count, chunk, count))[: len(state)].to(state.device)

    def _add_columns_(self, state: Tensor, fill: Fill, device: torch.device) -> None:
        """Each rank holds equally many columns, and a block is a range of those of every rank."""
        shape = self.whole
        rows, width = shape[0], shape[1:].numel()
        chunk = width // self.count  # FSDP2 shards an axis other than the first evenly alone
        local = state.view(rows, chunk)
        step = self._step(self.count * rows, chunk, state.dtype)
        for first in range(0, chunk, step):
            mine = slice(first, min(first + step, chunk))
            count = mine.stop - first
            columns = torch.arange(width, device=device).view(self.count, chunk)[:, mine].flatten()
            block = torch.zeros(rows, len(columns), dtype=state.dtype, device=device)
            fill(block.view(shape) if count == chunk else block, None if count == chunk else columns)
            parts = block.view(rows, self.count, count).transpose(0, 1).contiguous()
            local[:, mine] += self._scattered(parts).to(state.device)

    def _scattered(self, parts: Tensor) -> Tensor:
        """Sum the parts over ranks, ``[count, ...]``, and give this rank's."""
        mine = torch.empty_like(parts[0])
        _reduce_scatter(mine, parts.flatten(0, 1), group=self.group)
        return mine

    @staticmethod
    def _step(rows: int, width: int, dtype: torch.dtype) -> int:
        """Choose how many columns make up a block."""
        return min(max(1, _BLOCK // max(1, rows * dtype.itemsize)), max(1, width))


class Sharding:
    """How FSDP2 shards a model over the ranks.

    Args:
        model: Without running wrappers; FSDP2 shards some of it.
        ranks: All ranks.

    Attributes:
        units: The units of the model.
        ranks: The ranks that have examples of their own; under tensor parallel (:meth:`beside`) those of one part.
        everyone: All ranks.
        counts: Whether the examples that this rank runs count.
        alike: Whether all ranks run the same examples, as they do before the first batch and for single gradients.

    Raises:
        UnsupportedModuleError: It is sharded in a way that is not supported.
        ValueError: It is in the middle of gradient accumulation.
    """

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        self.units = hosts.FullySharded(model)
        self.ranks = self.everyone = ranks
        if reason := self.units.why_not_ready():
            raise ValueError(f"{reason}.")
        self.units.reshard()  # a forward pass without a backward pass leaves parameters whole
        sharded = set(self.units.parameters())
        names = {one: name for name, one in hosts.named_parameters(model).items()}
        mesh = hosts.mesh_of(model)
        self._parts: dict[nn.Parameter, Part] = {
            one: _part(names[one], one, ranks, mesh) for one in names if one in sharded
        }
        self.counts = self.alike = True

    def beside(self, data: Ranks) -> None:
        """Say that tensor parallel splits the model as well.

        Args:
            data: The ranks that compute with the same parts as this one, on other examples.
        """
        self.ranks = data

    @property
    def speaks(self) -> bool:
        """Whether this rank adds to sharded states: of ranks with the same examples, the first of each replica does."""
        return self.counts and (not self.alike or all(dist.get_rank(part.group) == 0 for part in self._parts.values()))

    @contextmanager
    def apart(self, *, counts: bool) -> Iterator[None]:
        """Say that inside the ``with`` block each rank runs its own examples.

        Args:
            counts: Whether those of this rank count.

        Yields:
            Nothing.
        """
        self.counts, self.alike = counts, False
        try:
            yield
        finally:
            self.counts = self.alike = True

    def differentiating(self, parameters: Mapping[str, nn.Parameter]) -> AbstractContextManager[None]:
        """Prepare the units for passes with frozen weights, and leave them as found.

        Args:
            parameters: Those whose gradients autograd forms in between, by canonical name.

        Returns:
            A context.
        """
        return self.units.differentiating(list(parameters.values()))

    def part(self, parameter: Tensor) -> Part | None:
        """Find the part of a parameter that this rank holds.

        Args:
            parameter: A parameter of the model.

        Returns:
            The part; ``None`` if every rank holds the whole.
        """
        return self._parts.get(parameter)


def sharding_of(model: nn.Module, ranks: Ranks) -> Sharding | None:
    """Describe how FSDP2 shards a model.

    Args:
        model: Without running wrappers.
        ranks: All ranks.

    Returns:
        The description; ``None`` where it shards nothing, or where the model is refused for another reason.

    Raises:
        UnsupportedModuleError: As for :class:`Sharding`.
        ValueError: Likewise.
    """
    if not hosts.units(model) or hosts.sharded(model, fsdp2=True, tensor_parallel=True):
        return None
    return Sharding(model, ranks)


def _part(name: str, parameter: Any, ranks: Ranks, model: Any) -> Part:
    """Describe the part of a parameter; ``model``: the processes that tensor parallel splits the model over, if any."""
    mesh, placements = parameter.device_mesh, parameter.placements
    teams = 1 if model is None else model.size()
    if model is not None and hosts.placed_over(parameter, model) is not None:
        placements = placements[:-1]
    sizes = [mesh.size(place) for place in range(len(placements))]
    split = [place for place, one in enumerate(placements) if not one.is_replicate()]
    replicated = [place for place, one in enumerate(placements) if one.is_replicate()]
    if len(split) != 1 or len(replicated) > 1 or not hasattr(placements[split[0]], "dim"):
        raise UnsupportedModuleError(
            f"{name} is sharded as {tuple(parameter.placements)} over a mesh of {mesh.ndim} axes: expected FSDP2's "
            "fully_shard over one axis, or over two of which one replicates (HSDP), after parallelize_module over a "
            "last axis if tensor parallel splits it, too."
        )
    axis = placements[split[0]].dim
    if axis > 1:
        raise UnsupportedModuleError(
            f"{name} is sharded along its axis {axis}: expected 0 or 1, as shard_placement_fn= may give them."
        )
    if teams * math.prod(sizes) != ranks.count:
        over = f"{math.prod(sizes)} of {ranks.count // teams}"
        raise UnsupportedModuleError(
            f"{name} is sharded over {over} {'processes' if teams == 1 else 'teams of tensor parallel'}: expected all "
            "of them, since each has examples of its own. Shard over a mesh of all."
        )
    if not has_gradient_dtype(parameter):
        raise UnsupportedModuleError(
            f"{name} is stored as {parameter.dtype} and sharded: quantised weights are served whole. Load the whole "
            "model in each process."
        )
    replicas = mesh.get_group(replicated[0]) if replicated else None
    return Part(parameter, hosts.computed_shape(parameter, model), axis, mesh.get_group(split[0]), replicas)
