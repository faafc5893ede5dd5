"""One SGD step that moves, and keeps momentum for, only the selected entries of its parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fishkern.backend import Backend, choose
from fishkern.ops._entries import check_entries, update_entries_, write_back_


@torch.no_grad()
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
    backend: Backend | None = None,
) -> None:
    """Do one step of SGD on the selected entries of several parameters, in place.

    Under ``torch.compile`` a step is one node of the graph, which runs as here.

    For a selected entry with weight ``w`` and gradient ``g``, as in :class:`torch.optim.SGD`:

        g += weight_decay w
        b = momentum b + (1 - dampening) g        at its first update b = g
        w -= lr (g + momentum b if nesterov else b)

    and ``w -= lr g`` where ``momentum`` is 0. An entry that is not selected is neither read nor written. The reference
    takes these steps in the order of torch.optim's loop, so that with every entry selected it equals that bit for bit.

    Args:
        params: As in :func:`fishkern.ops.masked_adamw_`.
        grads: As there.
        indices: As there.
        momentum_buffer: ``b``, ``[K]``, float32 where there is a ``master``, else of the parameters' dtype. Changed in
            place. ``None`` where ``momentum`` is 0.
        steps: ``[P]``, float32: which update this is for each parameter, counted from 1.
        lr: Learning rate, a number or a zero-dimensional tensor.
        momentum: How much of ``b`` stays.
        dampening: How much of a gradient is kept out of ``b``.
        weight_decay: Decay, added to the gradient.
        nesterov: Look ahead by ``momentum b``.
        maximize: Go up the gradient.
        master: ``[K]``, float32, as there.
        starts: ``[K]``, float32, as there.
        scale: Zero-dimensional tensor that the gradients are multiplied by.
        backend: ``None`` for the ambient choice, see :mod:`fishkern.backend`.

    Raises:
        ValueError: Shapes, dtypes or devices are not as described.
        BackendUnavailableError: Triton was named, and cannot run.
    """
    if torch.compiler.is_compiling():
        number, tensor = (None, lr) if isinstance(lr, Tensor) else (lr, None)
        torch.ops.fishkern.masked_sgd_(
            params, grads, indices, momentum_buffer, steps,
            number, tensor, momentum, dampening, weight_decay, nesterov, maximize, master, starts, scale, backend,
        )  # fmt: skip
        return
    if (momentum_buffer is None) is not (momentum == 0):
        raise ValueError(
            f"momentum_buffer belongs to a momentum other than 0, got momentum={momentum} and "
            f"{'no buffer' if momentum_buffer is None else 'a buffer'}."
        )
    state = {"momentum_buffer": momentum_buffer}
    flat_params, flat_grads, indices = check_entries(
        params, grads, indices, steps, state=state, master=master, starts=starts
    )
    if not params:
        return
    run = choose(masked_sgd_torch_, backend, params[0], *filter(lambda tensor: tensor is not None, [momentum_buffer]))
    run(
        flat_params, flat_grads, indices, momentum_buffer, steps,
        lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov, maximize=maximize,
        master=master, starts=starts, scale=scale,
    )  # fmt: skip
    write_back_(params, flat_params)


def masked_sgd_torch_(
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
    """Compute :func:`masked_sgd_` in plain PyTorch; parameters and gradients are flat and contiguous."""

    def update(span: slice, step: float, weight: Tensor, grad: Tensor) -> None:
        if weight_decay != 0:
            grad = grad.add(weight, alpha=weight_decay)
        if momentum != 0:
            buffer = momentum_buffer[span]
            if starts is not None:
                later = torch.add(buffer * momentum, grad, alpha=1 - dampening)
                buffer.copy_(torch.where(starts[span] == step - 1, grad, later))
            elif step == 1:
                buffer.copy_(grad)
            else:
                buffer.mul_(momentum).add_(grad, alpha=1 - dampening)
            grad = grad.add(buffer, alpha=momentum) if nesterov else buffer
        weight.add_(grad, alpha=-lr)

    dtype = params[0].dtype if master is None else master.dtype
    update_entries_(update, params, grads, indices, steps, dtype=dtype, maximize=maximize, master=master, scale=scale)
