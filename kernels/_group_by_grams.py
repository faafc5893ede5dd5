"""Sums of squares from the Gram matrices of the positions of short examples.

The squared norm of row ``o`` of an example's gradient ``g^T x`` is ``g_o^T (x x^T) g_o``, where ``g_o`` ``[T]`` is one
output feature over the positions: for few positions ``T`` that is cheaper than to square every entry of the row. One
kernel writes the Gram matrix ``x x^T`` of each example, another multiplies it with the features of each group; for
columns x and g change places. Which calls are computed so is an estimate by the number of operations, not measured on a
GPU yet.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton import cdiv, next_power_of_2

from . import _group_sum_grad_squared_device as device
from ._hardware import Hardware
from ._launch import Launch
from ._problem import Problem
from ._sum_grad_squared_configs import MOST_PARTS, WORKSPACE

# Matrix units take 16 positions at least; with more than 64, a Gram matrix and its products leave the registers.
FEWEST_POSITIONS, MOST_POSITIONS = 16, 64
# Cost of a multiplication here, in multiplications of the other path: Gram matrices are float32, which most matrix
# units do not multiply; on the other hand no entry of a gradient is squared.
MULTIPLICATION = 4
# By positions: features that a program multiplies at a time, and warps. With more features or fewer warps Triton spills
# accumulators.
_TILES = {16: (64, 4), 32: (64, 4), 64: (32, 8)}


def takes_grams(problem: Problem) -> bool:
    """Tell whether a call is computed from Gram matrices.

    Args:
        problem: The call.

    Returns:
        Whether its examples have one length, which is short for the size of the layer, and their Gram matrices fit the
        workspace.
    """
    T = _block_of(problem.T)
    return (
        not problem.packed
        and T <= MOST_POSITIONS
        and MULTIPLICATION * T * (problem.O + problem.I) <= problem.O * problem.I
        and 4 * problem.N * T * T <= WORKSPACE
    )


def launches_by_grams(summed: Tensor, grouped: Tensor, problem: Problem, on: Hardware) -> tuple[list[Launch], Tensor]:
    """Prepare the launches of one call.

    Args:
        summed: ``[N, T, F]``, the factor whose features are summed over.
        grouped: ``[N, T, groups]``, the other factor.
        problem: The call.
        on: The device to prepare for.

    Returns:
        The launches, and the sums that they write: ``[lines, groups]``, still to be added up.
    """
    N, T, F = summed.shape
    groups = grouped.shape[-1]
    BLOCK_T = _block_of(T)
    BLOCK_F, warps = _TILES[BLOCK_T]
    programs = cdiv(groups, BLOCK_F)
    parts = min(N, MOST_PARTS, cdiv(2 * on.processors, programs))  # two programs for each multiprocessor
    grams = torch.empty(N, BLOCK_T, BLOCK_T, dtype=torch.float32, device=summed.device)
    sums = torch.empty(parts, groups, dtype=torch.float32, device=summed.device)
    constants = {"T": T, "BLOCK_T": BLOCK_T, "BLOCK_F": BLOCK_F, "PRECISION": problem.precision}
    # The interpreter multiplies the bit patterns of bfloat16 (triton issue 11584).
    upcast = on.family == "interpreter" and problem.dtype is torch.bfloat16
    of_grams = {"features": summed, "grams": grams, "F": F, **_strides(summed), **constants, "UPCAST": upcast}
    of_groups = {
        "features": grouped, "grams": grams, "out": sums, "N": N, "groups": groups, "parts": parts,
        **_strides(grouped), **constants,
    }  # fmt: skip
    options = {"num_warps": warps, "num_stages": 2, "enable_fp_fusion": True}
    prepared = [
        Launch(device.gram_kernel, (N,), of_grams, options),
        Launch(device.group_by_grams_kernel, (programs, parts), of_groups, options),
    ]
    return prepared, sums


def _block_of(T: int) -> int:
    return max(FEWEST_POSITIONS, next_power_of_2(T))


def _strides(features: Tensor) -> dict[str, int]:
    return dict(zip(("stride_n", "stride_t", "stride_f"), features.stride(), strict=True))
