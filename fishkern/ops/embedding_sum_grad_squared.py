"""Sum over examples of the squared gradient of an embedding table, which is sparse in every example."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fishkern.ops._arguments import accumulator, check_offsets
from fishkern.ops.dtypes import accumulates_in


def embedding_sum_grad_squared(
    indices: Tensor,
    output_grads: Tensor,
    num_rows: int,
    *,
    padding_idx: int | None = None,
    offsets: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Sum the squared per-example gradients of an embedding table.

    A row's gradient in example ``n`` is the sum over the positions that look it up, and the square is taken after that
    sum:

        out[v, d] = sum_n ( sum_{t: indices[n, t] = v} output_grads[n, t, d] )^2

    Rows are summed and squared in float32 (float64 for float64 inputs), also for 16-bit inputs. Memory grows with
    ``N T D``, as the inputs do; the per-example gradients ``[N, V, D]`` are never stored. The order of every sum is
    fixed by the order of the positions. On a GPU the host does not wait for the indices (except for those of packed
    examples, whose ``offsets`` are checked): sums have as many places as there are positions, of which some stay empty.
    Nothing is recorded for autograd.

    Args:
        indices: Rows looked up, ``[N, T]``, int64 or int32, from 0 to ``num_rows - 1``.
        output_grads: Gradient of the **summed** loss by the rows looked up, ``[N, T, D]``, floating, same device.
        num_rows: ``V``, the rows of the table.
        padding_idx: Row that never gets a gradient, as in :class:`torch.nn.Embedding`, from 0 to ``num_rows - 1``.
        offsets: ``[N + 1]``, int64 or int32, ascending from 0 to ``S``, for packed examples ``indices [S]`` and
            ``output_grads [S, D]``, as in :func:`fishkern.ops.sum_grad_squared`.
        out: ``[V, D]``, of the result's dtype, any strides: the sum is added to it, in place. ``None``: to zeros.

    Returns:
        ``out``, or a new ``[V, D]``; float32 (float64 for float64 inputs).

    Raises:
        ValueError: Shapes, dtypes or devices are not as described, or an index is out of range. On a GPU that is an
            assertion of the device, as in :func:`torch.nn.functional.embedding`.
    """
    if padding_idx is not None and not 0 <= padding_idx < num_rows:
        raise ValueError(f"padding_idx must be from 0 to num_rows - 1 = {num_rows - 1}, or None, got {padding_idx}.")
    if not _may_wait(indices) and output_grads.numel():
        _check_lookups(indices, output_grads, offsets)
        total = accumulator(out, (num_rows, output_grads.shape[-1]), output_grads)
        return _add_without_waiting_(total, indices, output_grads, padding_idx, offsets)
    _, row, grads = embedding_rows(indices, output_grads, padding_idx=padding_idx, offsets=offsets)
    if row.numel() and (largest := int(row.max())) >= num_rows:
        raise ValueError(f"indices must be below num_rows = {num_rows}, got {largest}: pass the table's own size.")
    total = accumulator(out, (num_rows, output_grads.shape[-1]), output_grads)
    row, squares = _sum_by_key(row, grads.square_())
    with torch.no_grad():
        return total.index_add_(0, row, squares)  # every row once, so that the order of adding is fixed on a GPU too


@torch.no_grad()
def embedding_rows(
    indices: Tensor, output_grads: Tensor, *, padding_idx: int | None = None, offsets: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Form the rows of the per-example gradients of an embedding table that can be other than zero.

    The gradient of example ``n`` is ``grads[u]`` in row ``row[u]`` for every ``u`` with ``example[u] == n``, and zero
    in all other rows. A table that is also used elsewhere (a tied head) adds its other gradient before squaring.

    Args:
        indices: Rows looked up, ``[N, T]``, int64 or int32, not negative.
        output_grads: Gradient of the **summed** loss by the rows looked up, ``[N, T, D]``, floating, same device.
        padding_idx: Row that never gets a gradient and is left out, or ``None``.
        offsets: As for :func:`embedding_sum_grad_squared`.

    Returns:
        ``(example, row, grads)`` of the ``U`` distinct pairs of example and row, in ascending order of the pairs:
        ``[U]`` int64, ``[U]`` int64, and ``[U, D]``, the sums over positions, float32 (float64 for float64 inputs).

    Raises:
        ValueError: Shapes, dtypes or devices are not as described, or an index is negative.
    """
    _check_lookups(indices, output_grads, offsets)
    dtype = accumulates_in(output_grads.dtype)
    token = indices.long().flatten()
    if token.numel() and (smallest := int(token.min())) < 0:
        raise ValueError(f"indices must not be negative, got {smallest}: give padded positions a row, padding_idx.")
    num_rows = int(token.max()) + 1 if token.numel() else 1
    pair = _examples(indices, offsets) * num_rows + token
    grads = output_grads.flatten(0, -2).to(dtype)
    if padding_idx is not None:
        counted = token != padding_idx
        pair, grads = pair[counted], grads[counted]
    pair, grads = _sum_by_key(pair, grads)
    return pair // num_rows, pair % num_rows, grads


def _may_wait(indices: Tensor) -> bool:
    """Tell whether the host may look at values: on a CPU they are there, and sums need no empty places."""
    return not indices.is_cuda


@torch.no_grad()
def _add_without_waiting_(
    total: Tensor, indices: Tensor, output_grads: Tensor, padding_idx: int | None, offsets: Tensor | None
) -> Tensor:
    """Add the squares in the order of :func:`embedding_sum_grad_squared`, with no size that depends on values."""
    V, token = len(total), indices.long().flatten()
    torch._assert_async(((token >= 0) & (token < V)).all(), f"indices must be from 0 to num_rows - 1 = {V - 1}")
    N = indices.shape[0] if offsets is None else len(offsets) - 1
    pair = _examples(indices, offsets) * V + token
    if padding_idx is not None:
        pair = pair.where(token != padding_idx, N * V)
    pair, grads = _sum_in_places(pair, output_grads.flatten(0, -2).to(total.dtype))
    row = (pair % V).where((pair >= 0) & (pair < N * V), V)  # of padding and of empty places there is no row
    row, squares = _sum_in_places(row, grads.square_())
    counted = (row >= 0) & (row < V)
    # Every row once, so that the order of adding is fixed; all others add nothing to the first row.
    return total.index_add_(0, row.where(counted, 0), squares.masked_fill_(~counted[:, None], 0.0))


def _sum_in_places(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Do as :func:`_sum_by_key` in ``M`` places; behind the distinct keys come empty places with the key -1."""
    keys, order = keys.sort(stable=True)
    M = len(keys)
    place = torch.cat([keys.new_zeros(1), (keys[1:] != keys[:-1]).cumsum(0)])
    starts = keys.new_full((M,), M).scatter_reduce_(0, place, torch.arange(M, device=keys.device), "amin")
    return keys.new_full((M,), -1).scatter_(0, place, keys), F.embedding_bag(order, values, starts, mode="sum")


def _examples(indices: Tensor, offsets: Tensor | None) -> Tensor:
    """Say which example each index is of, ``[N T]`` or ``[S]``."""
    if offsets is None:
        N, T = indices.shape
        return torch.arange(N, device=indices.device).repeat_interleave(T, output_size=N * T)
    examples = torch.arange(len(offsets) - 1, device=indices.device)
    return examples.repeat_interleave(offsets.diff().to(indices.device), output_size=len(indices))


def _sum_by_key(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the ``values [M, D]`` of equal ``keys [M]`` in their order; the distinct keys ascend."""
    keys, order = keys.sort(stable=True)
    keys, counts = keys.unique_consecutive(return_counts=True)
    if values.numel() == 0:  # embedding_bag fails on zero columns
        return keys, values.new_zeros(len(keys), values.shape[1])
    # A bag is summed by one thread, first entry to last, unlike index_add_ on a GPU, whose atomic additions race.
    return keys, F.embedding_bag(order, values, counts.cumsum(0) - counts, mode="sum")


def _check_lookups(indices: Tensor, output_grads: Tensor, offsets: Tensor | None) -> None:
    if indices.ndim != 2 - (offsets is not None) or output_grads.shape[:-1] != indices.shape:
        expected = "[N, T] and output_grads [N, T, D]" if offsets is None else "[S] and output_grads [S, D] (offsets)"
        raise ValueError(f"indices must be {expected}, got {tuple(indices.shape)} and {tuple(output_grads.shape)}.")
    if offsets is not None:
        check_offsets(offsets, len(indices))
    if indices.dtype not in (torch.int64, torch.int32) or not output_grads.is_floating_point():
        raise ValueError(
            f"indices must be int64 or int32 and output_grads floating, got {indices.dtype} and {output_grads.dtype}."
        )
    if indices.device != output_grads.device:
        raise ValueError(
            f"indices and output_grads must be on one device, got {indices.device} and {output_grads.device}: "
            "move one to the other's."
        )
