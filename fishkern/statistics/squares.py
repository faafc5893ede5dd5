"""Squared gradients of single losses by ordinary autograd, as the batch-size-1 loop takes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fishkern.layers import gradient_kept
from fishkern.statistics.answering import LossFunction
from fishkern.statistics.autograd import backward, check_finite, take_grad
from fishkern.statistics.batches import Batch
from fishkern.statistics.likelihood import Likelihood, call, recognise_likelihood


class Squares:
    """Squared gradients of single losses, summed as autograd hands them over, one gradient alive at a time.

    Args:
        model: Without running wrappers; changed only inside :meth:`collecting`.
        chosen: The parameters whose gradients are squared, by canonical name.
        likelihood: As for :func:`fishkern.estimate`.

    Attributes:
        device: Where the model is.
        arrived: Names of those that a gradient has reached.
    """

    def __init__(
        self, model: nn.Module, chosen: Mapping[str, nn.Parameter], likelihood: Likelihood | LossFunction | None
    ) -> None:
        self._model = model
        self._chosen = chosen
        self._likelihood = likelihood
        self._totals: dict[str, Tensor] = {}
        self.arrived: set[str] = set()
        self.device = next(iter(chosen.values())).device

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Listen to the parameters, and leave the model as found."""
        found = [(parameter, parameter.requires_grad, parameter.grad) for parameter in self._model.parameters()]
        names = {parameter: name for name, parameter in self._chosen.items()}
        handles = []
        modes = {module: module.training for module in self._model.modules()}
        devices = [self.device] if self.device.type == "cuda" else []
        with (
            torch.compiler.set_stance("force_eager"),
            torch.enable_grad(),
            torch.random.fork_rng(devices),
            gradient_kept(self._model),
        ):
            try:
                for module in modes:
                    module.training = False  # activation checkpointing included: single examples need none
                for parameter, _, _ in found:
                    parameter.grad = None
                    parameter.requires_grad_(parameter in names)
                for parameter in names:
                    handles.append(parameter.register_post_accumulate_grad_hook(lambda p: self._square(names[p], p)))
                yield
            finally:
                for handle in handles:
                    handle.remove()
                for module, mode in modes.items():
                    module.training = mode
                for parameter, required, grad in found:
                    parameter.requires_grad_(required)
                    parameter.grad = grad

    def taken(self) -> dict[str, Tensor]:
        """Take the sums so far; zeros where no gradient arrived."""
        totals, self._totals = self._totals, {}
        for name, parameter in self._chosen.items():
            if name not in totals:  # zeros_like is more than some tensor subclasses can do
                totals[name] = torch.zeros(parameter.shape, dtype=_wide(parameter), device=parameter.device)
        return {name: totals[name] for name in self._chosen}

    def add_alone(self, row: Batch, place: int) -> None:
        """Add the squared gradient of one example, by the loss that the model itself returns where it does."""
        losses = self._own_loss(row)
        losses = self._losses(row) if losses is None else losses
        check_finite(losses, range(place, place + 1))
        backward(losses[0])

    def add_in_batch(self, batch: Batch) -> None:
        """Add the squared gradient of each example, back-propagated through the batch."""
        losses = self._losses(batch)
        check_finite(losses, range(len(losses)))
        for loss in losses:
            backward(loss, retain_graph=True)

    def _own_loss(self, row: Batch) -> Tensor | None:
        if self._likelihood is not None or not isinstance(row, Mapping):
            return None
        loss = getattr(call(self._model, row), "loss", None)
        return loss[None] if isinstance(loss, Tensor) and loss.ndim == 0 else None

    def _losses(self, batch: Batch) -> Tensor:
        likelihood = recognise_likelihood(self._model, batch) if self._likelihood is None else self._likelihood
        if isinstance(likelihood, Likelihood):
            return likelihood.predictive(self._model, batch).losses()
        return likelihood(self._model, batch)

    def _square(self, name: str, parameter: nn.Parameter) -> None:
        if (grad := take_grad(parameter)) is None:
            return
        self.arrived.add(name)
        grad = grad.to(_wide(parameter))
        if name in self._totals:
            self._totals[name].addcmul_(grad, grad)
        else:
            self._totals[name] = grad.square()


def _wide(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)
