"""Likelihoods: from a model's outputs and a batch to the predictive distribution of its labels.

The loss of an example is what the model returns for its row **alone**, at ``N = 1``. With ``reduction="mean"``, as in
transformers, it is the mean over the example's own label positions; with ``"sum"`` it is ``-log p`` of the whole
answer. A mean over the tokens of the *batch* would weigh each example by the others' lengths, and has no place here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fishkern import hosts
from fishkern.arguments import at_least
from fishkern.statistics.batches import Batch
from fishkern.statistics.borders import document_numbers
from fishkern.statistics.head_logits import HeadLogits
from fishkern.statistics.labels import as_tensor, in_words, shaped
from fishkern.statistics.outputs import call, logits_of
from fishkern.statistics.packing import documents_of, inside_documents
from fishkern.statistics.predictive import Bernoulli, Categorical, Gaussian, PackedCategorical, Predictive

LOGITS_BYTES = 2**28
"""The most bytes of logits in memory at a time, by default."""

# What a model is not given with a batch: it would compute a loss of the batch, and with a fused loss (Liger) no logits.
_WITHHELD = ("labels", "shift_labels", "skip_logits")


@dataclass(frozen=True)
class Likelihood(ABC):
    """How a model's outputs become a distribution over labels.

    Args:
        reduction: ``"mean"`` over an example's label positions, or ``"sum"``.
    """

    reduction: Literal["mean", "sum"] = "mean"

    labels_are_numbers: ClassVar[bool] = False
    """Whether the labels are target values instead of class numbers."""

    has_own_loss: ClassVar[bool] = True
    """Whether a model that knows the task returns this loss itself, with which it is then compared."""

    def __post_init__(self) -> None:
        if self.reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum', got {self.reduction!r}.")

    @property
    def description(self) -> str:
        """What it is the likelihood of, for the provenance: only statistics of one description merge."""
        return f"{type(self).__name__}(reduction={self.reduction!r})"

    @abstractmethod
    def predictive(self, model: nn.Module, batch: Batch) -> Predictive:
        """Run the model, and make the distribution from its outputs.

        Args:
            model: The model.
            batch: A mapping of keyword arguments, or ``(inputs, labels)``.

        Returns:
            The distribution for the batch's examples.
        """

    def settled(self, model: nn.Module, batch: Batch) -> Likelihood:
        """Determine, once for all batches, what the data must decide.

        Args:
            model: The model.
            batch: An example of the first batch.

        Returns:
            The likelihood with all its options set.
        """
        return self

    def labelled(self, batch: Batch) -> Tensor | None:
        """Say at which positions the output of the model has a label.

        Args:
            batch: As for :meth:`predictive`.

        Returns:
            ``[N, T]``, bool, of all rows where examples have several; ``None`` if labels do not belong to positions of
            the input.
        """
        return None


@dataclass(frozen=True)
class CausalLM(Likelihood):
    """Next-token prediction: the logits at ``t`` predict the label at ``t + 1``.

    Args:
        reduction: ``"mean"`` over an example's label positions, or ``"sum"``.
        logits_bytes: The most bytes that the logits of a batch take, in the dtype of the losses. Larger ones are
            computed in chunks of this size where the model's head is recognised, and give the same statistics. ``None``
            forms them whole in any case.

    Raises:
        ValueError: ``reduction`` has another value, or ``logits_bytes`` is below 1.
    """

    logits_bytes: int | None = LOGITS_BYTES

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_bytes(self.logits_bytes)

    def predictive(self, model: nn.Module, batch: Batch) -> Predictive:
        return self.of_logits(read_logits(model, batch), model, batch)

    def of_logits(self, logits: Tensor | HeadLogits, model: nn.Module, batch: Batch) -> Predictive:
        """Make the distribution from logits.

        Args:
            logits: ``[N, T, V]``.
            model: As for :meth:`predictive`.
            batch: As for :meth:`predictive`.

        Returns:
            The distribution for the batch's examples.

        Raises:
            ValueError: There are no labels, or not one for each position.
        """
        if isinstance(batch, Mapping) and "shift_labels" in batch:
            return _by_position(
                logits, inside_documents(as_tensor(batch["shift_labels"]), batch), self.reduction, batch
            )
        labels = _labels(batch, "causal language modelling")
        virtual = logits.shape[1] - labels.shape[1] if logits.ndim == 3 and labels.ndim == 2 else 0
        if virtual and not (virtual > 0 and hosts.base_model(model) is not model):
            raise ValueError(
                f"causal language modelling needs a logit vector for each token, and the model gives "
                f"{logits.shape[1]} positions for {labels.shape[1]} labels. Pass labels (or shift_labels) of the "
                "logits' length, -100 where a position carries none."
            )
        # Prompt tuning puts virtual tokens first. The last position has no next token: it gets the label -100, because
        # cutting its logits off would copy all others.
        labels = nn.functional.pad(labels, (virtual, 1), value=-100)[:, 1:] if labels.ndim == 2 else labels
        labels = labels if virtual else inside_documents(labels, batch)
        return _by_position(logits, labels, self.reduction, batch)

    def labelled(self, batch: Batch) -> Tensor:
        if isinstance(batch, Mapping) and "shift_labels" in batch:
            return inside_documents(as_tensor(batch["shift_labels"]), batch) != -100
        labels = _labels(batch, "causal language modelling")
        return inside_documents(nn.functional.pad(labels, (0, 1), value=-100)[:, 1:], batch) != -100


@dataclass(frozen=True)
class TokenClassification(Likelihood):
    """One label for each position, ``-100`` if it has none.

    Args:
        reduction: ``"mean"`` over an example's label positions, or ``"sum"``.
        class_axis: The logits' axis of classes: ``-1``, logits ``[N, ..., C]``, as in transformers; ``1``, logits
            ``[N, C, ...]``, as in torch's convolutions and losses. ``None``: ``-1`` for a model of transformers,
            otherwise the one that fits the labels' shape ``[N, ...]``; refused if both fit.

    Raises:
        ValueError: ``reduction`` or ``class_axis`` has another value.
    """

    class_axis: Literal[-1, 1] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.class_axis not in (None, -1, 1):
            raise ValueError(f"class_axis must be None, -1 or 1, got {self.class_axis!r}.")

    def settled(self, model: nn.Module, batch: Batch) -> Likelihood:
        if self.class_axis is not None:
            return self
        if hosts.task(model) is not None:
            return replace(self, class_axis=-1)
        logits = read_logits(model, batch)
        return replace(self, class_axis=_class_axis(logits, _labels(batch, "token classification")))

    def predictive(self, model: nn.Module, batch: Batch) -> Predictive:
        return self.of_logits(read_logits(model, batch), model, batch)

    def of_logits(self, logits: Tensor | HeadLogits, model: nn.Module, batch: Batch) -> Predictive:
        """Make the distribution from logits.

        Args:
            logits: ``[N, ..., C]``, or as :attr:`class_axis` says.
            model: As for :meth:`predictive`.
            batch: As for :meth:`predictive`.

        Returns:
            The distribution for the batch's examples.
        """
        labels = _labels(batch, "token classification")
        axis = self.class_axis
        if axis is None:
            axis = -1 if hosts.task(model) is not None else _class_axis(logits, labels)
        return _by_position(logits if axis == -1 else logits.movedim(axis, -1), labels, self.reduction, batch)

    def labelled(self, batch: Batch) -> Tensor:
        return _labels(batch, "token classification").flatten(1) != -100


@dataclass(frozen=True)
class MaskedLM(TokenClassification):
    """The masked tokens; every other position has the label ``-100``.

    Args:
        reduction: ``"mean"`` over an example's label positions, or ``"sum"``.
        class_axis: As in :class:`TokenClassification`, but by default for logits ``[N, T, V]``.
        logits_bytes: As in :class:`CausalLM`.

    Raises:
        ValueError: An argument has another value.
    """

    class_axis: Literal[-1, 1] | None = -1
    logits_bytes: int | None = LOGITS_BYTES

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_bytes(self.logits_bytes)


class Seq2SeqLM(Likelihood):
    """The decoder's tokens; the model shifts them itself."""

    def predictive(self, model: nn.Module, batch: Batch) -> Predictive:
        labels = _labels(batch, "sequence-to-sequence modelling")
        # the model makes the decoder's inputs from the labels
        more = {"labels": labels if labels.is_floating_point() else labels.long()}
        logits = read_logits(model, batch, **(more if hosts.accepts(model, "labels") else {}))
        return _by_position(logits, labels, self.reduction)


class Classification(Likelihood):
    """One class for each example: logits ``[N, C]``, labels ``[N]``."""

    def predictive(self, model: nn.Module, batch: Batch) -> Predictive:
        logits = read_logits(model, batch)
        if logits.ndim != 2 or logits.shape[1] == 1:
            one_each = " One logit for each example is a yes or no, fishkern.MultiLabel(), or a number to be met, "
            way_out = f"{one_each}fishkern.Regression()." if logits.ndim in (1, 2) else ""
            got = in_words(logits.shape, len(logits))
            raise ValueError(f"classification needs logits [N, C] of at least two classes, got {got}.{way_out}")
        labels = _optional_labels(batch)
        if labels is not None:
            labels = shaped(labels, tuple(logits.shape[:1]), logits.shape[1])[:, None]
        return Categorical(logits[:, None], labels, self.reduction == "mean")


class QuestionAnswering(Likelihood):
    """Start and end of the answer, each a class over the positions of the text."""

    def predictive(self, model: nn.Module, batch: Batch) -> Predictive:
        outputs = call(model, batch, without=("start_positions", "end_positions"))
        logits = torch.stack(logits_of(outputs, model, ("start_logits", "end_logits")), dim=1)  # [N, 2, T]
        if "start_positions" not in batch or "end_positions" not in batch:
            raise ValueError("question answering needs 'start_positions' and 'end_positions' in every batch.")
        ends = [as_tensor(batch[key]).flatten().to(logits.device) for key in ("start_positions", "end_positions")]
        labels = torch.stack(ends, dim=1)
        outside = (labels < 0) | (labels >= logits.shape[-1])
        if outside.any():
            raise ValueError(
                f"the answer of example {int(outside.any(1).nonzero()[0])} of the batch lies outside its text of "
                f"{logits.shape[-1]} positions: {labels[outside.any(1)][0].tolist()}. Drop such examples."
            )
        return Categorical(logits, labels, self.reduction == "mean")


class Regression(Likelihood):
    """Squared error, as the likelihood ``N(f, 1/2)`` of every entry of the output."""

    labels_are_numbers = True

    def predictive(self, model: nn.Module, batch: Batch) -> Predictive:
        return Gaussian(read_logits(model, batch), _optional_labels(batch), self.reduction == "mean")


class MultiLabel(Likelihood):
    """Independent yes-no labels, one for every entry of the output, ``[N, D]`` or of more axes."""

    labels_are_numbers = True

    def predictive(self, model: nn.Module, batch: Batch) -> Predictive:
        return Bernoulli(read_logits(model, batch), _optional_labels(batch), self.reduction == "mean")


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
        batch: Its first batch; the dtype of the labels distinguishes one label from several.

    Returns:
        The likelihood with the model's own reduction.

    Raises:
        ValueError: The class name and config are not known.
    """
    task = task_of(model, batch)
    if task is None:
        known = ", ".join(f"fishkern.{kind.__name__}()" for kind in _BY_TASK.values())
        raise ValueError(
            f"cannot tell which loss belongs to a {type(hosts.base_model(model)).__name__}: it is not a "
            f"transformers model with a known head. Pass likelihood=, one of {known}, or a function (model, batch) -> "
            "losses [N]."
        )
    return _BY_TASK[task]()


def task_of(model: nn.Module, batch: Batch) -> hosts.Task | None:
    """Recognise the task of a transformers model, by a batch's labels where its config leaves it open.

    Args:
        model: The model.
        batch: A batch. Its labels are read only if the class of the model is known: those of a detector are mappings.

    Returns:
        The task, or ``None``.
    """
    return None if hosts.task(model) is None else hosts.task(model, _optional_labels(batch))


def read_logits(model: nn.Module, batch: Batch, **more: Tensor) -> Tensor:
    """Run a model without its labels, and read its logits.

    Args:
        model: The model.
        batch: As for :meth:`Likelihood.predictive`.
        more: Further arguments of the model.

    Returns:
        Its logits, in float32 at least, with the examples first.

    Raises:
        ValueError: It returns none, or of another number of examples.
    """
    (logits,) = logits_of(call(model, batch, without=_WITHHELD, **more), model)
    labels = _optional_labels(batch)
    N = len(labels) if labels is not None and labels.ndim else len(logits)  # without labels nothing to compare with
    if len(logits) != N:
        raise ValueError(
            f"{type(model).__name__} returned logits of shape {tuple(logits.shape)} for {N} examples: the first axis "
            "must be that of the examples. Let it return them so, or pass likelihood= as a function (model, batch) -> "
            "losses [N]."
        )
    return logits


def _by_position(logits: Tensor | HeadLogits, labels: Any, reduction: str, batch: Batch = ()) -> Categorical:
    """Make the distribution of one label for each position, of any number of axes; packed rows, of each document."""
    if logits.ndim < 3:
        raise ValueError(
            f"labels of positions need logits [N, T, C], got {in_words(logits.shape, len(logits))}: for one label of "
            "each example take fishkern.Classification()."
        )
    labels = shaped(labels, tuple(logits.shape[:-1]), logits.shape[-1])
    if (numbers := document_numbers(batch)) is not None:
        if numbers.shape != labels.shape:
            raise ValueError(
                f"packed rows {tuple(numbers.shape)} need logits of their positions, and the model gives "
                f"{tuple(labels.shape)}, as prompt tuning does, which puts its tokens before a row and not before each "
                "document. Use a collator that keeps one example in each row."
            )
        documents = documents_of(batch, labels != -100)
        return PackedCategorical(logits, labels, reduction == "mean", documents=documents)
    return Categorical(logits if logits.ndim == 3 else logits.flatten(1, -2), labels.flatten(1), reduction == "mean")


def _check_bytes(logits_bytes: int | None) -> None:
    if logits_bytes is not None:
        at_least(1, logits_bytes, "logits_bytes")


def _class_axis(logits: Tensor, labels: Tensor) -> Literal[-1, 1]:
    """Find the axis of classes by the shape of the labels ``[N, ...]``."""
    N = logits.shape[0] if logits.ndim else 0
    last = logits.shape[:-1] == labels.shape
    first = logits.ndim > 2 and (*logits.shape[:1], *logits.shape[2:]) == labels.shape
    if not last and not first and labels.ndim != logits.ndim:
        raise ValueError(
            f"logits {in_words(logits.shape, N)} do not fit labels {in_words(labels.shape, N)}: for labels [N, ...] of "
            "positions expected logits [N, ..., C] or [N, C, ...]."
        )
    if last and first:
        raise ValueError(
            f"logits {in_words(logits.shape, N)} with labels {in_words(labels.shape, N)} may have their classes last "
            "or on axis 1: say where, fishkern.TokenClassification(class_axis=-1) or class_axis=1."
        )
    return 1 if first else -1


def _optional_labels(batch: Batch) -> Tensor | None:
    labels = batch.get("labels") if isinstance(batch, Mapping) else batch[1]
    return None if labels is None else as_tensor(labels)


def _labels(batch: Batch, task: str) -> Tensor:
    labels = _optional_labels(batch)
    if labels is None:
        raise ValueError(
            f"{task} needs 'labels' in every batch: they say which positions count. Let the collator make them "
            "(for a language model: the input_ids, with -100 at padding)."
        )
    return labels
