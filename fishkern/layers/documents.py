"""Documents: the examples of packed rows, several of which follow one another in a row."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor


class Span(NamedTuple):
    """Where a document is: positions ``start`` to ``stop - 1`` of a row."""

    row: int
    start: int
    stop: int


@dataclass(frozen=True)
class Documents:
    """The documents of a batch ``[R, T]`` of packed rows that count as examples.

    Positions between them may belong to none: to padding, or to documents that do not count.

    Args:
        shape: ``(R, T)``.
        spans: Where each document is, row after row, in a row from left to right.
    """

    shape: tuple[int, int]
    spans: tuple[Span, ...]

    @property
    def count(self) -> int:
        """The number of documents, ``N``."""
        return len(self.spans)

    @property
    def longest(self) -> int:
        """Positions of the longest document."""
        return int(self.lengths.max())

    @cached_property
    def lengths(self) -> Tensor:
        """Positions of each document, ``[N]``, int64, on the CPU."""
        return torch.tensor([span.stop - span.start for span in self.spans])

    @cached_property
    def numbers(self) -> Tensor:
        """Number of the document of each position, ``[R, T]``, int64, on the CPU; -1 where it belongs to none."""
        numbers = torch.full(self.shape, -1)
        for n, span in enumerate(self.spans):
            numbers[span.row, span.start : span.stop] = n
        return numbers

    @cached_property
    def places(self) -> Tensor:
        """Index in the flattened rows of each document's positions, ``[S]``, int64, on the CPU."""
        return (self.numbers.flatten() >= 0).nonzero().flatten()

    @cached_property
    def _places_on(self) -> dict[torch.device, Tensor]:
        return {}

    def fit(self, tensor: Tensor, axis: int = 1) -> bool:
        """Tell by its sizes whether a tensor may have these rows and positions.

        Args:
            tensor: Any tensor.
            axis: The axis of its positions.

        Returns:
            Whether its first axis is ``R`` long and this one ``T``.
        """
        return tensor.ndim > axis and (tensor.shape[0], tensor.shape[axis]) == self.shape

    def cut(self, tensor: Tensor, n: int) -> Tensor:
        """Take the positions of one document.

        Args:
            tensor: ``[R, T, ...]``.
            n: Number of the document.

        Returns:
            ``[1, t, ...]``, a view.
        """
        span = self.spans[n]
        return tensor[span.row : span.row + 1, span.start : span.stop]

    def packed(self, tensor: Tensor) -> Tensor:
        """Put the positions of all documents one after the other, without those that belong to none.

        Args:
            tensor: ``[R, T, ...]``.

        Returns:
            ``[S, ...]``, a view where it can be one.
        """
        flat = tensor.flatten(0, 1)
        if len(self.places) == len(flat):
            return flat
        if flat.device not in self._places_on:  # once for a batch, since a copy to a GPU waits for it
            self._places_on[flat.device] = self.places.to(flat.device)
        return flat[self._places_on[flat.device]]

    def offsets(self, terms: int = 1) -> Tensor:
        """Say where each document begins among packed positions.

        Args:
            terms: How many terms each position has.

        Returns:
            ``[N + 1]``, int64, on the CPU, ascending from 0 to ``S`` times ``terms``.
        """
        return torch.cat([torch.zeros(1, dtype=torch.int64), self.lengths.cumsum(0)]) * terms

    def touched(self, grad: Tensor, axis: int) -> set[int]:
        """List the documents of the positions where a gradient is not zero.

        Args:
            grad: ``R`` along the first axis and ``T`` along ``axis``.
            axis: The axis of its positions.

        Returns:
            Their numbers; -1 among them where a position belongs to none.
        """
        nonzero = grad.ne(0).movedim(axis, 1).unsqueeze(-1).flatten(2).any(2)
        return set(self.numbers.to(grad.device)[nonzero].unique().tolist())
