"""From the model and a batch to its predictive distribution or its losses, with the loss checked once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from fishkern import hosts
from fishkern.statistics.batches import Batch, Examples
from fishkern.statistics.cutting import answering_parts
from fishkern.statistics.drawn import Drawn, LossFunction, losses_by_function
from fishkern.statistics.likelihood import Likelihood, recognise_likelihood
from fishkern.statistics.predictive import Predictive


class Answering:
    """Runs the model on a batch and gives its predictive distribution, or its losses.

    Args:
        model: In evaluation mode.
        likelihood: The loss of an example; ``None``: recognised from the model and its first batch.
    """

    def __init__(self, model: nn.Module, likelihood: Likelihood | LossFunction | Drawn | None) -> None:
        self._model = model
        self._likelihood = likelihood

    def prepare(self, batch: Examples) -> None:
        """Recognise the likelihood, and compare the loss of one example with the model's own.

        Args:
            batch: The first batch.

        Raises:
            ValueError: The model's loss is not known, or is another.
        """  # noqa: DOC502
        if self._likelihood is None:
            self._likelihood = recognise_likelihood(self._model, batch.content)
        if isinstance(self._likelihood, Likelihood):
            answering_parts(self._compare_with_own_loss, self)(batch.take(0, 1))

    def _compare_with_own_loss(self, example: Examples) -> None:
        _compare_with_own_loss(self._model, self._likelihood, example.content)

    @property
    def description(self) -> str:
        """The likelihood, for the provenance."""
        if isinstance(self._likelihood, Likelihood):
            return f"{type(self._likelihood).__name__}(reduction={self._likelihood.reduction!r})"
        drawn = isinstance(self._likelihood, Drawn)
        function = self._likelihood.function if drawn else self._likelihood
        name = getattr(function, "__qualname__", type(function).__name__)
        return f"function {name}{', drawn for each example' if drawn else ''}"

    def __call__(self, batch: Examples) -> Predictive | Tensor:
        if isinstance(self._likelihood, Likelihood):
            return self._likelihood.predictive(self._model, batch.content)
        losses = losses_by_function(self._likelihood, self._model, batch)
        N = batch.num_examples
        if not isinstance(losses, Tensor) or losses.shape != (N,):
            got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(
                f"the likelihood function must return one loss for each example, a tensor of shape ({N},), got {got}: "
                "do not average over the batch."
            )
        return losses


def _compare_with_own_loss(model: nn.Module, likelihood: Likelihood, example: Batch) -> None:
    """Demand that a recognised loss is what the model returns for the example, to the rounding of its dtype."""
    labels = [key for key in ("labels", "start_positions") if isinstance(example, Mapping) and key in example]
    if not labels or not all(hosts.accepts(model, key) for key in labels):
        return
    outputs = model(**{**hosts.call_options(model), **example})
    own = getattr(outputs, "loss", None)
    if own is None:
        return
    ours = replace(likelihood.predictive(model, example), mean=True).losses()[0].item()
    # where transformers leaves a loss in 16 bits it is rounded a few times; else it is float32, also in float64 models
    half = own.dtype in (torch.float16, torch.bfloat16)
    tolerance = 4 * torch.finfo(own.dtype).eps if half else 64 * torch.finfo(torch.float32).eps
    if math.isfinite(ours) and not abs(ours - own.item()) <= tolerance * max(1.0, abs(own.item())):
        raise ValueError(
            f"the loss of the first example is {ours:.6g} by {type(likelihood).__name__} and {own.item():.6g} by the "
            f"model itself: they should agree. The model's loss holds more than that (an auxiliary loss, label "
            "smoothing, another shift). Pass likelihood= as a function (model, batch) -> losses [N] that computes it."
        )
