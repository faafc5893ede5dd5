"""Device code of :mod:`fishkern.kernels.group_sum_grad_squared`.

Groups are the rows of a gradient ``[O, I]``, or its columns. Every program writes the sums over some squares into lines
of its own, ``[lines, groups]``, float32, contiguous, which :func:`sum_lines_kernel` adds up in their order, without
atomics. Inputs and sizes are named as in :mod:`fishkern.kernels._sum_grad_squared_device`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._sum_grad_squared_device import _sum_squares, _tile


@triton.jit(do_not_specialize=["N", "parts"])
def group_sum_grad_squared_kernel(
    x, g, out,  # out: a line for each part and tile on the other side
    chunks, cuts,
    N, T, I, O, parts,
    stride_xn, stride_xt, stride_xi,
    stride_gn, stride_gt, stride_go,
    ROWS: tl.constexpr, PACKED: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_T: tl.constexpr, GROUP_O: tl.constexpr,
):  # fmt: skip
    """Sum the squares of each tile over its columns (ROWS), or over its rows, once its examples are added up."""
    row, column = _tile(tl.program_id(0), O, I, BLOCK_O, BLOCK_I, GROUP_O)
    part = tl.program_id(1)
    total, _ = _sum_squares(
        x, g, chunks, cuts, row, column, part, N, T, I, O, parts,
        stride_xn, stride_xt, stride_xi, stride_gn, stride_gt, stride_go,
        PACKED, False, TMA, PRECISION, UPCAST, BLOCK_O, BLOCK_I, BLOCK_T,
    )  # fmt: skip
    # What is outside of [O, I] is zero: the inputs were loaded as zeros there.
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
