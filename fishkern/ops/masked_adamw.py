"""One AdamW step that moves, and keeps state for, only the selected entries of its parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fishkern.backend import Backend, choose
from fishkern.ops._entries import check_entries, update_entries_, write_back_


@torch.no_grad()
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
    backend: Backend | None = None,
) -> None:
    """Do one step of AdamW on the selected entries of several parameters, in place.

    For a selected entry with weight ``w`` and gradient ``g`` at its ``t``-th update (Loshchilov and Hutter, 2019,
    arXiv:1711.05101; under ``torch.compile`` a step is one node of the graph, which runs as here):

        w -= lr weight_decay w
        exp_avg = beta1 exp_avg + (1 - beta1) g
        exp_avg_sq = beta2 exp_avg_sq + (1 - beta2) g^2
        w -= lr exp_avg / (1 - beta1^t) / (sqrt(exp_avg_sq / (1 - beta2^t)) + eps)

    An entry that is not selected is neither read nor written: no decay, no state. The reference takes these steps in
    the order of torch.optim's loop, so that with every entry selected it equals that bit for bit. The cost grows with
    the selected entries, not with the parameters (but a parameter that is not contiguous is copied whole).

    Args:
        params: ``P`` parameters of any shapes, of one floating dtype and device.
        grads: The gradient of each, of its shape or ``[K_i]``, of its selected entries alone; ``None``: this parameter
            and its state stay as they are.
        indices: Selected entries of each, ``[K_i]``, int32 or int64, ascending, each once: places in the parameter
            flattened in row-major order. ``None``: all of them. One dtype for all of a call.
        exp_avg: ``[K]``, ``K = sum_i K_i``, one parameter after the other; float32 where there is a ``master``, else
            of the parameters' dtype. Changed in place.
        exp_avg_sq: Likewise.
        steps: ``[P]``, float32: which update this is for each parameter, counted from 1.
        lr: Learning rate, a number or a zero-dimensional tensor.
        beta1: Decay of ``exp_avg``, in [0, 1).
        beta2: Decay of ``exp_avg_sq``, in [0, 1).
        eps: Added to the root in the denominator.
        weight_decay: Decoupled decay.
        maximize: Go up the gradient.
        master: ``[K]``, float32, the selected weights of 16-bit parameters unrounded: updated, and then rounded into
            the parameters. Where a parameter is not its master rounded, to the bit, its value becomes the master first.
            ``None``: the parameters' own values are updated.
        starts: ``[K]``, float32: for each entry the value of its parameter's ``steps`` when it was selected, so that
            ``t`` is the difference. ``None``: zeros.
        scale: Zero-dimensional tensor that the gradients are multiplied by, such as for clipping.
        backend: ``None`` for the ambient choice, see :mod:`fishkern.backend`.

    Raises:
        ValueError: Shapes, dtypes or devices are not as described.
        BackendUnavailableError: Triton was named, and cannot run.
    """
    if torch.compiler.is_compiling():
        number, tensor = (None, lr) if isinstance(lr, Tensor) else (lr, None)
        torch.ops.fishkern.masked_adamw_(
            params, grads, indices, exp_avg, exp_avg_sq, steps,
            number, tensor, beta1, beta2, eps, weight_decay, maximize, master, starts, scale, backend,
        )  # fmt: skip
        return
    state = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    flat_params, flat_grads, indices = check_entries(
        params, grads, indices, steps, state=state, master=master, starts=starts
    )
    if not params:
        return
    run = choose(masked_adamw_torch_, backend, params[0], exp_avg)
    run(
        flat_params, flat_grads, indices, exp_avg, exp_avg_sq, steps,
        lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, maximize=maximize,
        master=master, starts=starts, scale=scale,
    )  # fmt: skip
    write_back_(params, flat_params)


def masked_adamw_torch_(
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
    """Compute :func:`masked_adamw_` in plain PyTorch; parameters and gradients are flat and contiguous."""

    def update(span: slice, step: float, weight: Tensor, grad: Tensor) -> None:
        age = step if starts is None else step - starts[span]
        if weight_decay != 0:
            weight.mul_(1 - lr * weight_decay)
        m, v = exp_avg[span], exp_avg_sq[span]
        m.lerp_(grad, 1 - beta1)
        v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        correction1, correction2 = _correction(beta1, age), _correction(beta2, age)
        denom = v.sqrt().div_(correction2**0.5).add_(eps)
        if starts is None:
            weight.addcdiv_(m, denom, value=-(lr / correction1))
        else:
            weight.addcdiv_(m / correction1.to(m.dtype), denom, value=-lr)

    update_entries_(
        update, params, grads, indices, steps, dtype=exp_avg.dtype, maximize=maximize, master=master, scale=scale
    )


def _correction(beta: float, age: float | Tensor) -> float | Tensor:
    """``1 - beta^age``; in a tensor without the cancellation, which in float32 would cost four digits."""
    if not isinstance(age, Tensor):
        return 1 - beta**age
    return -torch.expm1(age * (math.log(beta) if beta else -math.inf))
