"""Operations in the graphs of ``torch.compile``: one node each, as custom operators of torch.

An operation chooses its backend by tensors, a context and the device, and reads lengths from the device: Dynamo would
break the graph in all of these. So under the compiler it calls the operator here, which calls it again when the graph
runs. In eager mode nothing goes through the dispatcher.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, library

from fishkern.backend import Backend
from fishkern.ops.masked_adamw import masked_adamw_
from fishkern.ops.masked_sgd import masked_sgd_
from fishkern.ops.sum_grad_squared import sum_grad_squared


@library.custom_op(
    "fishkern::sum_grad_squared_",
    mutates_args=("out", "grad_out"),
    schema="(Tensor(a!) out, Tensor(b!)? grad_out, Tensor activations, Tensor output_grads, Tensor? offsets, "
    "bool allow_tf32, str? backend) -> ()",
)
def _sum_grad_squared(
    out: Tensor,
    grad_out: Tensor | None,
    activations: Tensor,
    output_grads: Tensor,
    offsets: Tensor | None,
    allow_tf32: bool,
    backend: Backend | None,
) -> None:
    sum_grad_squared(
        activations, output_grads,
        offsets=offsets, out=out, grad_out=grad_out, allow_tf32=allow_tf32, backend=backend,
    )  # fmt: skip


@library.custom_op(
    "fishkern::masked_adamw_",
    mutates_args=("params", "exp_avg", "exp_avg_sq", "master"),
    schema="(Tensor(a!)[] params, Tensor?[] grads, Tensor?[] indices, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, "
    "Tensor steps, float? lr, Tensor? lr_tensor, float beta1, float beta2, float eps, float weight_decay, "
    "bool maximize, Tensor(d!)? master, Tensor? starts, Tensor? scale, str? backend) -> ()",
)
def _masked_adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    indices: Sequence[Tensor | None],
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    steps: Tensor,
    lr: float | None,
    lr_tensor: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    master: Tensor | None,
    starts: Tensor | None,
    scale: Tensor | None,
    backend: Backend | None,
) -> None:
    masked_adamw_(
        params, grads, indices, exp_avg, exp_avg_sq, steps,
        lr=lr if lr_tensor is None else lr_tensor,
        beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, maximize=maximize,
        master=master, starts=starts, scale=scale, backend=backend,
    )  # fmt: skip


@library.custom_op(
    "fishkern::masked_sgd_",
    mutates_args=("params", "momentum_buffer", "master"),
    schema="(Tensor(a!)[] params, Tensor?[] grads, Tensor?[] indices, Tensor(b!)? momentum_buffer, Tensor steps, "
    "float? lr, Tensor? lr_tensor, float momentum, float dampening, float weight_decay, bool nesterov, "
    "bool maximize, Tensor(c!)? master, Tensor? starts, Tensor? scale, str? backend) -> ()",
)
def _masked_sgd(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    indices: Sequence[Tensor | None],
    momentum_buffer: Tensor | None,
    steps: Tensor,
    lr: float | None,
    lr_tensor: Tensor | None,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    master: Tensor | None,
    starts: Tensor | None,
    scale: Tensor | None,
    backend: Backend | None,
) -> None:
    masked_sgd_(
        params, grads, indices, momentum_buffer, steps,
        lr=lr if lr_tensor is None else lr_tensor,
        momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov, maximize=maximize,
        master=master, starts=starts, scale=scale, backend=backend,
    )  # fmt: skip
