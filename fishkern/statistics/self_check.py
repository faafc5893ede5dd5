"""The self-check: compare captured gradients with ordinary autograd, on two examples or one, before counting.

Either the captured gradients of both examples have been added to states. As soon as autograd's gradient of an example
arrives, its contribution (``of_gradient``) is subtracted, and only rounding should remain. Or what was captured can be
given parameter by parameter: then autograd's contributions are added up first, compared with it, and replaced by it. So
the check needs memory for the states, and one gradient or one state.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fishkern.layers import UnsupportedModuleError, is_wrapped, leave_out
from fishkern.names import listed
from fishkern.statistics.autograd import backward, only_trainable, take_grad, with_last
from fishkern.statistics.base import Estimator, State, added_to, sums
from fishkern.statistics.batches import Examples
from fishkern.statistics.states import States

Objective = Callable[[Examples], Tensor]

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}  # float64 models have float32 inside (Gemma's norms)
TOLERANCE_16_BIT = 0.05  # gradients are rounded to 8 (bfloat16) or 11 bits before autograd's are squared
# A gradient below so many units of rounding of the model's largest is zero but for rounding (a key's bias).
ROUNDING, ROUNDING_16_BIT = 64, 6.4


def disagreements(
    parameters: Mapping[str, nn.Parameter],
    states: States,
    estimator: Estimator,
    objective: Objective,
    few: Examples,
    *,
    reused: Collection[str],
    half: bool,
) -> dict[str, str]:
    """Find the parameters whose captured gradients differ from ordinary autograd.

    Each example runs alone. In 16 bits a model's rounding depends on the batch, so there both examples share one
    forward pass, and nothing but the capture can differ.

    Args:
        parameters: What to compare, by canonical name, frozen.
        states: States to which the captured gradients of the two examples have been added; changed.
        estimator: The estimator of the states; it defines ``of_gradient``.
        objective: Gives the losses ``[N]`` of a batch.
        few: The two examples, or the one of a batch of one.
        reused: Parameters whose gradient arrives in several parts, so it is read only after backward.
        half: Whether any part of the model computes in 16 bits.

    Returns:
        The reason in words, for each parameter that differs.

    Raises:
        UnsupportedModuleError: Autograd gives a parameter no gradient, and the capture does.
    """
    comparison = _Comparison(states, estimator, half, subtracts=True)
    _back_propagate_alone(parameters, comparison.take, objective, few, reused=reused, half=half)
    # A parameter without any gradient of autograd must have captured none. A weight in a tensor subclass may get none,
    # although it does have one: its capture is all there is.
    captured = {
        key: one
        for key, one in parameters.items()
        if key not in comparison.grad_squares
        and not is_wrapped(one)
        and any(states.largest(total) != 0 for total in sums(states[key]))
    }
    if captured:
        _refuse_without_gradient(captured, objective, few)
    compared = {**captured, **{key: one for key, one in parameters.items() if key in comparison.grad_squares}}
    reasons = {}
    for key, parameter in compared.items():
        if parameter.numel() and (error := comparison.error(key, parameter)) is not None:
            reasons[key] = _disagrees(error)
    return reasons


def replaced_disagreements(
    parameters: Mapping[str, nn.Parameter],
    states: States,
    estimator: Estimator,
    objective: Objective,
    few: Examples,
    captured: Iterable[tuple[str, State | None]],
    *,
    reused: Collection[str],
    half: bool,
) -> dict[str, str]:
    """Do as :func:`disagreements`, with captured gradients that come parameter by parameter.

    Args:
        parameters: As for :func:`disagreements`.
        states: Zero; afterwards the captured contributions of the examples.
        estimator: As for :func:`disagreements`.
        objective: As for :func:`disagreements`.
        few: As for :func:`disagreements`.
        captured: Of each parameter with a state, also of those that autograd gives none, what capture adds to it;
            ``None`` where nothing is compared, and nothing added.
        reused: As for :func:`disagreements`.
        half: As for :func:`disagreements`.

    Returns:
        As :func:`disagreements`.

    Raises:
        UnsupportedModuleError: As :func:`disagreements`.
    """
    comparison = _Comparison(states, estimator, half, subtracts=False)
    _back_propagate_alone(parameters, comparison.take, objective, few, reused=reused, half=half)
    reasons, without = {}, {}
    for key, state in captured:
        own = [torch.zeros_like(total) for total in sums(states[key])] if state is None else sums(state)
        if state is not None and key in parameters:
            parameter = parameters[key]
            by_autograd = key in comparison.grad_squares
            if not by_autograd and not is_wrapped(parameter) and any(states.largest(one) != 0 for one in own):
                without[key] = parameter
            if parameter.numel() and (by_autograd or key in without):
                comparison.subtract(key, own)
                if (error := comparison.error(key, parameter)) is not None:
                    reasons[key] = _disagrees(error)
        for total, one in zip(sums(states[key]), own, strict=True):
            total.copy_(one)
    if without:
        _refuse_without_gradient(without, objective, few)
    return reasons


def _disagrees(error: float) -> str:
    return (
        f"ordinary autograd disagrees with its captured gradient (relative error {error:.1e}), as happens when a "
        "parameter is used past its module's call, or when the rule that a module brings (fishkern_layer) is wrong"
    )


@dataclass
class _Comparison:
    """Captured states and autograd's gradients, one of which is subtracted from the other.

    Args:
        states: As for :func:`disagreements`.
        estimator: As for :func:`disagreements`.
        half: As for :func:`disagreements`.
        subtracts: Whether autograd's contributions are subtracted from the states, or added.
        scales: For each parameter, the size of what autograd contributes to each of its sums.
        grad_squares: For each parameter with a gradient, the sum over examples of its largest square.
        incomparable: Sums, by parameter and number, that are no function of a gradient.
    """

    states: States
    estimator: Estimator
    half: bool
    subtracts: bool
    scales: dict[str, list[float]] = field(default_factory=dict)
    grad_squares: dict[str, float] = field(default_factory=dict)
    incomparable: set[tuple[str, int]] = field(default_factory=set)

    def take(self, key: str, grad: Tensor) -> None:
        """Subtract the contribution of one example's gradient from the state, or add it."""
        grad = self.states.gradient(key, grad)
        totals = sums(self.states[key])
        scales = self.scales.setdefault(key, [0.0] * len(totals))
        for place, added in enumerate(self._added(key, grad)):
            if added is None:
                self.incomparable.add((key, place))
                totals[place].zero_()
            else:
                scales[place] += self.states.largest(added)
                totals[place].add_(added.to(totals[place]), alpha=-1 if self.subtracts else 1)
        self.grad_squares[key] = self.grad_squares.get(key, 0.0) + self.states.largest(grad) ** 2

    def subtract(self, key: str, captured: Sequence[Tensor]) -> None:
        """Subtract what was captured from what autograd has contributed."""
        for place, (total, one) in enumerate(zip(sums(self.states[key]), captured, strict=True)):
            if (key, place) not in self.incomparable:
                total.sub_(one.to(total))

    def error(self, key: str, parameter: nn.Parameter) -> float | None:
        """Return the relative error of a parameter, or ``None`` if it is within rounding."""
        tolerance = TOLERANCE_16_BIT if self.half else TOLERANCE[parameter.dtype]
        totals = sums(self.states[key])
        scales = self.scales.get(key, [0.0] * len(totals))
        worst = None
        for place, (total, scale) in enumerate(zip(totals, scales, strict=True)):
            error = self.states.largest(total)
            # "not <=" instead of ">", so that NaN fails; the rounding, which takes a tensor, only where it may decide
            if not error <= tolerance * scale and not error <= tolerance * scale + self._rounding(key, place):
                relative = error / scale if scale else float("inf")
                worst = relative if worst is None else max(worst, relative)
        return worst

    def _rounding(self, key: str, place: int) -> float:
        """Return what a gradient of rounding alone may add, at the scale of the model's largest gradient."""
        info = self.states.info(key)
        steps = ROUNDING_16_BIT if self.half else ROUNDING
        eps = torch.finfo(torch.bfloat16 if self.half else info.dtype).eps
        size = steps * eps * max(self.grad_squares.values(), default=0.0) ** 0.5
        grad = torch.full((), size, dtype=info.dtype, device=info.value.device).expand(info.shape)
        added = self._added(key, grad)[place]
        return 0.0 if added is None else self.states.largest(added)

    def _added(self, key: str, grad: Tensor) -> list[Tensor | None]:
        return added_to(self.states[key], self.estimator.of_gradient(grad, self.states.info(key)))


def _back_propagate_alone(
    parameters: Mapping[str, nn.Parameter],
    take: Callable[[str, Tensor], None],
    objective: Objective,
    few: Examples,
    *,
    reused: Collection[str],
    half: bool,
) -> None:
    """Back-propagate each example's loss alone, and pass on the gradients, with one in memory at a time."""

    def read(key: str) -> None:
        if (grad := take_grad(parameters[key])) is not None:
            take(key, grad)

    def finish(loss: Tensor, *, retain_graph: bool = False) -> None:
        backward(loss, retain_graph=retain_graph)
        for key in parameters:
            read(key)

    with only_trainable(parameters.values()):
        # Reading each gradient as it arrives keeps one in memory at a time. That of a reused parameter may arrive in
        # parts (reentrant checkpointing runs a backward for each segment), so it is read in the end.
        at_once = {parameter: key for key, parameter in parameters.items() if key not in reused}
        handles = [
            parameter.register_post_accumulate_grad_hook(lambda parameter: read(at_once[parameter]))
            for parameter in at_once
        ]
        try:
            if half:
                for loss, last in with_last(iter(objective(few))):
                    finish(loss, retain_graph=not last)
            else:
                for one in few.singly():
                    finish(objective(one)[0])
        finally:
            for handle in handles:
                handle.remove()


def _refuse_without_gradient(parameters: Mapping[str, nn.Parameter], objective: Objective, few: Examples) -> None:
    """Refuse parameters with a captured gradient only, unless autograd gives one for both examples together."""
    with only_trainable(parameters.values()):
        # together, because a module may choose by the batch (an expert), and an example alone may not reach it
        backward(objective(few).sum())
        cut = sorted(key for key, parameter in parameters.items() if take_grad(parameter) is None)
    if cut:
        raise UnsupportedModuleError(
            f"a gradient arrives at the modules of {listed(cut)}, and ordinary autograd gives none to the parameters: "
            f"the modules compute without gradients, or detach them. {leave_out(cut, by_autograd=False)}"
        )
