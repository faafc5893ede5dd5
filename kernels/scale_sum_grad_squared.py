"""Triton kernel of :func:`fishkern.ops.scale_sum_grad_squared`, for tensors on one GPU.

The first kernel reads inputs and output gradients once. A program takes whole positions of one example, of which it
normalises the inputs in registers, and adds up the terms; where the examples are few, several programs share the
positions of each. Their sums are small, and a second kernel adds up those of an example, squares, and adds up the
examples. No entry is added to twice in a launch, and the order of every sum depends on shapes and the device alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv, next_power_of_2

from ._hardware import Hardware, hardware
from ._launch import Launch

# What float32 is rounded to.
_NARROW = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# Entries that a program holds at a time, of each tensor, and those of them that a thread has: two loads of 16 bytes of
# 16-bit tensors. A norm needs whole positions, however wide they are.
_ENTRIES, _OF_A_THREAD = 4096, 16
_THREADS = 1024  # of a program at most
_COLUMNS = 512  # without a norm
# Programs for each processor, which positions are shared out for; at least so many steps for each.
_PROGRAMS, _STEPS, _MOST_SLICES = 4, 4, 64
# Sums that a program of the second kernel takes at a time.
_SUMS, _SUMMED_COLUMNS = 32, 128


@triton.jit(do_not_specialize=["T"])
def sum_positions_kernel(
    x, g, sums,  # [N, T, D] twice; [N, SLICES, D], contiguous
    T, D, eps,
    stride_xn, stride_xt, stride_xd,
    stride_gn, stride_gt, stride_gd,
    NORM: tl.constexpr, ROUNDED_TO: tl.constexpr, SLICES: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add up the terms of every so many positions of one example; x is None for those of a shift."""
    n = tl.program_id(0).to(tl.int64) // SLICES
    part = tl.program_id(0) % SLICES
    offs_t = tl.arange(0, BLOCK_T)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    # Addresses are int64: N * T * D and every single stride may pass 2**31.
    g += n * stride_gn
    if x is not None:
        x += n * stride_xn
    total = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
    for first in range(part * BLOCK_T, T, SLICES * BLOCK_T):
        offs = (first + offs_t).to(tl.int64)[:, None]
        columns = offs_d.to(tl.int64)[None, :]
        exists = (offs < T) & (offs_d < D)[None, :]
        terms = tl.load(g + (offs * stride_gt + columns * stride_gd), mask=exists, other=0.0).to(tl.float32)
        if x is not None:
            factors = tl.load(x + (offs * stride_xt + columns * stride_xd), mask=exists, other=0.0).to(tl.float32)
            if NORM == "layer":
                factors = tl.where(exists, factors - (tl.sum(factors, 1) / D)[:, None], 0.0)
            if NORM is not None:
                factors *= tl.rsqrt(tl.sum(factors * factors, 1) / D + eps)[:, None]
            if ROUNDED_TO is not None:
                factors = factors.to(ROUNDED_TO).to(tl.float32)
            terms = tl.where(exists, terms * factors, 0.0)  # 0 * inf, where eps is 0 and there is no position
        total += terms
    tl.store(sums + (tl.program_id(0).to(tl.int64) * D + offs_d), tl.sum(total, 0), mask=offs_d < D)


@triton.jit(do_not_specialize=["N"])
def sum_examples_kernel(
    sums, out,  # [N, SLICES, D], contiguous; [D]
    N, D, stride_out,
    ADD: tl.constexpr, SLICES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add up the parts of each example, square, and add up the examples."""
    offs_n = tl.arange(0, BLOCK_N)[:, None, None]
    offs_s = tl.arange(0, SLICES)[None, :, None]
    offs_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    within = offs_s * D + offs_d[None, None, :]
    total = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    for first in range(0, N, BLOCK_N):
        exists = (offs_n < N - first) & (offs_d < D)[None, None, :]
        ptrs = sums + ((first + offs_n).to(tl.int64) * SLICES * D + within)
        grads = tl.sum(tl.load(ptrs, mask=exists, other=0.0), 1)
        total += grads * grads  # after the sum over positions
    ptrs = out + offs_d.to(tl.int64) * stride_out
    value = tl.sum(total, 0)
    if ADD:
        value += tl.load(ptrs, mask=offs_d < D, other=0.0)
    tl.store(ptrs, value, mask=offs_d < D)


def scale_sum_grad_squared(
    inputs: Tensor | None,
    output_grads: Tensor,
    *,
    norm: str | None = None,
    eps: float = 0.0,
    rounded_to: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Launch the kernels; arguments as in :func:`fishkern.ops.scale_sum_grad_squared`, already checked."""
    add = out is not None
    if out is None:
        out = torch.empty(output_grads.shape[-1], dtype=torch.float32, device=output_grads.device)
    if output_grads.numel() == 0:  # no example, or none with a position
        return out if add else out.zero_()
    operands = Operands(inputs, output_grads, norm, eps, rounded_to, out, add)
    with torch.cuda.device_of(output_grads):  # Triton launches on the current device
        for launch in launches(operands, hardware(output_grads.device)):
            launch.run()
    return out


class Operands(NamedTuple):
    """One call: its arguments, and whether to add to ``out`` or to overwrite it."""

    x: Tensor | None
    g: Tensor
    norm: str | None
    eps: float
    rounded_to: torch.dtype | None
    out: Tensor
    add: bool = True


def launches(operands: Operands, on: Hardware) -> list[Launch]:
    """Prepare the launches of one call, in their order.

    Args:
        operands: Its tensors, not empty.
        on: The device to prepare for.

    Returns:
        The kernel that reads the inputs, and the one that adds up its sums.
    """
    x, g, norm, eps, rounded_to, out, add = operands
    N, T, D = g.shape
    columns = next_power_of_2(D) if norm else min(next_power_of_2(D), _COLUMNS)
    block_t = min(max(1, _ENTRIES // columns), next_power_of_2(T))
    slices = _slices(N * cdiv(D, columns), cdiv(T, block_t), on)
    strides = g.stride() if x is None else x.stride()
    sums = g.new_empty(N, slices, D, dtype=torch.float32)
    of_positions = {
        "x": x, "g": g, "sums": sums, "T": T, "D": D, "eps": float(eps),
        "stride_xn": strides[0], "stride_xt": strides[1], "stride_xd": strides[2],
        "stride_gn": g.stride(0), "stride_gt": g.stride(1), "stride_gd": g.stride(2),
        "NORM": norm, "ROUNDED_TO": _NARROW.get(rounded_to),
        "SLICES": slices, "BLOCK_T": block_t, "BLOCK_D": columns,
    }  # fmt: skip
    summed = min(next_power_of_2(D), _SUMMED_COLUMNS)
    block_n = min(max(1, _SUMS // slices), next_power_of_2(N))
    of_examples = {
        "sums": sums, "out": out, "N": N, "D": D, "stride_out": out.stride(0),
        "ADD": add, "SLICES": slices, "BLOCK_N": block_n, "BLOCK_D": summed,
    }  # fmt: skip
    lanes = 64 if on.family == "gfx942" else 32
    warps = min(max(block_t * columns // (_OF_A_THREAD * lanes), 1), _THREADS // lanes)
    return [
        Launch(sum_positions_kernel, (N * slices, cdiv(D, columns)), of_positions, _options(warps)),
        Launch(sum_examples_kernel, (cdiv(D, summed),), of_examples, _options(4)),
    ]


def _slices(programs: int, steps: int, on: Hardware) -> int:
    """Say by how many programs the positions of an example are shared, a power of two."""
    slices = 1
    while 2 * slices * _STEPS <= steps and slices < _MOST_SLICES and slices * programs < _PROGRAMS * on.processors:
        slices *= 2
    return slices


def _options(warps: int) -> dict[str, int]:
    # whether it fuses by default depends on the version of Triton
    return {"num_warps": warps, "num_stages": 2, "enable_fp_fusion": True}
