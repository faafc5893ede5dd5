"""AdamW on the selected entries."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from fishkern.ops import masked_adamw_
from fishkern.optim.base import MaskedOptimizer
from fishkern.optim.compact import Bucket, Operands
from fishkern.optim.fused import FusedOperands
from fishkern.optim.groups import Outside, Parameters
from fishkern.selection import Selection


class MaskedAdamW(MaskedOptimizer):
    """AdamW that moves, and keeps state for, only the selected entries.

    With everything selected it takes the steps of :class:`torch.optim.AdamW`; see
    :func:`fishkern.ops.masked_adamw_` for the formula and :class:`fishkern.optim.MaskedOptimizer` for what all masked
    optimizers share.

    Args:
        model_or_named_parameters: A model, its ``named_parameters()``, or groups of them.
        selection: The entries that move.
        lr: Learning rate, a number or a zero-dimensional tensor.
        betas: Decay of the averages of gradient and squared gradient.
        eps: Added to the denominator.
        weight_decay: Decoupled decay, of the selected entries.
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
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
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
            dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize),
            outside=outside,
            master_weights=master_weights,
            max_grad_norm=max_grad_norm,
            release_grads=release_grads,
            fused=fused,
        )

    def _check_options(self, options: dict[str, Any]) -> None:
        super()._check_options(options)
        lr, betas, eps, weight_decay = (options[name] for name in ("lr", "betas", "eps", "weight_decay"))
        if not (lr >= 0 and eps >= 0 and weight_decay >= 0 and all(0 <= beta < 1 for beta in betas)):
            raise ValueError(
                "lr, eps and weight_decay must be at least 0 and betas in [0, 1), "
                f"got lr={lr}, eps={eps}, weight_decay={weight_decay}, betas={betas}."
            )

    def _names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def _update_(self, bucket: Bucket, operands: Operands, group: dict[str, Any], scale: Tensor | None) -> None:
        masked_adamw_(
            operands.params,
            operands.grads,
            operands.indices,
            bucket.flat["exp_avg"],
            bucket.flat["exp_avg_sq"],
            operands.steps,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
            master=bucket.master,
            starts=bucket.starts,
            scale=scale,
        )

    def _update_fused_(self, operands: FusedOperands, *, group: dict[str, Any], first: bool) -> None:
        torch._fused_adamw_(
            operands.weights,
            operands.grads,
            operands.state["exp_avg"],
            operands.state["exp_avg_sq"],
            [],  # of AMSGrad
            operands.steps,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=group["maximize"],
        )
