"""From the model and a batch to its predictive distribution or its losses, with the loss checked once."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from fishkern import hosts
from fishkern.statistics.batches import Batch, num_examples, take
from fishkern.statistics.likelihood import Likelihood, recognise_likelihood
from fishkern.statistics.likelihood_argument import LossFunction, checked_likelihood, described
from fishkern.statistics.outputs import own_loss
from fishkern.statistics.predictive import Predictive

__all__ = ["Answering", "LossFunction"]


class Answering:
    """Runs the model on a batch and gives its predictive distribution, or its losses.

    Args:
        model: In evaluation mode.
        likelihood: The loss of an example; ``None``: recognised from the model and its first batch.

    Raises:
        TypeError: ``likelihood`` is none.
    """

    def __init__(self, model: nn.Module, likelihood: Likelihood | LossFunction | None) -> None:
        self._model = model
        self._likelihood = checked_likelihood(likelihood)
        self._named = likelihood is not None
        self._usual = 1

    def prepare(self, batch: Batch) -> None:
        """Recognise the likelihood, and compare the loss of one example with the model's own.

        Args:
            batch: The first batch.

        Raises:
            ValueError: The model's loss is not known, or is another; or a function's losses are cut off from the model.

        Warns:
            UserWarning: The likelihood was named, and the model's own loss is another.
        """  # noqa: DOC502
        self._usual = num_examples(batch)
        example = take(batch, slice(0, 1))
        if self._likelihood is None:
            self._likelihood = recognise_likelihood(self._model, batch)
        if isinstance(self._likelihood, Likelihood):
            self._likelihood = self._likelihood.settled(self._model, example)
            _compare_with_own_loss(self._model, self._likelihood, example, self._named)
        else:
            self._demand_gradient(take(batch, slice(0, 2)))

    @property
    def description(self) -> str:
        """The likelihood, for the provenance."""
        return described(self._likelihood)

    def __call__(self, batch: Batch) -> Predictive | Tensor:
        if isinstance(self._likelihood, Likelihood):
            return self._likelihood.predictive(self._model, batch)
        losses = self._likelihood(self._model, batch)
        N = num_examples(batch)
        if not isinstance(losses, Tensor) or losses.shape != (N,):
            raise ValueError(_not_one_for_each(losses, N, self._usual))
        return losses

    def _demand_gradient(self, examples: Batch) -> None:
        """Refuse a function whose losses no gradient leads from, before the pass rather than after it."""
        with _differentiable(self._model):
            losses = self(examples)
        if not losses.requires_grad:
            raise ValueError(
                f"the losses of {self.description} are cut off from the model, so that no gradient arrives: it must "
                "return what torch computed from the model's output, without detach(), item(), numpy() or no_grad()."
            )


def _not_one_for_each(losses: object, N: int, usual: int) -> str:
    """Say what a likelihood function returned instead of ``[N]``, and what to do."""
    tried = {1: " (an example is tried alone first)", 2: " (the first two examples are tried first)"}
    where = f"a batch of {N}{tried.get(N, '') if usual > N else ''}"
    expected = f"the likelihood function must return one loss for each example, a tensor of shape ({N},)"
    if isinstance(losses, Tensor) and losses.ndim and losses.shape[0] == N:
        shape = tuple(losses.shape)
        return f"{expected}; for {where} came {shape}: sum or average over the other axes, losses.flatten(1).mean(1)."
    if isinstance(losses, Tensor) and losses.ndim == 1 and len(losses) and len(losses) % N == 0:
        return (
            f"{expected}; for {where} came {len(losses)} values: average those of each example, losses.view({N}, "
            "-1).mean(1)."
        )
    if isinstance(losses, Tensor):
        got = "one number" if losses.numel() == 1 else f"{tuple(losses.shape)}"
    else:
        got = type(losses).__name__
    return f"{expected}; for {where} came {got}: do not sum or average over the batch (reduction='none')."


@contextmanager
def _differentiable(model: nn.Module) -> Iterator[None]:
    """Let every parameter that can require a gradient do so, and all be as it was afterwards."""
    found = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in found:
            parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
        yield
    finally:
        for parameter, required in found:
            parameter.requires_grad_(required)


def _compare_with_own_loss(model: nn.Module, likelihood: Likelihood, example: Batch, named: bool) -> None:
    """Compare a loss with what the model returns for the example, to the rounding of its dtype.

    One that was recognised must be the model's own. One that was named is the user's word, and is noted.

    Raises:
        ValueError: A recognised loss is not the model's own.
    """
    labels = [key for key in ("labels", "start_positions") if isinstance(example, Mapping) and key in example]
    if not labels or not all(hosts.accepts(model, key) for key in labels):
        return
    # ours first: it names a label that the model does not know, at which its own loss may end the process
    ours = replace(likelihood.predictive(model, example), mean=True).losses()[0].item()
    own = own_loss(model, example, numbers=likelihood.labels_are_numbers)
    if own is None or not math.isfinite(ours):
        return
    # where transformers leaves a loss in 16 bits it is rounded a few times; else it is float32, also in float64 models
    half = own.dtype in (torch.float16, torch.bfloat16)
    tolerance = 4 * torch.finfo(own.dtype).eps if half else 64 * torch.finfo(torch.float32).eps
    if abs(ours - own.item()) <= tolerance * max(1.0, abs(own.item())):
        return
    kind = type(likelihood).__name__
    numbers = f"the loss of the first example is {ours:.6g} by {kind} and {own.item():.6g} by the model itself"
    if not math.isfinite(own.item()):
        why = "the model's own is not finite, though its logits are"
    else:
        why = hosts.added_loss(model) or (
            "the model's holds more than that (an auxiliary loss, label smoothing, another shift)"
        )
    if named:
        warnings.warn(f"{numbers}: {why}. As {kind} was named, the statistics are of its loss alone.", stacklevel=4)
        return
    raise ValueError(
        f"{numbers}: they should agree, but {why}. For the loss of the labels alone name it, "
        f"likelihood=fishkern.{kind}(); for another, pass a function (model, batch) -> losses [N] that computes it."
    )
