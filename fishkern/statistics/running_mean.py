"""The running mean of the squares of training steps, with the sums of the step that is being read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fishkern.names import listed
from fishkern.statistics.states import States


class RunningMean:
    """A running mean over steps: ``F <- decay F + (1 - decay) F_step``, from zero.

    A step is one backward pass or several. The captured gradients of example ``n`` are those of its share of the step's
    loss, times the scale of the loss, so with ``N`` the examples of all passes ``F_step = N sum_n grad_n^2 / scale^2``.

    Args:
        states: The sums of a step; one tensor for each parameter, all zero.
        decay: At least 0 and below 1.
        skips: Whether a step whose squares are not finite is left out; if not, it is an error.

    Attributes:
        states: As given.
        decay: As given.
        steps: Number of steps in the mean.
        examples: Number of their examples.
        skipped: Number of steps that were left out: not finite, or interrupted.
        passes: Number of backward passes of the step that is being read.

    Raises:
        ValueError: ``decay`` is out of range.
    """

    def __init__(self, states: States, decay: float, *, skips: bool) -> None:
        if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 <= decay < 1:
            raise ValueError(f"decay must be a number of at least 0 and below 1, got {decay!r:.80}.")
        self.states = states
        self.decay = float(decay)
        self._skips = skips
        self._means = {name: torch.zeros_like(states[name]) for name in states.names}
        self.steps = self.examples = self.skipped = 0
        self.passes = self._pending = 0
        self._scale = 1.0

    def end_pass(self, examples: int, scale: float) -> None:
        """Count a backward pass whose squares have been added to the states.

        Args:
            examples: Number of its examples.
            scale: By what its loss was multiplied.

        Raises:
            ValueError: Another pass of the step had another scale.
        """
        if self.passes and scale != self._scale:
            before = self._scale
            self.drop_step()
            raise ValueError(
                f"the scale of the loss changed from {before} to {scale} within a step: update the GradScaler after "
                "all backward passes of a step, and give their number as accumulation_steps."
            )
        self._scale = scale
        self.passes += 1
        self._pending += examples

    @torch.no_grad()
    def end_step(self) -> None:
        """Add the step that is being read to the mean, if there is one.

        Raises:
            ValueError: Its squares are not finite, and no scaler explains that.
        """
        if not self.passes:
            return
        sums = {name: self.states[name] for name in self.states.names}
        if (infinite := _not_finite(sums)) and not self._skips:
            self.drop_step()
            raise ValueError(
                f"the squared gradients of step {self.steps + 1} are infinite or NaN in {listed(infinite)}: the loss "
                "or the model overflowed. Give the GradScaler that the loss is scaled by as scaler=, or leave the "
                "context for such a step."
            )
        if infinite:
            self.skipped += 1
        else:
            weight = (1 - self.decay) * self._pending / self._scale**2
            for name, total in sums.items():
                self._means[name].mul_(self.decay).add_(total, alpha=weight)
            self.steps += 1
            self.examples += self._pending
        self.drop_step()

    def interrupt(self) -> None:
        """Leave out a step whose only backward pass was interrupted by an exception, which somebody has caught.

        Raises:
            RuntimeError: Earlier passes of the same step were read, which cannot be told apart from it.
        """
        passes = self.passes
        self.drop_step()
        if passes:
            raise RuntimeError(
                f"an exception interrupted a backward pass after {passes} other(s) of the same step, so the step "
                "cannot be read. The mean is that of the steps before; the next backward pass begins a step."
            )
        self.skipped += 1

    def drop_step(self) -> None:
        """Forget the step that is being read."""
        self.states.zero_()
        self.passes = self._pending = 0

    def corrected(self) -> dict[str, Tensor]:
        """Divide by the weights' sum, ``1 - decay^steps``.

        Returns:
            New tensors by canonical name, float32.
        """
        # a tied weight's squares are formed as A^2 + (2A + E)E, which rounding may leave just below zero
        weight = 1 - self.decay**self.steps
        return {name: mean.div(weight).clamp_(min=0).float() for name, mean in self._means.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the mean, the counts, and the sums of the step that is being read, if there is one.

        Returns:
            The tensors themselves, not copies.
        """
        counts = {name: getattr(self, name) for name in ("decay", "steps", "examples", "skipped", "passes")}
        state = {**counts, "means": dict(self._means)}
        if self.passes:
            sums = {name: self.states[name] for name in self.states.names}
            state |= {"pending_examples": self._pending, "scale": self._scale, "sums": sums}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state.

        Args:
            state: From :meth:`state_dict`; copied.

        Raises:
            ValueError: It is of another decay or other parameters.
        """
        if state["decay"] != self.decay:
            raise ValueError(f"the state is of decay={state['decay']}, and this OnlineFisher has {self.decay}.")
        ours = {name: tuple(mean.shape) for name, mean in self._means.items()}
        theirs = {name: tuple(mean.shape) for name, mean in state["means"].items()}
        if ours != theirs:
            differ = sorted(name for name in ours | theirs if ours.get(name) != theirs.get(name))
            raise ValueError(
                f"the state is of other parameters: {listed(differ)} differ in presence or shape. By default those "
                "with requires_grad take part: make it before some are frozen, or name those of then (parameters=)."
            )
        self.drop_step()
        for name in ours:
            self._means[name].copy_(state["means"][name])
            if state["passes"]:
                self.states[name].copy_(state["sums"][name])
        self.steps, self.examples, self.skipped = state["steps"], state["examples"], state["skipped"]
        self.passes = state["passes"]
        if self.passes:
            self._pending, self._scale = state["pending_examples"], state["scale"]


def _not_finite(sums: Mapping[str, Tensor]) -> list[str]:
    """List the parameters whose sums hold an infinite value or NaN."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for total in sums.values():
        by_device.setdefault(total.device, []).append(total.sum())
    # one value to wait for on each device; a sum of finite ones may overflow, so the rest is looked at only then
    if all(math.isfinite(torch.stack(totals).sum().item()) for totals in by_device.values()):
        return []
    return [name for name, total in sums.items() if not bool(total.isfinite().all())]
