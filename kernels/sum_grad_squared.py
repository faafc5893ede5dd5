"""Triton kernel of :func:`fishkern.ops.sum_grad_squared`.

One program owns one ``[BLOCK_O, BLOCK_I]`` tile of the result and visits the examples in order, so no atomics are
needed, the order of every sum is fixed, and no per-example gradient leaves the registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _sum_grad_squared_kernel(
    x_ptr, g_ptr, offsets_ptr, out_ptr,  # activations, output gradients, first positions of packed examples, result
    N, T, I, O,  # T is not read when PACKED
    stride_xn, stride_xt, stride_xi,
    stride_gn, stride_gt, stride_go,
    stride_oo, stride_oi,
    PACKED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    # Addresses are int64 throughout: O * I, N * T * I and every single stride may pass 2**31.
    tiles_i = tl.cdiv(I, BLOCK_I)
    offs_o = (tl.program_id(0) // tiles_i).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    offs_i = (tl.program_id(0) % tiles_i).to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)
    offs_t = tl.arange(0, BLOCK_T).to(tl.int64)
    mask_o = offs_o < O
    mask_i = offs_i < I

    x_columns = x_ptr + offs_i[None, :] * stride_xi  # [1, BLOCK_I]
    g_columns = g_ptr + offs_o[None, :] * stride_go  # [1, BLOCK_O]
    out_ptrs = out_ptr + offs_o[:, None] * stride_oo + offs_i[None, :] * stride_oi
    mask_out = mask_o[:, None] & mask_i[None, :]
    total = tl.load(out_ptrs, mask=mask_out, other=0.0)
    for n in range(N):
        if PACKED:
            first = tl.load(offsets_ptr + n)
            length = tl.load(offsets_ptr + n + 1) - first
            x_ptrs = x_columns + (first + offs_t[:, None]) * stride_xt  # [BLOCK_T, BLOCK_I]
            g_ptrs = g_columns + (first + offs_t[:, None]) * stride_gt  # [BLOCK_T, BLOCK_O]
        else:
            length = T
            x_ptrs = x_columns + offs_t[:, None] * stride_xt
            g_ptrs = g_columns + offs_t[:, None] * stride_gt
            x_columns += stride_xn
            g_columns += stride_gn
        grad = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
        for t in range(0, length, BLOCK_T):
            mask_t = offs_t < length - t
            x = tl.load(x_ptrs, mask=mask_t[:, None] & mask_i[None, :], other=0.0)
            g = tl.load(g_ptrs, mask=mask_t[:, None] & mask_o[None, :], other=0.0)
            grad = tl.dot(tl.trans(g), x, grad, input_precision="ieee")  # [BLOCK_O, BLOCK_T] @ [BLOCK_T, BLOCK_I]
            x_ptrs += tl.full((), BLOCK_T, tl.int64) * stride_xt
            g_ptrs += tl.full((), BLOCK_T, tl.int64) * stride_gt
        total += grad * grad  # after the sum over positions: per example, not per position
    tl.store(out_ptrs, total, mask=mask_out)


def sum_grad_squared(
    activations: Tensor, output_grads: Tensor, *, offsets: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """Launch the kernel; arguments as in :func:`fishkern.ops.sum_grad_squared`, already checked."""
    I, O = activations.shape[-1], output_grads.shape[-1]
    total = out if out is not None else torch.zeros(O, I, dtype=torch.float32, device=activations.device)
    if offsets is None:
        N, T, _ = activations.shape
        stride_xn, stride_gn = activations.stride(0), output_grads.stride(0)
    else:
        offsets = offsets.to(activations.device, torch.int64).contiguous()
        N, T, stride_xn, stride_gn = len(offsets) - 1, 0, 0, 0
    if total.numel() == 0 or N == 0:
        return total
    BLOCK_T, BLOCK_I, BLOCK_O = 32, 64, 64
    grid = (triton.cdiv(O, BLOCK_O) * triton.cdiv(I, BLOCK_I),)  # one axis: the others end at 65535
    with torch.cuda.device_of(activations):  # Triton launches on the current device
        _sum_grad_squared_kernel[grid](
            activations, output_grads, activations if offsets is None else offsets, total,
            N, T, I, O,
            stride_xn, *activations.stride()[-2:],
            stride_gn, *output_grads.stride()[-2:],
            *total.stride(),
            offsets is not None,
            BLOCK_T, BLOCK_I, BLOCK_O,
        )  # fmt: skip
    return total
