"""SGD with momentum on the selected entries."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from fishkern.ops import masked_sgd_
from fishkern.optim.base import MaskedOptimizer
from fishkern.optim.compact import Bucket, Operands
from fishkern.optim.fused import FusedOperands
from fishkern.optim.groups import Outside, Parameters
from fishkern.selection import Selection


class MaskedSGD(MaskedOptimizer):
    """SGD that moves, and keeps momentum for, only the selected entries.

    With everything selected it takes the steps of :class:`torch.optim.SGD`; see :func:`fishkern.ops.masked_sgd_` for
    the formula and :class:`fishkern.optim.MaskedOptimizer` for what all masked optimizers share.

    Args:
        model_or_named_parameters: A model, its ``named_parameters()``, or groups of them.
        selection: The entries that move.
        lr: Learning rate, a number or a zero-dimensional tensor.
        momentum: How much of the last direction stays.
        dampening: The share of a gradient that does not enter it.
        weight_decay: Decay of the selected entries, added to their gradient.
        nesterov: Nesterov's momentum.
        maximize: Go up the gradient.
        outside: See :class:`fishkern.optim.MaskedOptimizer`, as for the arguments below.
        master_weights: Keep the selected entries of 16-bit weights in float32.
        max_grad_norm: Clip by the norm of the selected entries.
        release_grads: Whose gradients are gathered and released during backward.
        fused: What torch's fused update steps: ranges of rows, also whole parameters (``True``), or nothing
            (``False``).

    Raises:
        ValueError: An option is out of range, or the selection does not fit.
    """

    fused_on: ClassVar[tuple[str, ...]] = ("cpu", "cuda")

    def __init__(
        self,
        model_or_named_parameters: Parameters,
        selection: Selection,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        outside: Outside = "error",
        master_weights: bool = True,
        max_grad_norm: float | None = None,
        release_grads: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        super().__init__(
            model_or_named_parameters,
            selection,
            dict(
                lr=lr,
                momentum=momentum,
                dampening=dampening,
                weight_decay=weight_decay,
                nesterov=nesterov,
                maximize=maximize,
            ),
            outside=outside,
            master_weights=master_weights,
            max_grad_norm=max_grad_norm,
            release_grads=release_grads,
            fused=fused,
        )

    def _check_options(self, options: dict[str, Any]) -> None:
        super()._check_options(options)
        lr, momentum, dampening, weight_decay = (
            options[name] for name in ("lr", "momentum", "dampening", "weight_decay")
        )
        if not (lr >= 0 and momentum >= 0 and weight_decay >= 0):
            raise ValueError(
                "lr, momentum and weight_decay must be at least 0, "
                f"got lr={lr}, momentum={momentum}, weight_decay={weight_decay}."
            )
        if options["nesterov"] and (momentum == 0 or dampening != 0):
            raise ValueError(
                f"Nesterov needs a momentum and no dampening, got momentum={momentum}, dampening={dampening}."
            )

    def _names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] else ()

    def _update_(self, bucket: Bucket, operands: Operands, group: dict[str, Any], scale: Tensor | None) -> None:
        masked_sgd_(
            operands.params,
            operands.grads,
            operands.indices,
            bucket.flat.get("momentum_buffer"),
            operands.steps,
            lr=group["lr"],
            momentum=group["momentum"],
            dampening=group["dampening"],
            weight_decay=group["weight_decay"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            master=bucket.master,
            starts=bucket.starts,
            scale=scale,
        )

    def _update_fused_(self, operands: FusedOperands, *, group: dict[str, Any], first: bool) -> None:
        torch._fused_sgd_(
            operands.weights,
            operands.grads,
            operands.state.get("momentum_buffer", []),
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            is_first_step=first and group["momentum"] != 0,
        )
