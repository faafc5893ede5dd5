"""Triton kernel of :func:`fishkern.ops.masked_sgd_`: one launch for all parameters, as in ``masked_adamw.py``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._entries import BLOCK, OPTIONS, as_tensor, entries_of_block, load_grad, load_weight, store_weight, tables


@triton.jit
def _masked_sgd_kernel(
    table_ptr, blocks_ptr, param_like, grad_like, index_like,  # see _entries.py
    momentum_buffer_ptr, master_ptr, starts_ptr,  # compact state; each may be None
    steps_ptr, lr_ptr, scale_ptr,  # scale may be None
    momentum, one_minus_dampening, weight_decay,
    NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    mask, parameter, offs, param_ptrs, grad_ptrs = entries_of_block(
        table_ptr, blocks_ptr, param_like, grad_like, index_like, BLOCK
    )
    grad = load_grad(grad_ptrs, mask, scale_ptr, MAXIMIZE)
    weight = load_weight(param_ptrs, master_ptr, offs, mask)
    # The formula of ops/masked_sgd.py, line by line.
    grad += weight_decay * weight  # g += weight_decay w
    if momentum_buffer_ptr is not None:
        age = tl.load(steps_ptr + parameter)
        if starts_ptr is not None:
            age = age - tl.load(starts_ptr + offs, mask=mask, other=0.0)
        buffer = tl.load(momentum_buffer_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        # b = momentum b + (1 - dampening) g, at its first update b = g
        buffer = tl.where(age == 1.0, grad, momentum * buffer + one_minus_dampening * grad)
        tl.store(momentum_buffer_ptr + offs, buffer.to(momentum_buffer_ptr.dtype.element_ty), mask=mask)
        if NESTEROV:
            grad += momentum * buffer
        else:
            grad = buffer
    weight = weight - tl.load(lr_ptr) * grad  # w -= lr (g + momentum b if nesterov else b)
    store_weight(weight, param_ptrs, master_ptr, offs, mask)


def masked_sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    indices: Sequence[Tensor | None],
    momentum_buffer: Tensor | None,
    steps: Tensor,
    *,
    lr: float | Tensor,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    master: Tensor | None = None,
    starts: Tensor | None = None,
    scale: Tensor | None = None,
) -> None:
    """Launch the kernel; arguments as in :func:`fishkern.ops.masked_sgd_`, already checked and flat."""
    with torch.cuda.device_of(params[0]):  # Triton launches on the current device, and tables are copied on its stream
        table, blocks, likes = tables(params, grads, indices)
        if len(blocks) == 0:
            return
        _masked_sgd_kernel[(len(blocks),)](
            table, blocks, *likes,
            momentum_buffer, master, starts,
            steps, as_tensor(lr, steps.device), scale,
            momentum, 1 - dampening, weight_decay,
            nesterov, maximize,
            BLOCK,
            **OPTIONS,
        )  # fmt: skip
    torch.autograd.graph.increment_version(params)  # else autograd would not notice
