"""Device code of :mod:`fishkern.kernels.expert_sum_grad_squared`.

One program owns one tile of one expert's result and visits the expert's groups in order, as that of
:mod:`fishkern.kernels._sum_grad_squared_device` visits examples. Inputs and sizes are named as there; an expert is a
part whose chunks begin at ``cuts[e]`` and end at ``cuts[e + 1]``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._sum_grad_squared_device import _store_tile, _sum_squares, _tile


@triton.jit(do_not_specialize=["N", "parts"])
def expert_sum_grad_squared_kernel(
    x, g, out,  # [S, I], [S, O], [parts, O, I]: a part for each expert
    chunks, cuts,
    N, T, I, O, parts,
    stride_xn, stride_xt, stride_xi,
    stride_gn, stride_gt, stride_go,
    stride_op, stride_oo, stride_oi,
    ADD: tl.constexpr, TMA: tl.constexpr, TMA_OUT: tl.constexpr, REDUCE: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_T: tl.constexpr, GROUP_O: tl.constexpr,
):  # fmt: skip
    """Write the sums of the squares of one expert; one without rows is not touched where they are added."""
    row, column = _tile(tl.program_id(0), O, I, BLOCK_O, BLOCK_I, GROUP_O)
    e = tl.program_id(1)
    if ADD:  # noqa: SIM102, as a condition of the compiler and one of the device
        if tl.load(cuts + e) == tl.load(cuts + e + 1):
            return
    total, _ = _sum_squares(
        x, g, chunks, cuts, row, column, e, N, T, I, O, parts,
        stride_xn, stride_xt, stride_xi, stride_gn, stride_gt, stride_go,
        True, False, False, TMA, PRECISION, UPCAST, BLOCK_O, BLOCK_I, BLOCK_T,
    )  # fmt: skip
    _store_tile(
        out, total, e, row, column, O, I, stride_op, stride_oo, stride_oi, ADD, TMA_OUT, REDUCE, BLOCK_O, BLOCK_I
    )
