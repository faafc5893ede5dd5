"""Triton kernel of :func:`fishkern.ops.masked_adamw_`.

One launch for all parameters: a program owns a block of one parameter's selected entries and reaches weights and
gradient through a table of addresses. The learning rate, the steps and the scale of the gradients are read on the
device, so that neither a schedule nor a CUDA graph needs another kernel, and nothing waits for the host.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._entries import BLOCK, OPTIONS, as_tensor, entries_of_block, load_grad, load_weight, store_weight, tables


@triton.jit
def _one_minus_exp(x):
    """Compute ``1 - exp(x)`` for ``x <= 0`` in float32, also near 0, where the difference would keep few digits."""
    # The first nine terms of the series, of which the next is below 3e-10 of the sum for x > -0.5.
    series = 1.0 + x * (1.0 / 9.0)
    for n in tl.static_range(7):
        series = 1.0 + x * (1.0 / (8.0 - n)) * series
    return tl.where(x > -0.5, -x * series, 1.0 - tl.exp(x))


@triton.jit
def _masked_adamw_kernel(
    table_ptr, blocks_ptr, param_like, grad_like, index_like,  # see _entries.py
    exp_avg_ptr, exp_avg_sq_ptr, master_ptr, starts_ptr,  # compact state; the last two may be None
    steps_ptr, lr_ptr, scale_ptr,  # scale may be None
    log_beta1, log_beta2, one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay,
    MAXIMIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    mask, parameter, offs, param_ptrs, grad_ptrs = entries_of_block(
        table_ptr, blocks_ptr, param_like, grad_like, index_like, BLOCK
    )
    lr = tl.load(lr_ptr)
    grad = load_grad(grad_ptrs, mask, scale_ptr, MAXIMIZE)
    weight = load_weight(param_ptrs, master_ptr, offs, mask)
    exp_avg = tl.load(exp_avg_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + offs, mask=mask, other=0.0).to(tl.float32)

    age = tl.load(steps_ptr + parameter)
    if starts_ptr is not None:
        age = age - tl.load(starts_ptr + offs, mask=mask, other=0.0)
    correction1 = _one_minus_exp(age * log_beta1)  # 1 - beta1^t
    correction2 = _one_minus_exp(age * log_beta2)

    # The formula of ops/masked_adamw.py, line by line.
    weight = weight * (1.0 - lr * weight_decay)  # w -= lr weight_decay w
    exp_avg = exp_avg + (grad - exp_avg) * one_minus_beta1  # exp_avg = beta1 exp_avg + (1 - beta1) g
    exp_avg_sq = exp_avg_sq * beta2 + grad * grad * one_minus_beta2  # exp_avg_sq = beta2 exp_avg_sq + (1 - beta2) g^2
    denom = tl.sqrt_rn(exp_avg_sq / correction2) + eps  # tl.sqrt takes the smallest numbers for 0
    weight = weight - lr / correction1 * (exp_avg / denom)  # w -= lr exp_avg / (1 - beta1^t) / (sqrt(...) + eps)

    tl.store(exp_avg_ptr + offs, exp_avg.to(exp_avg_ptr.dtype.element_ty), mask=mask)
    tl.store(exp_avg_sq_ptr + offs, exp_avg_sq.to(exp_avg_sq_ptr.dtype.element_ty), mask=mask)
    store_weight(weight, param_ptrs, master_ptr, offs, mask)


def masked_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    indices: Sequence[Tensor | None],
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    steps: Tensor,
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool = False,
    master: Tensor | None = None,
    starts: Tensor | None = None,
    scale: Tensor | None = None,
) -> None:
    """Launch the kernel; arguments as in :func:`fishkern.ops.masked_adamw_`, already checked and flat."""
    with torch.cuda.device_of(params[0]):  # Triton launches on the current device, and tables are copied on its stream
        table, blocks, likes = tables(params, grads, indices)
        if len(blocks) == 0:
            return
        _masked_adamw_kernel[(len(blocks),)](
            table, blocks, *likes,
            exp_avg, exp_avg_sq, master, starts,
            steps, as_tensor(lr, steps.device), scale,
            _log(beta1), _log(beta2), 1 - beta1, beta2, 1 - beta2, eps, weight_decay,
            maximize,
            BLOCK,
            **OPTIONS,
        )  # fmt: skip
    torch.autograd.graph.increment_version(params)  # else autograd would not notice


def _log(beta: float) -> float:
    return math.log(beta) if beta else -math.inf
