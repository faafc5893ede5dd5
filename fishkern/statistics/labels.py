"""Convert the labels of a batch to what a likelihood needs, or refuse them with a message that names the row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class UnknownLabelError(ValueError):
    """A label that the model does not know.

    Args:
        where: The row of the batch that the model was run on, in words.
        problem: What is wrong with the label, in words.
    """

    def __init__(self, where: str, problem: str) -> None:
        super().__init__(f"{where} {problem}")
        self._problem = problem

    def at(self, where: str) -> UnknownLabelError:
        """Change the name of the row, after it was run alone.

        Args:
            where: The row, in words.

        Returns:
            The same error with that row.
        """
        return UnknownLabelError(where, self._problem)


def unknown_class(label: object, size: int) -> str:
    """Describe a label that is not a class of the model.

    Args:
        label: The label.
        size: Number of classes.

    Returns:
        The rest of a sentence about its row.
    """
    return f"has the label {label!r}; the model knows 0 to {size - 1}"


def class_labels(labels: Any, expected: tuple[int, ...], size: int, ignore_index: int) -> Tensor:
    """Convert labels to class numbers, and check that the model has these classes.

    On a GPU a label out of range would end the whole process with a device assert.

    Args:
        labels: Integers of any width, or bool.
        expected: ``(N, ...)``, the logits' shape without classes.
        size: ``C``, the number of classes.
        ignore_index: Label of a position that does not count.

    Returns:
        int64, of the expected shape.

    Raises:
        ValueError: They have another shape, or are not integers.
        UnknownLabelError: One is not a class of the model.
    """
    labels = shaped(labels, expected, size)
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(
            f"the labels are {_dtype(labels)}, and class numbers are integers: pass labels.long(). Numbers to be met "
            "are labels of fishkern.Regression(), shares of yes and no of fishkern.MultiLabel()."
        )
    labels = labels.long()
    known = (labels >= 0) & (labels < size) | (labels == ignore_index)
    if not known.all():
        where, label = _first(labels, ~known)
        ignored = f", and {ignore_index} where a position carries none" if labels[0].numel() > 1 else ""
        raise UnknownLabelError(where, f"{unknown_class(label, size)}{ignored}.")
    return labels


def shaped(labels: Any, expected: tuple[int, ...], size: int) -> Tensor:
    """Check that there is one class number for each example or position.

    Args:
        labels: Of any kind.
        expected: ``(N, ...)``.
        size: ``C``, the number of classes.

    Returns:
        A tensor of the expected shape.

    Raises:
        ValueError: They have another shape.
    """
    labels = as_tensor(labels)
    if labels.shape == (*expected, 1):
        labels = labels[..., 0]
    if labels.shape != expected:
        each = "example" if len(expected) == 1 else "position"
        raise ValueError(
            f"labels of shape {in_words(labels.shape, expected[0])} do not fit logits of {size} classes: one class "
            f"number for each {each} was expected, a tensor of shape {in_words(expected, expected[0])}."
            f"{_way_out(labels, expected, size)}"
        )
    return labels


def values_like(labels: Any, values: Tensor) -> Tensor:
    """Match labels that are numbers with the model's outputs, entry by entry.

    Axes of length 1 are ignored: ``[N]`` and ``[N, 1]`` mean the same. Nothing else is reshaped or broadcast.

    Args:
        labels: Numbers of any dtype.
        values: The outputs ``[N, ...]`` that they belong to.

    Returns:
        Labels of the outputs' shape, dtype and device.

    Raises:
        ValueError: They have another shape.
    """
    labels = as_tensor(labels)
    if _essential(labels) != _essential(values):
        raise ValueError(
            f"labels of shape {in_words(labels.shape, len(values))} do not fit outputs of shape "
            f"{in_words(values.shape, len(values))}: one label for each entry of the output was expected."
        )
    return labels.reshape(values.shape).to(values)


def yes_or_no_like(labels: Any, logits: Tensor) -> Tensor:
    """Match yes-or-no labels with the model's logits, as :func:`values_like`.

    Args:
        labels: Numbers in [0, 1], or bool.
        logits: ``[N, ...]``.

    Returns:
        Labels of the logits' shape, dtype and device.

    Raises:
        ValueError: They have another shape.
        UnknownLabelError: One is outside [0, 1].
    """
    labels = values_like(labels, logits)
    inside = (labels >= 0) & (labels <= 1)
    if not inside.all():
        where, label = _first(labels, ~inside)
        raise UnknownLabelError(where, f"has the label {label!r}; yes-or-no labels are between 0 and 1.")
    return labels


def in_words(shape: Sequence[int], N: int) -> str:
    """Write a shape with ``N`` for the examples: how many of them were tried first does not concern the caller.

    Args:
        shape: Of a tensor of examples.
        N: Number of examples.

    Returns:
        The shape, with ``N`` for the first axis if it has that length.
    """
    first = ["N"] if shape and shape[0] == N else []
    return f"[{', '.join([*first, *map(str, shape[len(first) :])])}]"


def as_tensor(labels: Any) -> Tensor:
    """Convert numbers in any container to a tensor.

    Args:
        labels: A tensor, an array, or a list of numbers.

    Returns:
        A tensor of their dtype.

    Raises:
        TypeError: They are not numbers.
    """
    if isinstance(labels, Tensor):
        return labels
    try:
        return torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"labels must be a tensor of numbers, got {type(labels).__name__}: {labels!r:.80}.") from None


def _way_out(labels: Tensor, expected: tuple[int, ...], size: int) -> str:
    """Say how to convert such labels, if their shape shows what they are."""
    if labels.shape == (*expected, size):
        return (
            " They hold one value for each class (one-hot or soft labels): labels.argmax(-1) takes the class; for soft "
            "labels pass likelihood= as a function (model, batch) -> losses [N]; for several classes at once take "
            "fishkern.MultiLabel()."
        )
    return ""


def _first(labels: Tensor, wrong: Tensor) -> tuple[str, float]:
    """Find the first wrong label and its row; the index of an example that runs alone is not known here."""
    place = wrong.nonzero()[0].tolist()
    where = f"row {place[0]} of a batch of {len(labels)}" if len(labels) > 1 else "an example, run alone,"
    return where, labels[tuple(place)].item()


def _essential(values: Tensor) -> list[int]:
    """Remove axes of length 1 from a shape, except the first."""
    return [*values.shape[:1], *(size for size in values.shape[1:] if size != 1)]


def _dtype(labels: Tensor) -> str:
    return str(labels.dtype).removeprefix("torch.")
