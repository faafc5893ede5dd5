"""Check of a training step: the gradients of the examples must add up to the gradient that autograd forms.

It needs no second run, but a tensor of each parameter's size for the time of one backward pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fishkern.layers import PerExampleGrads, UnsupportedModuleError, has_gradient_dtype, leave_out
from fishkern.ops.dtypes import accumulates_in
from fishkern.statistics.self_check import ROUNDING, ROUNDING_16_BIT, TOLERANCE, TOLERANCE_16_BIT

_HALF = (torch.float16, torch.bfloat16)


class GradientCheck:
    """Compare the captured gradients of one backward pass, summed over examples, with those of autograd.

    Args:
        parameters: By canonical name; those to which autograd gives no gradient are not compared.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._all = {key: one for key, one in parameters.items() if has_gradient_dtype(one)}
        self._half = any(one.dtype in _HALF for one in self._all.values())
        self._parameters: dict[str, Tensor] = {}
        self._gaps: dict[str, Tensor] = {}
        self._largest: dict[str, Tensor] = {}
        self._handles: list[Any] = []

    def begin(self) -> None:
        """Watch the gradients of the backward pass that follows."""
        self.end()
        self._parameters = {key: one for key, one in self._all.items() if one.requires_grad}
        device_types = {one.device.type for one in self._all.values()}
        self._half |= any(torch.is_autocast_enabled(device_type) for device_type in device_types)
        self._handles = [one.register_hook(partial(self._take, key)) for key, one in self._parameters.items()]

    def end(self) -> None:
        """Stop watching, and forget what has arrived."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._parameters = {}
        self._gaps.clear()
        self._largest.clear()

    def note(self, key: str, grads: PerExampleGrads) -> None:
        """Add the captured gradients of one use of a parameter.

        Args:
            key: Its canonical name.
            grads: Of all examples, or of one of them.
        """
        if key in self._parameters:
            self._half |= getattr(grads, "output_grads", self._parameters[key]).dtype in _HALF
            gap = self._gap(key)
            for n in range(grads.num_examples):
                gap += grads.example(n).reshape(gap.shape)

    def judge(self) -> bool:
        """Compare.

        Returns:
            Whether it could be compared: not where a gradient is infinite or NaN, as a loss scale too large gives them.

        Raises:
            UnsupportedModuleError: A parameter's gradients do not add up.
        """
        largest = {key: self._largest[key].item() if key in self._largest else 0.0 for key in self._gaps}
        whole = max(largest.values(), default=0.0)
        errors = {key: gap.abs().max().item() for key, gap in self._gaps.items() if gap.numel()}
        if not torch.tensor([whole, *errors.values()]).isfinite().all():
            return False
        wrong = {
            key: error / largest[key] if largest[key] else float("inf")
            for key, error in errors.items()
            if error > self._allowed(key, largest[key], whole)
        }
        if wrong:
            worst = max(wrong, key=wrong.__getitem__)
            raise UnsupportedModuleError(
                f"the gradients of the examples do not add up to the gradient of {sorted(wrong)} (relative error of "
                f"{worst}: {wrong[worst]:.1e}), as happens when a parameter is used past its module's call, or the "
                "loss has a term in which no example has a share, such as a penalty on weights. "
                f"{leave_out(wrong, by_autograd=False)} Or pass check=False: the statistics are then those of what "
                "passes through the modules."
            )
        return True

    def _allowed(self, key: str, largest: float, whole: float) -> float:
        """Allow rounding, in units of the parameter's largest gradient or, where that is nearly zero, the model's."""
        if self._half:
            return TOLERANCE_16_BIT * largest + ROUNDING_16_BIT * torch.finfo(torch.bfloat16).eps * whole
        dtype = self._parameters[key].dtype
        return TOLERANCE[dtype] * largest + ROUNDING * torch.finfo(dtype).eps * whole

    @torch.no_grad()
    def _take(self, key: str, grad: Tensor) -> None:
        grad = grad.to_dense() if grad.is_sparse else grad
        gap = self._gap(key)
        gap -= grad
        size = grad.abs().max() if grad.numel() else grad.new_zeros(())
        self._largest[key] = torch.maximum(self._largest.get(key, size), size)

    def _gap(self, key: str) -> Tensor:
        if key not in self._gaps:
            one = self._parameters[key]
            self._gaps[key] = torch.zeros(one.shape, dtype=accumulates_in(one.dtype), device=one.device)
        return self._gaps[key]
