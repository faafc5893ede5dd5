"""Per-example gradients of packed rows: the forms of :mod:`fishkern.layers.grads`, of examples of different lengths.

The terms of all documents follow one another, ``[S, ...]``, and ``offsets [N + 1]`` say where each begins, as for the
operations. There is no padding, and nothing of the size of documents times weights.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from fishkern.backend import Backend
from fishkern.layers.documents import Documents
from fishkern.layers.grads import (
    DenseGrads,
    EmbeddingGrads,
    OuterProductGrads,
    PerExampleGrads,
    PositionGrads,
    SummedGrads,
    add_result_,
    add_rows_of_examples_,
)
from fishkern.layers.groups import Groups, group_sums
from fishkern.ops import embedding_rows, embedding_sum_grad_squared, group_sum_grad_squared, sum_grad_squared
from fishkern.ops.dtypes import accumulates_in


class PackedGrads(PerExampleGrads):
    """Gradients by the losses of packed documents.

    Attributes:
        offsets: ``[N + 1]``, int64, on the CPU.
        counted: Which terms are of positions that count, ``[S]``, bool; ``None`` if all are.
    """

    offsets: Tensor
    counted: Tensor | None

    @property
    def num_examples(self) -> int:
        return len(self.offsets) - 1

    @abstractmethod
    def document(self, n: int) -> PerExampleGrads:
        """Give the gradients of one document, in the form for unpacked examples.

        Args:
            n: Number of the document.

        Returns:
            Of one example.
        """

    def example(self, n: int) -> Tensor:
        return self.document(n).example(0)

    def _terms(self, tensor: Tensor, n: int) -> Tensor:
        """Take the terms of one document, ``[1, t, ...]``."""
        first, end = self.offsets[n : n + 2].tolist()
        return tensor[None, first:end]

    def _counted(self, n: int) -> Tensor | None:
        return None if self.counted is None else self._terms(self.counted, n)

    def _as_one(self, tensor: Tensor) -> tuple[Tensor, Tensor | None]:
        """Take all documents for one example, where each position is alone anyway."""
        return tensor[None], None if self.counted is None else self.counted[None]

    @classmethod
    def joined(cls, uses: Sequence[Self]) -> Self:
        """Put the terms of several uses of one parameter together, document after document."""
        lengths = [use.offsets.diff() for use in uses]
        owners = torch.cat([torch.arange(len(each)).repeat_interleave(each) for each in lengths])
        order = owners.sort(stable=True).indices
        changes: dict[str, Tensor | None] = {"offsets": F.pad(torch.stack(lengths).sum(0).cumsum(0), (1, 0))}
        for name in (one.name for one in fields(cls) if one.name not in ("offsets", "counted")):
            values = [getattr(use, name) for use in uses]
            if isinstance(values[0], Tensor):
                changes[name] = _in_order(values, order)
        if any(use.counted is not None for use in uses):
            ones = [
                torch.ones(int(use.offsets[-1]), dtype=torch.bool) if use.counted is None else use.counted
                for use in uses
            ]
            changes["counted"] = _in_order([one.to(uses[0].device) for one in ones], order)
        return replace(uses[0], **changes)


@dataclass(frozen=True)
class PackedOuterProductGrads(PackedGrads):
    """``grad_n = sum_{s of n} output_grads[s, :] (x) activations[s, :]``, see :class:`OuterProductGrads`.

    Args:
        activations: ``[S, I]``.
        output_grads: ``[S, O]``, same dtype.
        shape: Shape of the parameter.
        offsets: See :class:`PackedGrads`.
        counted: Likewise.
    """

    activations: Tensor
    output_grads: Tensor
    shape: torch.Size
    offsets: Tensor
    counted: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.output_grads.device

    def document(self, n: int) -> OuterProductGrads:
        x, g = self._terms(self.activations, n), self._terms(self.output_grads, n)
        return OuterProductGrads(x, g, self.shape, self._counted(n))

    def add_squares_(self, total: Tensor, backend: Backend | None = None) -> None:
        factors = (self.activations, self.output_grads)
        operation = partial(sum_grad_squared, *factors, offsets=self.offsets, backend=backend)
        matrix = total.view(self.output_grads.shape[-1], self.activations.shape[-1])
        add_result_(matrix, operation, self.output_grads)

    def add_group_squares_(self, total: Tensor, by: Groups, backend: Backend | None = None) -> None:
        if len(self.shape) < 2:  # each entry is a group
            self.add_squares_(total.view(self.shape), backend)
            return
        factors = (self.activations, self.output_grads)
        operation = partial(group_sum_grad_squared, *factors, by=by, offsets=self.offsets, backend=backend)
        add_result_(total.view(-1) if total.ndim else total, operation, self.output_grads)

    def add_position_squares_(self, total: Tensor) -> None:
        (x, _), (g, counted) = self._as_one(self.activations), self._as_one(self.output_grads)
        OuterProductGrads(x, g, self.shape, counted).add_position_squares_(total)

    def num_terms(self) -> int | Tensor:
        return len(self.output_grads) if self.counted is None else self.counted.sum()

    def rows(self, example: Tensor, row: Tensor) -> Tensor:
        """Compute single rows of single documents' gradients, see :meth:`OuterProductGrads.rows`."""
        counts = torch.bincount(example, minlength=self.num_examples).tolist()
        parts = [
            self.document(n).rows(torch.zeros_like(rows), rows) for n, rows in enumerate(row.split(counts)) if len(rows)
        ]
        return torch.cat(parts)


@dataclass(frozen=True)
class PackedEmbeddingGrads(PackedGrads):
    """``grad_n[v] = sum_{s of n: indices[s] = v} output_grads[s]``, see :class:`EmbeddingGrads`.

    Args:
        indices: ``[S]``, integers.
        output_grads: ``[S, D]``.
        num_rows: ``V``.
        offsets: See :class:`PackedGrads`.
        padding_idx: Row that never gets a gradient.
        counted: See :class:`PackedGrads`.
    """

    indices: Tensor
    output_grads: Tensor
    num_rows: int
    offsets: Tensor
    padding_idx: int | None = None
    counted: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.output_grads.device

    def document(self, n: int) -> EmbeddingGrads:
        indices, g = self._terms(self.indices, n), self._terms(self.output_grads, n)
        return EmbeddingGrads(indices, g, self.num_rows, self.padding_idx, self._counted(n))

    def pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Form the rows of each document's gradient that can be other than zero, see :func:`embedding_rows`."""
        return embedding_rows(self.indices, self.output_grads, padding_idx=self.padding_idx, offsets=self.offsets)

    def add_squares_(self, total: Tensor, backend: Backend | None = None) -> None:
        options = {"num_rows": self.num_rows, "padding_idx": self.padding_idx, "offsets": self.offsets}
        operation = partial(embedding_sum_grad_squared, self.indices, self.output_grads, **options)
        add_result_(total, operation, self.output_grads)

    def add_group_squares_(self, total: Tensor, by: Groups, backend: Backend | None = None) -> None:
        example, row, grads = self.pairs()
        add_rows_of_examples_(total, example, row, grads.square_(), by=by, num_examples=self.num_examples)

    def add_position_squares_(self, total: Tensor) -> None:
        (indices, _), (g, counted) = self._as_one(self.indices), self._as_one(self.output_grads)
        EmbeddingGrads(indices, g, self.num_rows, self.padding_idx, counted).add_position_squares_(total)

    def num_terms(self) -> int | Tensor:
        return len(self.output_grads) if self.counted is None else self.counted.sum()


@dataclass(frozen=True)
class PackedPositionGrads(PackedGrads):
    """``grad_n = sum_{s of n} terms[s]``, see :class:`PositionGrads`.

    Args:
        terms: ``[S, *shape]``.
        offsets: See :class:`PackedGrads`.
        counted: Likewise.
    """

    terms: Tensor
    offsets: Tensor
    counted: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.terms.device

    def document(self, n: int) -> PositionGrads:
        return PositionGrads(self._terms(self.terms, n), self._counted(n))

    def add_squares_(self, total: Tensor, backend: Backend | None = None) -> None:
        total += self._squares()

    def add_group_squares_(self, total: Tensor, by: Groups, backend: Backend | None = None) -> None:
        total += group_sums(self._squares(), by)  # of the parameter's size, which is small

    def add_position_squares_(self, total: Tensor) -> None:
        PositionGrads(*self._as_one(self.terms)).add_position_squares_(total)

    def num_terms(self) -> int | Tensor:
        return len(self.terms) if self.counted is None else self.counted.sum()

    def _squares(self) -> Tensor:
        """Sum the squares over documents, ``[*shape]``."""
        terms = self.terms.reshape(len(self.terms), -1).to(accumulates_in(self.terms.dtype))
        places = torch.arange(len(terms), device=terms.device)
        # a bag is summed by one thread, first term to last, so that equal calls give equal bits on a GPU too
        sums = F.embedding_bag(places, terms, self.offsets[:-1].to(terms.device), mode="sum")
        return sums.square_().sum(0).view(self.terms.shape[1:])


def packed(grads: PerExampleGrads, documents: Documents, axes: Sequence[int], axis: int) -> PerExampleGrads:
    """Put the terms of a call on packed rows into the order of their documents.

    Args:
        grads: With each row of the call as an example; terms ``[R, prod(axes), ...]``.
        documents: The documents of the rows.
        axes: Sizes of the axes of the output between the rows and the features.
        axis: Which axis of the output is that of the positions, from 1.

    Returns:
        The gradients of the documents.

    Raises:
        TypeError: The gradients are stored, and not terms of positions.
    """
    others = torch.Size(axes).numel() // axes[axis - 1]

    def ordered(terms: Tensor) -> Tensor:
        apart = terms.reshape(terms.shape[0], *axes, *terms.shape[2:]).movedim(axis, 1)
        # the terms of one position stay together
        return documents.packed(apart).reshape(-1, *terms.shape[2:])

    counted = None if grads.counted is None else ordered(grads.counted)
    offsets = documents.offsets(others)
    if isinstance(grads, OuterProductGrads):
        x, g = ordered(grads.activations), ordered(grads.output_grads)
        return PackedOuterProductGrads(x, g, grads.shape, offsets, counted)
    if isinstance(grads, EmbeddingGrads):
        indices, g = ordered(grads.indices), ordered(grads.output_grads)
        return PackedEmbeddingGrads(indices, g, grads.num_rows, offsets, grads.padding_idx, counted)
    if isinstance(grads, PositionGrads):
        return PackedPositionGrads(ordered(grads.terms), offsets, counted)
    raise TypeError(f"{type(grads).__name__} has no terms of positions.")


def one_by_one(sink: Callable[[str, PerExampleGrads], None]) -> Callable[[str, PerExampleGrads], None]:
    """Hand the gradients of packed documents on one document at a time, in the forms for unpacked examples.

    Args:
        sink: Called with a parameter's name and gradients of one example.

    Returns:
        A sink for gradients of all documents.
    """

    def split(key: str, grads: PerExampleGrads) -> None:
        for n in range(grads.num_examples):
            sink(key, _one(grads, n))

    return split


def _one(grads: PerExampleGrads, n: int) -> PerExampleGrads:
    if isinstance(grads, PackedGrads):
        return grads.document(n)
    if isinstance(grads, SummedGrads):
        return SummedGrads(tuple(_one(use, n) for use in grads.uses))
    return grads if grads.num_examples == 1 else DenseGrads(grads.example(n)[None])


def _in_order(parts: Sequence[Tensor], order: Tensor) -> Tensor:
    dtype = parts[0].dtype
    for part in parts:
        dtype = torch.promote_types(dtype, part.dtype)
    return torch.cat([part.to(dtype) for part in parts])[order.to(parts[0].device)]
