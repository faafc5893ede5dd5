"""Device code of :mod:`fishkern.kernels.group_sum_grad_squared`.

Groups are the rows of a gradient ``[O, I]``, or its columns. Every program writes the sums over some squares into lines
of its own, ``[lines, groups]``, float32, contiguous, which :func:`sum_lines_kernel` adds up in their order, without
atomics. Inputs and sizes are named as in :mod:`fishkern.kernels._sum_grad_squared_device`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._sum_grad_squared_device import _first_example, _load_chunk, _sum_squares, _tile


@triton.jit(do_not_specialize=["N", "parts"])
def group_sum_grad_squared_kernel(
    x, g, out,  # out: a line for each part and tile on the other side
    chunks, cuts,
    N, T, I, O, parts,
    stride_xn, stride_xt, stride_xi,
    stride_gn, stride_gt, stride_go,
    ROWS: tl.constexpr, PACKED: tl.constexpr, SINGLE: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_T: tl.constexpr, GROUP_O: tl.constexpr,
):  # fmt: skip
    """Sum the squares of each tile over its columns (ROWS) or its rows, after those of its examples are added up."""
    row, column = _tile(tl.program_id(0), O, I, BLOCK_O, BLOCK_I, GROUP_O)
    part = tl.program_id(1)
    total, _ = _sum_squares(
        x, g, chunks, cuts, row, column, part, N, T, I, O, parts,
        stride_xn, stride_xt, stride_xi, stride_gn, stride_gt, stride_go,
        PACKED, SINGLE, False, TMA, PRECISION, UPCAST, BLOCK_O, BLOCK_I, BLOCK_T,
    )  # fmt: skip
    # Entries of the tile outside of [O, I] are zero, since the inputs were loaded as zeros there.
    if ROWS:
        groups = O
        offs = row + tl.arange(0, BLOCK_O)
        line = part * tl.cdiv(I, BLOCK_I) + column // BLOCK_I
        sums = tl.sum(total, 1)
    else:
        groups = I
        offs = column + tl.arange(0, BLOCK_I)
        line = part * tl.cdiv(O, BLOCK_O) + row // BLOCK_O
        sums = tl.sum(total, 0)
    tl.store(out + line.to(tl.int64) * groups + offs, sums, mask=offs < groups)


@triton.jit
def gram_kernel(
    features, grams,  # [N, T, F]; [N, BLOCK_T, BLOCK_T], float32, contiguous
    T, F,
    stride_n, stride_t, stride_f,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Multiply the positions of one example with each other; rows and columns after its end are zero."""
    n = tl.program_id(0)
    gram = tl.zeros((BLOCK_T, BLOCK_T), dtype=tl.float32)
    for column in range(0, F, BLOCK_F):
        chunk = _load_chunk(
            features, n, n * 0, T, column, F, stride_n, stride_t, stride_f, False, False, False, BLOCK_T, BLOCK_F
        )
        if UPCAST:
            chunk = chunk.to(tl.float32)
        gram = tl.dot(chunk, tl.trans(chunk), gram, input_precision=PRECISION)
    offs = tl.arange(0, BLOCK_T)
    ptrs = grams + n.to(tl.int64) * BLOCK_T * BLOCK_T + offs[:, None] * BLOCK_T + offs[None, :]
    tl.store(ptrs, gram)


@triton.jit(do_not_specialize=["N", "parts"])
def group_by_grams_kernel(
    features, grams, out,  # [N, T, groups]; those of the other factor; a line for each part
    N, T, groups, parts,
    stride_n, stride_t, stride_f,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Add up ``f^T K f`` over the examples of one part, for each feature ``f`` ``[T]`` and the Gram matrix ``K``."""
    column = tl.program_id(0) * BLOCK_F
    part = tl.program_id(1)
    n = _first_example(part, parts, N)
    offs_t = tl.arange(0, BLOCK_T)
    total = tl.zeros((BLOCK_F,), dtype=tl.float32)
    for _ in range(_first_example(part + 1, parts, N) - n):
        chunk = _load_chunk(
            features, n, n * 0, T, column, groups, stride_n, stride_t, stride_f, False, False, False, BLOCK_T, BLOCK_F
        ).to(tl.float32)
        ptrs = grams + n.to(tl.int64) * BLOCK_T * BLOCK_T + offs_t[:, None] * BLOCK_T + offs_t[None, :]
        gram = tl.load(ptrs)
        # Activations of padded positions may be so large that their products are infinite, which times a gradient of
        # zero would be NaN.
        used = tl.max(tl.abs(chunk), 1) > 0
        gram = tl.where(used[:, None] & used[None, :], gram, 0.0)
        product = tl.dot(gram, chunk, input_precision=PRECISION)
        sums = tl.sum(product * chunk, 0)
        total += tl.where(sums < 0, 0.0, sums)  # a sum of squares: only rounding brings it below zero
        n += 1
    offs = column + tl.arange(0, BLOCK_F)
    tl.store(out + part.to(tl.int64) * groups + offs, total, mask=offs < groups)


@triton.jit(do_not_specialize=["lines"])
def sum_lines_kernel(
    values, out,  # [lines, groups] contiguous, [groups]
    lines, groups, stride_out,
    ADD: tl.constexpr,
    BLOCK_LINES: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
):  # fmt: skip
    """Add up the lines of each group, BLOCK_LINES at a time, in a fixed order."""
    offs_l = tl.arange(0, BLOCK_LINES)[:, None]
    offs_g = tl.program_id(0) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)
    ptrs = values + offs_l.to(tl.int64) * groups + offs_g[None, :]
    total = tl.zeros((BLOCK_LINES, BLOCK_GROUPS), dtype=tl.float32)
    for first in range(0, lines, BLOCK_LINES):
        total += tl.load(ptrs, mask=(offs_l < lines - first) & (offs_g[None, :] < groups), other=0.0)
        ptrs += tl.full((), BLOCK_LINES, tl.int64) * groups
    sums = tl.sum(total, 0)
    out_ptrs = out + offs_g.to(tl.int64) * stride_out
    if ADD:
        sums += tl.load(out_ptrs, mask=offs_g < groups, other=0.0)
    tl.store(out_ptrs, sums, mask=offs_g < groups)
