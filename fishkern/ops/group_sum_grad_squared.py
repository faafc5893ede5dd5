"""Sum over examples of the squared weight gradient of a linear layer, for each row, each column, or the tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor

from fishkern.arguments import one_of
from fishkern.backend import Backend, choose
from fishkern.ops._arguments import accumulator, check_linear
from fishkern.ops._tiles import TILE_ENTRIES, TILE_ENTRIES_ON_GPU, spans, tiles
from fishkern.steps import Step, copied, in_one_step

Group = Literal["row", "column", "tensor"]

# Positions whose Gram matrix with all later ones is formed at a time. Fewer make slow matrix products on a CPU; with
# more, less is saved by the symmetry.
_GRAM_POSITIONS = 64
# What squaring and summing one entry of a gradient costs, in multiplications and additions of a matrix product: 6 to 10
# on a CPU.
_SQUARE = 8
# Entries of the gradients of several examples that share one call where they are small.
_ENTRIES_PER_CALL = 2**18


def group_sum_grad_squared(
    activations: Tensor,
    output_grads: Tensor,
    *,
    by: Group,
    offsets: Tensor | None = None,
    out: Tensor | None = None,
    allow_tf32: bool = False,
    backend: Backend | None = None,
) -> Tensor:
    """Sum the squared per-example weight gradients of a linear layer over the examples and over groups of entries.

    Example ``n`` passes ``T`` positions through ``y = x W^T`` and has the weight gradient
    ``h[n, o, i] = sum_t output_grads[n, t, o] * activations[n, t, i]``. With it

        by="row":     out[o] = sum_n sum_i h[n, o, i]^2
        by="column":  out[i] = sum_n sum_o h[n, o, i]^2
        by="tensor":  out    = sum_n sum_o sum_i h[n, o, i]^2

    These are sums of :func:`fishkern.ops.sum_grad_squared` over ``i``, over ``o``, and over both, without its
    ``[O, I]``. Neither that nor the per-example gradients ``[N, O, I]`` are stored.

    The reference takes the cheaper of two exact ways for each length of an example, by their number of multiplications.
    Short examples are computed from the Gram matrices of their positions, which are symmetric, so that one half is
    enough; ``X`` is ``[T, I]``, ``G`` is ``[T, O]``:

        sum_i h[o, i]^2 = G[:, o]^T (X X^T) G[:, o],   sum_o sum_i h[o, i]^2 = sum(X X^T * G G^T)

    (the second: Goodfellow, 2015, arXiv:1510.01799; Li et al., 2022, arXiv:2110.05679), at the cost of about
    ``T^2 (O + I) / 2`` multiplications instead of ``T O I``. Long examples are computed from tiles of their gradients,
    squared and summed at once. The kernel has both ways too, and takes the first for examples of one length of up to 64
    positions. Gram matrices round relative to the squared sum of the terms' absolute values: where the positions of an
    example cancel out in all entries of a group, its small result has fewer correct digits.

    Products are summed and squared in float32 (float64 for float64 inputs), also for 16-bit inputs. The reference holds
    8 MiB of float32 at a time on a CPU, 32 MiB on a GPU, and of 16-bit inputs a float32 copy of the examples and
    features that it works on; the kernel up to 64 MiB of Gram matrices. Nothing is recorded for autograd.

    Args:
        activations: Inputs of the layer, ``[N, T, I]``, floating. Values in padded positions do not matter as long as
            they are finite and ``output_grads`` is zero there.
        output_grads: Gradient of the **summed** loss by the outputs of the layer, ``[N, T, O]``, same dtype and device.
        by: The groups: ``"row"``, ``"column"`` or ``"tensor"``.
        offsets: ``[N + 1]``, int64 or int32, ascending from 0 to ``S``, for packed examples ``activations [S, I]`` and
            ``output_grads [S, O]``, as in :func:`fishkern.ops.sum_grad_squared`.
        out: ``[O]``, ``[I]`` or ``[]``, of the result's dtype, any strides that give each entry its place: the sum is
            added to it, in place. ``None``: to zeros.
        allow_tf32: Whether a kernel may round float32 inputs to tf32, with 10 bits of mantissa. The reference ignores
            it.
        backend: ``None`` for the ambient choice, see :mod:`fishkern.backend`.

    Returns:
        ``out``, or a new ``[O]``, ``[I]`` or ``[]``; float32 (float64 for float64 inputs). Never negative, if ``out``
        was not.

    Raises:
        ValueError: ``by`` is none of the three, shapes, dtypes or devices are not as described, ``offsets`` do not
            ascend from 0 to ``S``, or entries of ``out`` share a place.
        BackendUnavailableError: Triton was named, and cannot run.
    """
    one_of(by, get_args(Group), "by")
    check_linear(activations, output_grads, offsets)
    results = () if out is None else (_accumulator(out, activations, output_grads, by),)
    run = choose(group_sum_grad_squared_torch, backend, activations, output_grads, *results)
    return run(activations, output_grads, by=by, offsets=offsets, out=out, allow_tf32=allow_tf32)


def _described(
    activations: Tensor,
    output_grads: Tensor,
    *,
    by: Group,
    offsets: Tensor | None = None,
    out: Tensor | None = None,
    allow_tf32: bool = False,
) -> Step:
    """Describe a call of the reference: that of its examples of one length that take the most memory."""
    total = _accumulator(out, activations, output_grads, by)
    lengths = activations.shape[:2] if offsets is None else None
    counts = {lengths[1]: lengths[0]} if lengths else Counter(offsets.diff().tolist())
    scratch = flops = 0
    for T, count in counts.items():
        N = count if lengths else 1  # packed examples come one by one
        if not T * N * activations.shape[-1] * output_grads.shape[-1]:
            continue
        grams = _grams_cost_less(T, activations.shape[-1], output_grads.shape[-1])
        describe = _described_by_grams if grams else _described_by_tiles
        most, multiplied = describe(total, activations, output_grads, N, T, by)
        scratch, flops = max(scratch, most), flops + 2 * count * multiplied
    return Step(total, scratch, flops)


def _described_by_grams(total: Tensor, x: Tensor, g: Tensor, N: int, T: int, by: Group) -> tuple[int, int]:
    """Bytes, and multiplications for one example."""
    dtype, size = total.dtype, total.element_size()
    I, O = x.shape[-1], g.shape[-1]
    block, n, width = _room_for_grams(T, I, O, x.device)
    n = min(n, N)
    gram = n * block * T * size
    first, second = (next(spans(F, width)).stop for F in ((O, I) if by == "column" else (I, O)))
    sums = n * total.numel() * size
    of_first = copied(x, dtype, n * T * first)
    if by == "tensor":
        of_second = gram + copied(x, dtype, n * T * second)
    else:
        of_second = copied(x, dtype, n * T * second) + n * (block + 1) * second * size
    masks = 2 * n * block * T
    scratch = N * T + max(N * T * g.element_size(), sums + gram + max(of_first, of_second, masks))
    pairs = sum(min(block, T - start) * (T - start) for start in range(0, T, block))
    return scratch, pairs * (I + O)


def _described_by_tiles(total: Tensor, x: Tensor, g: Tensor, N: int, T: int, by: Group) -> tuple[int, int]:
    """Bytes, and multiplications for one example."""
    I, O = x.shape[-1], g.shape[-1]
    rows, columns = next(tiles(O, I, x.device))
    o, i = len(range(O)[rows]), len(range(I)[columns])
    n = max(1, min(N, _ENTRIES_PER_CALL // (o * i)))
    summed = {"row": o, "column": i, "tensor": 1}[by] * total.element_size()
    casts = copied(x, total.dtype, n * T * (o + i))
    return n * o * i * total.element_size() + max(casts, summed), T * I * O


@in_one_step(_described)
@torch.no_grad()
def group_sum_grad_squared_torch(
    activations: Tensor,
    output_grads: Tensor,
    *,
    by: Group,
    offsets: Tensor | None = None,
    out: Tensor | None = None,
    allow_tf32: bool = False,
) -> Tensor:
    """Compute :func:`group_sum_grad_squared` in plain PyTorch, by Gram matrices or by tiles."""
    total = _accumulator(out, activations, output_grads, by)
    for x, g in _of_equal_length(activations, output_grads, offsets):
        if x.numel() and g.numel():
            add = _add_by_grams_ if _grams_cost_less(x.shape[1], x.shape[2], g.shape[2]) else _add_by_tiles_
            add(total, x, g, by)
    return total


def _accumulator(out: Tensor | None, activations: Tensor, output_grads: Tensor, by: Group) -> Tensor:
    shape = {"row": output_grads.shape[-1:], "column": activations.shape[-1:], "tensor": ()}[by]
    return accumulator(out, shape, output_grads)


def _of_equal_length(x: Tensor, g: Tensor, offsets: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ``[n, T, I]`` and ``[n, T, O]``: all examples, or where they are packed one after the other."""
    if offsets is None:
        yield x, g
        return
    lengths = offsets.diff().tolist()
    for x_part, g_part in zip(x.split(lengths), g.split(lengths), strict=True):
        yield x_part[None], g_part[None]


def _grams_cost_less(T: int, I: int, O: int) -> bool:
    """Compare the multiplications of both ways for one example."""
    pairs = T * (T + min(T, _GRAM_POSITIONS)) // 2
    return pairs * (I + O) < (T + _SQUARE) * I * O


def _add_by_grams_(total: Tensor, x: Tensor, g: Tensor, by: Group) -> None:
    # With columns for groups, the two factors change places.
    summed, grouped = (g, x) if by == "column" else (x, g)
    block, examples, width = _room_for_grams(*x.shape[1:], g.shape[2], x.device)
    has_grad = torch.linalg.vector_norm(g, ord=1, dim=-1) != 0  # [N, T]; unlike any(), without a copy
    parts = (tensor.split(examples) for tensor in (summed, grouped, has_grad))
    for a, b, used in zip(*parts, strict=True):
        sums = total.new_zeros(len(a), *total.shape)
        for start in range(0, a.shape[1], block):
            _add_block_(sums, a, b, used, start, width, by)
        # Each is a sum of squares, which rounding alone can bring below zero.
        total.add_(sums.clamp_(min=0).sum(0))


def _room_for_grams(T: int, I: int, O: int, device: torch.device) -> tuple[int, int, int]:
    """Say how many positions, examples and features to take at a time."""
    # Products and, converted to float32, features: a quarter of a tile, since several of them live at a time.
    most = (TILE_ENTRIES if device.type == "cpu" else TILE_ENTRIES_ON_GPU) // 4
    block = min(T, _GRAM_POSITIONS)
    examples = max(1, most // (T * (block + max(I, O))))
    return block, examples, max(16, most // T)  # features of one example that have room, converted to float32


def _add_block_(sums: Tensor, a: Tensor, b: Tensor, used: Tensor, start: int, width: int, by: Group) -> None:
    """Add what a block of positions has with itself and all later ones."""
    block = min(a.shape[1], _GRAM_POSITIONS)
    gram = _gram(a, start, width, sums.dtype)  # [n, block, T - start]
    gram[..., block:] *= 2  # the pairs the other way round
    # Activations of padded positions may be so large that their products overflow, and infinity times a
    # gradient of zero would be NaN.
    gram.masked_fill_(~(used[:, start : start + block, None] & used[:, None, start:]), 0)
    if by == "tensor":
        sums += gram.mul_(_gram(b, start, width, sums.dtype)).sum((1, 2))
        return
    for columns in spans(b.shape[2], width):
        _add_columns_(sums[:, columns], gram, b[:, start:, columns].to(sums.dtype))


def _add_columns_(sums: Tensor, gram: Tensor, later: Tensor) -> None:
    product = torch.bmm(gram, later, out=gram.new_empty(*gram.shape[:2], later.shape[2]))
    sums += product.mul_(later[:, : gram.shape[1]]).sum(1)


def _gram(features: Tensor, start: int, width: int, dtype: torch.dtype) -> Tensor:
    """Products ``[n, block, T - start]`` of a block of positions with itself and all later ones."""
    N, T, F = features.shape
    gram = torch.zeros(N, min(_GRAM_POSITIONS, T - start), T - start, dtype=dtype, device=features.device)
    for columns in spans(F, width):
        _add_products_(gram, features[:, start:, columns].to(dtype))
    return gram


def _add_products_(gram: Tensor, later: Tensor) -> None:
    gram.baddbmm_(later[:, :_GRAM_POSITIONS], later.mT)


def _add_by_tiles_(total: Tensor, x: Tensor, g: Tensor, by: Group) -> None:
    summed_axes = {"row": (0, 2), "column": (0, 1), "tensor": (0, 1, 2)}[by]
    scratch = None
    for rows, columns in tiles(g.shape[2], x.shape[2], x.device):
        part = total if by == "tensor" else total[rows if by == "row" else columns]
        xs, gs = x[..., columns], g[..., rows]
        size = gs.shape[2] * xs.shape[2]
        if scratch is None:  # no later tile is larger
            examples = max(1, min(len(x), _ENTRIES_PER_CALL // size))
            scratch = total.new_empty(examples * size)
        for x_part, g_part in zip(xs.split(examples), gs.split(examples), strict=True):
            grads = scratch[: len(x_part) * size].view(len(x_part), gs.shape[2], xs.shape[2])
            torch.bmm(g_part.to(total.dtype).mT, x_part.to(total.dtype), out=grads)
            part.add_(grads.square_().sum(summed_axes))
