"""What a pass takes on each of several ranks over which FSDP2 shards the model, by formula."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

BLOCK_BYTES = 2**26
"""Squares of a whole parameter that FSDP2 shards are formed in blocks of about this many bytes."""


@dataclass(frozen=True)
class RanksPlan:
    """What each of the ranks takes and receives, where ``fully_shard`` splits every parameter by rows.

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
    """

    ranks: int
    weight_bytes: int
    accumulator_bytes: int
    block_bytes: int
    reduced_bytes: int
    gathered_bytes: int


def plan_for_ranks(
    ranks: int, parameters: Iterable[Tensor], buffers: Iterable[Tensor], estimated: Iterable[tuple[Tensor, int]]
) -> RanksPlan:
    """Count what each rank takes.

    Args:
        ranks: Number of ranks.
        parameters: All parameters of the model, each once.
        buffers: All buffers, which every rank has whole.
        estimated: The requested parameters, and the bytes of one number of their sums.

    Returns:
        The plan.
    """
    parameters, estimated = list(parameters), list(estimated)
    sums = [_rows(one, ranks) * _width(one) * size for one, size in estimated]
    blocks = [min(BLOCK_BYTES, ranks * local) for local in sums]
    blocks += [ranks * _rows(one, ranks) * size for one, size in estimated]  # at least one column
    weights = [_rows(one, ranks) * _width(one) * one.element_size() for one in parameters]
    return RanksPlan(
        ranks=ranks,
        weight_bytes=sum(weights) + sum(one.nbytes for one in buffers),
        accumulator_bytes=sum(sums),
        block_bytes=max(blocks, default=0) if ranks > 1 else 0,
        reduced_bytes=(ranks - 1) * sum(sums),
        gathered_bytes=2 * (ranks - 1) * sum(weights),
    )


def _rows(parameter: Tensor, ranks: int) -> int:
    """Count the rows of the first rank, as torch.chunk deals them."""
    return -(-(parameter.shape[0] if parameter.ndim else 1) // ranks)


def _width(parameter: Tensor) -> int:
    return parameter.shape[1:].numel()
