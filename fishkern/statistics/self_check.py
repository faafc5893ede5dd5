"""The self-check: captured gradients against ordinary autograd, on two examples or one, before anything is counted."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn

from fishkern.layers import UnsupportedModuleError, is_wrapped, leave_out
from fishkern.names import listed
from fishkern.statistics.autograd import backward, only_trainable, take_grad, with_last
from fishkern.statistics.batches import Examples

_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}  # float64 models have float32 inside (Gemma's norms)
_TOLERANCE_16_BIT = 0.05  # gradients are rounded to 8 (bfloat16) or 11 bits before autograd's are squared


def disagreements(
    parameters: Mapping[str, nn.Parameter],
    states: Mapping[str, Tensor],
    objective: Callable[[Examples], Tensor],
    two: Examples,
    *,
    kept: Collection[str],
    half: bool,
) -> dict[str, str]:
    """Find the parameters whose captured squares are not those of ordinary autograd.

    Each example runs alone. In 16 bits a model's rounding depends on the batch, so there both examples share one
    forward pass, which leaves nothing but the capture to differ. One gradient is alive at a time.

    Args:
        parameters: What to compare, by canonical name, frozen.
        states: Captured ``sum_n grad_n^2`` over the two examples; used up.
        objective: Losses of a batch ``[N]``.
        two: The two examples, or the one of a batch of one.
        kept: Parameters whose gradient arrives in several parts and is read only when backward has ended.
        half: Whether the model computes in 16 bits somewhere.

    Returns:
        The reason in words, for each parameter that disagrees.

    Raises:
        UnsupportedModuleError: Autograd gives a parameter no gradient, and the capture does.
    """
    scales = dict.fromkeys(parameters, 0.0)
    arrived: set[str] = set()

    def compare(key: str) -> None:
        grad = take_grad(parameters[key])
        if grad is None:
            return
        arrived.add(key)
        squares = grad.to(states[key].dtype).square()
        scales[key] += squares.max().item() if squares.numel() else 0.0
        states[key].sub_(squares.to(states[key].device))

    def subtract(loss: Tensor, retain_graph: bool = False) -> None:
        backward(loss, retain_graph=retain_graph)
        for key in parameters:
            compare(key)

    with only_trainable(parameters.values()):
        at_once = {parameter: key for key, parameter in parameters.items() if key not in kept}
        handles = [
            parameter.register_post_accumulate_grad_hook(lambda parameter: compare(at_once[parameter]))
            for parameter in at_once
        ]
        try:
            if half:
                for loss, last in with_last(iter(objective(two))):
                    subtract(loss, retain_graph=not last)
            else:
                for one in two.singly():
                    subtract(objective(one)[0])
        finally:
            for handle in handles:
                handle.remove()
    # a weight in a tensor subclass keeps its capture, for there is no other
    captured = {
        key: one
        for key, one in parameters.items()
        if key not in arrived and not is_wrapped(one) and bool(states[key].any())
    }
    if captured:
        _refuse_without_gradient(captured, objective, two)
    compared = {key: one for key, one in parameters.items() if key in arrived or key in captured}
    return _judged(compared, states, scales, half)


def _refuse_without_gradient(
    parameters: Mapping[str, nn.Parameter], objective: Callable[[Examples], Tensor], two: Examples
) -> None:
    """Refuse what only the capture sees, unless it is a choice of the batch that an example alone does not make."""
    with only_trainable(parameters.values()):
        backward(objective(two).sum())
        cut = sorted(key for key, parameter in parameters.items() if take_grad(parameter) is None)
    if cut:
        raise UnsupportedModuleError(
            f"a gradient arrives at the modules of {listed(cut)}, and ordinary autograd gives none to the parameters: "
            f"the modules compute without gradients, or detach them. {leave_out(cut, by_autograd=False)}"
        )


def _judged(
    parameters: Mapping[str, nn.Parameter], states: Mapping[str, Tensor], scales: Mapping[str, float], half: bool
) -> dict[str, str]:
    largest = max(scales.values(), default=0.0)
    found = {}
    for key, parameter in parameters.items():
        if not parameter.numel():
            continue
        error = states[key].abs().max().item()
        # a gradient that is zero but for rounding (a key's bias) is compared at the scale of the whole model
        rounding = (64 * torch.finfo(torch.bfloat16 if half else parameter.dtype).eps) ** 2 * largest
        tolerance = _TOLERANCE_16_BIT if half else _TOLERANCE[parameter.dtype]
        if not error <= tolerance * scales[key] + rounding * (1e-2 if half else 1.0):
            relative = error / scales[key] if scales[key] else float("inf")
            found[key] = (
                f"ordinary autograd disagrees with its captured gradient (relative error {relative:.1e}), as happens "
                "when a parameter is used past its module's call"
            )
    return found
