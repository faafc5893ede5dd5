"""What a pass takes on each of several ranks over which FSDP2 shards the model, by formula."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from fishkern import hosts

BLOCK_BYTES = 2**26
"""Squares of a whole parameter that FSDP2 shards are formed in blocks of about this many bytes."""


@dataclass(frozen=True)
class RanksPlan:
    """What each of the ranks takes and receives, where ``fully_shard`` splits every parameter by rows.

    It is called on each transformer layer and on the model. While a layer runs, FSDP2 has gathered it and the next one,
    and what is outside of the layers.

    The squares of a batch are added up by a reduce-scatter of each parameter in the dtype of its sums, of which a rank
    receives ``(R - 1) / R``, or less where the factors of linear maps are sent (few positions, see
    :mod:`fishkern.statistics.sharded_factors`); FSDP2 itself gathers the weights once for the forward and once for the
    backward pass.

    Args:
        ranks: Number of ranks ``R``.
        weight_bytes: Bytes of the rows of the largest rank, and of the buffers.
        accumulator_bytes: Bytes of the sums of the largest rank.
        block_bytes: The most bytes that squares take before they are reduced: a block of columns of all rows.
        reduced_bytes: The most bytes of squares, or of factors, that a rank receives for each batch and each backward
            pass of it.
        gathered_bytes: Bytes of weights that a rank receives for each batch.
        unit_bytes: Bytes of gathered weights at one time: the two largest layers, and what is in no layer.
        activation_bytes: Those of the plan of one device, for a batch of this rank; ``None`` without a batch.
    """

    ranks: int
    weight_bytes: int
    accumulator_bytes: int
    block_bytes: int
    reduced_bytes: int
    gathered_bytes: int
    unit_bytes: int
    activation_bytes: int | None = None

    @property
    def peak_bytes(self) -> int | None:
        """The most bytes above the loaded shards; ``None`` without a batch."""
        if self.activation_bytes is None:
            return None
        return self.accumulator_bytes + self.activation_bytes + self.block_bytes + self.unit_bytes


def plan_for_ranks(
    ranks: int, model: nn.Module, estimated: Iterable[tuple[Tensor, int]], activation_bytes: int | None
) -> RanksPlan:
    """Count what each rank takes.

    Args:
        ranks: Number of ranks.
        model: The whole model, on any device.
        estimated: The requested parameters, and the bytes of one number of their sums.
        activation_bytes: As in :class:`RanksPlan`.

    Returns:
        The plan.
    """
    parameters, estimated = list(model.parameters()), list(estimated)
    sums = [_rows(one, ranks) * _width(one) * size for one, size in estimated]
    blocks = [min(BLOCK_BYTES, ranks * local) for local in sums]
    blocks += [ranks * _rows(one, ranks) * size for one, size in estimated]  # at least one column
    weights = [_rows(one, ranks) * _width(one) * one.element_size() for one in parameters]
    return RanksPlan(
        ranks=ranks,
        weight_bytes=sum(weights) + sum(one.nbytes for one in model.buffers()),
        accumulator_bytes=sum(sums),
        block_bytes=max(blocks, default=0) if ranks > 1 else 0,
        reduced_bytes=(ranks - 1) * sum(sums),
        gathered_bytes=2 * (ranks - 1) * sum(weights),
        unit_bytes=_unit_bytes(model) if ranks > 1 else 0,
        activation_bytes=activation_bytes,
    )


def _unit_bytes(model: nn.Module) -> int:
    """Count the bytes of the weights that are whole at one time."""
    layers, sizes = hosts.layer_of(model), Counter()
    for name, parameter in hosts.named_parameters(model).items():
        sizes[layers[name] and layers[name].path] += parameter.nbytes
    outside = sizes.pop(None, 0)
    return outside + sum(sorted(sizes.values())[-2:])


def _rows(parameter: Tensor, ranks: int) -> int:
    """Count the rows of the first rank, as torch.chunk deals them."""
    return -(-(parameter.shape[0] if parameter.ndim else 1) // ranks)


def _width(parameter: Tensor) -> int:
    return parameter.shape[1:].numel()
