"""Losses of tokens, such as weighted ones: an example's loss is their sum or weighted mean, also in packed rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fishkern.layers import Documents
from fishkern.ops.dtypes import accumulates_in
from fishkern.statistics.batches import Batch, Examples
from fishkern.statistics.borders import document_numbers
from fishkern.statistics.contents import rebuilt
from fishkern.statistics.labels import as_tensor
from fishkern.statistics.packing import inside_documents

TokenFunction = Callable[[nn.Module, Batch], Tensor | tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class TokenLosses:
    """A loss function that gives the loss of each token, so that the documents of packed rows can have losses.

    The loss of example ``n`` is ``sum_t losses[n, t]``, or ``sum_t weights[n, t] losses[n, t] / sum_t weights[n, t]``
    where the function gives weights as well. A loss may be at the position of its token or at the one that predicts it.
    In packed rows the examples are the documents with a label, and the first token of a document, which nothing
    predicts, has the label -100 in what the function gets.

    Sums are in float32 at least, whatever the dtype of what the function gives. A weight counts in the mean wherever it
    is not 0, so it must be 0 at the label -100 as well. In packed rows only documents with a label are examples, so a
    loss elsewhere would count nowhere, and is refused.

    Args:
        function: ``(model, batch) -> losses [N, T]``, 0 where a token does not count; or a pair ``(losses, weights)``,
            both of this shape. For packed rows ``[R, T]``, those of the batch.

    Raises:
        TypeError: ``function`` is not callable.
    """

    function: TokenFunction

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TypeError(
                f"function must be (model, batch) -> losses [N, T] or (losses, weights), got {self.function!r}."
            )

    def __call__(self, model: nn.Module, batch: Examples) -> Tensor:
        """Compute the losses of the examples of a batch.

        Args:
            model: The model.
            batch: The examples.

        Returns:
            ``[N]``.

        Raises:
            ValueError: The function gives something of another shape, or in packed rows a loss to a position that is of
                no document with a label.
        """
        documents, content = batch.documents, batch.copied()
        returned = self.function(model, content if documents is None else _without_first_labels(content))
        pair = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned,)
        shape = None if documents is None else documents.shape
        losses, *weights = (_checked(values, batch.num_examples, shape) for values in pair)
        if weights and weights[0].shape != losses.shape:
            raise ValueError(_other_shape(f"weights {tuple(weights[0].shape)}", f"{list(losses.shape)}"))
        terms = losses * weights[0] if weights else losses
        if documents is not None and batch.cut_from is None:  # in a part only the labels of the others are taken away
            _refuse_outside(terms, documents)
        total = _summed(terms, documents)
        return total / _summed(weights[0], documents) if weights else total


def _checked(values: Any, N: int, shape: tuple[int, int] | None) -> Tensor:
    expected = f"[{N}, T]" if shape is None else f"[{shape[0]}, {shape[1]}], those of the packed rows"
    if isinstance(values, Tensor) and values.ndim == 2:
        sizes = tuple(values.shape)
        if sizes == shape or (shape is None and sizes[0] == N):
            return values.to(accumulates_in(values.dtype))
    got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
    raise ValueError(_other_shape(got, expected))


def _other_shape(got: Any, expected: str) -> str:
    return (
        f"the function of fishkern.TokenLosses must give a loss for each token, {expected}, or a pair (losses, "
        f"weights) of this shape; got {got}. (Where the labels are shifted by one, pad: F.pad(losses, (0, 1)).)"
    )


def _refuse_outside(terms: Tensor, documents: Documents) -> None:
    """Refuse losses that would be added to no document."""
    outside = (documents.numbers < 0).to(terms.device)
    if bool((lost := (terms.detach() != 0) & outside).any()):
        row, place = lost.nonzero()[0].tolist()
        raise ValueError(
            f"the function of fishkern.TokenLosses gives a loss to position {place} of row {row} of packed rows, which "
            "is padding or of a document without a label, so it would count nowhere. Return 0 where the labels of the "
            "batch that the function gets are -100, or give labels to each document that counts."
        )


def _summed(values: Tensor, documents: Documents | None) -> Tensor:
    """Add up the values of each example, ``[N]``."""
    if documents is None:
        return values.sum(1)
    return torch.stack([documents.cut(values, n).sum() for n in range(documents.count)])


def _without_first_labels(content: Batch) -> Batch:
    numbers = document_numbers(content)
    if numbers is None or not isinstance(content, Mapping):
        return content
    first = torch.ones_like(numbers, dtype=torch.bool)
    first[:, 1:] = numbers.diff(dim=1) != 0
    entries = dict(content)
    if entries.get("labels") is not None:
        labels = as_tensor(entries["labels"])
        entries["labels"] = labels.masked_fill(first.to(labels.device), -100)
    if entries.get("shift_labels") is not None:
        entries["shift_labels"] = inside_documents(as_tensor(entries["shift_labels"]), content)
    return rebuilt(content, entries)
