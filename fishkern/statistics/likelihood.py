"""Likelihoods: from a model's outputs and a batch to the predictive distribution of its labels.

The loss of an example is what the model returns for its row **alone**, at ``N = 1``. With ``reduction="mean"``, as in
transformers, it is the mean over the example's own label positions; with ``"sum"`` it is ``-log p`` of the whole
answer. A mean over the tokens of the *batch* would weigh each example by the others' lengths, and has no place here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fishkern import hosts
from fishkern.statistics.batches import Batch
from fishkern.statistics.predictive import Bernoulli, Categorical, Gaussian, Predictive


@dataclass(frozen=True)
class Likelihood(ABC):
    """How a model's outputs become a distribution over labels.

    Args:
        reduction: ``"mean"`` over an example's label positions, or ``"sum"``.
    """

    reduction: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        if self.reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum', got {self.reduction!r}.")

    @abstractmethod
    def predictive(self, model: nn.Module, batch: Batch) -> Predictive:
        """Run the model and read off the distribution.

        Args:
            model: The model.
            batch: A mapping of keyword arguments, or ``(inputs, labels)``.

        Returns:
            The distribution for the batch's examples.
        """


class CausalLM(Likelihood):
    """Next-token prediction: the logits at ``t`` speak of the label at ``t + 1``."""

    def predictive(self, model: nn.Module, batch: Batch) -> Predictive:
        logits = wide(_logits(model, batch))
        if isinstance(batch, Mapping) and "shift_labels" in batch:
            return Categorical(logits, batch["shift_labels"], self.reduction == "mean")
        labels = _labels(batch, "causal language modelling")
        virtual = logits.shape[1] - labels.shape[1]  # prompt tuning puts virtual tokens in front
        # the last position has no next token; cutting its logits off would copy all others
        labels = nn.functional.pad(labels, (virtual, 1), value=-100)[:, 1:]
        return Categorical(logits, labels, self.reduction == "mean")


class TokenClassification(Likelihood):
    """One label for each position, ``-100`` where there is none."""

    def predictive(self, model: nn.Module, batch: Batch) -> Predictive:
        logits = wide(_logits(model, batch))
        labels = _labels(batch, "token classification")
        return Categorical(logits, labels, self.reduction == "mean")


class MaskedLM(TokenClassification):
    """The tokens behind the masks; every other position carries the label ``-100``."""


class Seq2SeqLM(Likelihood):
    """The decoder's tokens; the model shifts them itself."""

    def predictive(self, model: nn.Module, batch: Batch) -> Predictive:
        labels = _labels(batch, "sequence-to-sequence modelling")
        logits = wide(_logits(model, batch, with_labels=True))  # the decoder's inputs are made from the labels
        return Categorical(logits, labels, self.reduction == "mean")


class Classification(Likelihood):
    """One class for each example: logits ``[N, C]``, labels ``[N]``."""

    def predictive(self, model: nn.Module, batch: Batch) -> Predictive:
        logits = wide(_logits(model, batch))
        if logits.ndim != 2:
            raise ValueError(f"classification needs logits [N, C], got {tuple(logits.shape)}.")
        labels = _optional_labels(batch)
        return Categorical(logits[:, None], None if labels is None else labels.view(-1, 1), self.reduction == "mean")


class QuestionAnswering(Likelihood):
    """Start and end of the answer, each a class over the positions of the text."""

    def predictive(self, model: nn.Module, batch: Batch) -> Predictive:
        outputs = call(model, batch, without=("start_positions", "end_positions"))
        logits = wide(torch.stack([outputs.start_logits, outputs.end_logits], dim=1))  # [N, 2, T]
        if "start_positions" not in batch or "end_positions" not in batch:
            raise ValueError("question answering needs 'start_positions' and 'end_positions' in every batch.")
        labels = torch.stack([batch["start_positions"].flatten(), batch["end_positions"].flatten()], dim=1)
        outside = (labels < 0) | (labels >= logits.shape[-1])
        if outside.any():
            raise ValueError(
                f"the answer of example {int(outside.any(1).nonzero()[0])} of the batch lies outside its text of "
                f"{logits.shape[-1]} positions: {labels[outside.any(1)][0].tolist()}. Drop such examples."
            )
        return Categorical(logits, labels, self.reduction == "mean")


class Regression(Likelihood):
    """Squared error, as the likelihood ``N(f, 1/2)``."""

    def predictive(self, model: nn.Module, batch: Batch) -> Predictive:
        means = _at_least_two_axes(wide(_logits(model, batch)))
        labels = _optional_labels(batch)
        return Gaussian(means, None if labels is None else labels.reshape(means.shape), self.reduction == "mean")


class MultiLabel(Likelihood):
    """Independent yes-no labels ``[N, D]``."""

    def predictive(self, model: nn.Module, batch: Batch) -> Predictive:
        return Bernoulli(wide(_logits(model, batch)), _optional_labels(batch), self.reduction == "mean")


_BY_TASK: dict[hosts.Task, type[Likelihood]] = {
    "causal-lm": CausalLM,
    "masked-lm": MaskedLM,
    "seq2seq-lm": Seq2SeqLM,
    "classification": Classification,
    "regression": Regression,
    "multi-label": MultiLabel,
    "token-classification": TokenClassification,
    "question-answering": QuestionAnswering,
}


def recognise_likelihood(model: nn.Module, batch: Batch) -> Likelihood:
    """Choose the likelihood of a transformers model by its class name and config.

    Args:
        model: The model.
        batch: Its first batch; the dtype of the labels tells one label from several.

    Returns:
        The likelihood with the model's own reduction.

    Raises:
        ValueError: The model says nothing that is known.
    """
    task = hosts.task(model, _optional_labels(batch))
    if task is None:
        known = ", ".join(f"fishkern.{kind.__name__}()" for kind in _BY_TASK.values())
        raise ValueError(
            f"cannot tell which loss belongs to a {type(model).__name__}: it is no transformers model with a known "
            f"head. Pass likelihood=, one of {known}, or a function (model, batch) -> losses [N]."
        )
    return _BY_TASK[task]()


def call(model: nn.Module, batch: Batch, *, without: tuple[str, ...] = ()) -> Any:
    """Run the model on a batch.

    Args:
        model: The model.
        batch: A mapping of keyword arguments, or ``(inputs, labels)``, of which the model gets the inputs.
        without: Keys that the model does not get.

    Returns:
        What the model returns.

    Raises:
        ValueError: Rows of the batch hold several examples each.
    """
    if not isinstance(batch, Mapping):
        return model(batch[0])
    if reason := hosts.packed_batch(batch):
        raise ValueError(
            f"this batch is packed ({reason}): its rows hold several examples, which would be taken for one. "
            "Use a collator that keeps one example in each row."
        )
    arguments = {key: value for key, value in batch.items() if key not in without}
    return model(**{**hosts.call_options(model), **arguments})


def wide(logits: Tensor) -> Tensor:
    """Take logits to float32 at least, as transformers does before its losses.

    Args:
        logits: Any floating tensor.

    Returns:
        The same values, float32 or float64.
    """
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _logits(model: nn.Module, batch: Batch, with_labels: bool = False) -> Tensor:
    outputs = call(model, batch, without=() if with_labels else ("labels", "shift_labels"))
    logits = outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", None)
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"{type(model).__name__} returned no logits ({type(outputs).__name__}): a fused loss (Liger) keeps them "
            "back. Switch the fused loss off for this pass, or pass likelihood= as a function (model, batch) -> "
            "losses [N]."
        )
    return logits


def _optional_labels(batch: Batch) -> Tensor | None:
    return batch.get("labels") if isinstance(batch, Mapping) else batch[1]


def _labels(batch: Batch, task: str) -> Tensor:
    labels = _optional_labels(batch)
    if labels is None:
        raise ValueError(
            f"{task} needs 'labels' in every batch: they say which positions count. Let the collator make them "
            "(for a language model: the input_ids, with -100 at padding)."
        )
    return labels


def _at_least_two_axes(values: Tensor) -> Tensor:
    return values if values.ndim > 1 else values[:, None]
