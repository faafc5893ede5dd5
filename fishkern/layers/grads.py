"""Per-example gradients of one parameter, in forms that need not store them.

The gradient of example ``n`` is a tensor of the parameter's shape. Stored for all examples, ``[N, *shape]`` is larger
than the model; so each form keeps the factors that it comes from, example axis first, and knows how to square:

    OuterProductGrads   linear, convolution    sum_t output_grads[n, t, :] (x) activations[n, t, :]
    EmbeddingGrads      embedding              sum_t output_grads[n, t, :] added to row indices[n, t]
    PositionGrads       bias, norm, scale      sum_t terms[n, t], or output_grads[n, t] * factors[n, t]
    DenseGrads          anything               values[n], stored
    SummedGrads         reused parameters      sum of other forms
    TiedRows            tied embedding         what the embedding's rows add to the squares of the head
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor

from fishkern.backend import Backend
from fishkern.layers.groups import Groups, group_squares, group_sums
from fishkern.ops import (
    embedding_rows,
    embedding_sum_grad_squared,
    group_sum_grad_squared,
    scale_sum_grad_squared,
    sum_grad_squared,
    sum_position_grad_squared,
)
from fishkern.ops.dtypes import accumulates_in
from fishkern.ops.scale_sum_grad_squared import Norm, scale_factors


class PerExampleGrads(ABC):
    """Gradients of one parameter by the losses of ``N`` examples, in one of several forms (see the module)."""

    @property
    @abstractmethod
    def num_examples(self) -> int:
        """The number of examples, ``N``."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The device of the factors."""

    @abstractmethod
    def example(self, n: int) -> Tensor:
        """Compute the gradient of example ``n``.

        Args:
            n: Number of the example.

        Returns:
            A tensor of the parameter's shape, float32 (float64 for float64 factors).
        """

    def unflattened(self, num_examples: int) -> Self:
        """Join rows that were treated as examples into the examples that they belong to, equally many for each.

        Args:
            num_examples: ``N``.

        Returns:
            The same gradients of ``N`` examples.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot join its rows")

    @abstractmethod
    def add_squares_(self, total: Tensor, backend: Backend | None = None) -> None:
        """Add ``sum_n grad_n^2``.

        Args:
            total: Accumulator of the parameter's shape, contiguous, float32 or float64; changed in place.
            backend: Passed on to the operation.
        """

    def add_group_squares_(self, total: Tensor, by: Groups, backend: Backend | None = None) -> None:
        """Add ``sum_n sum_{p in group} grad_n[p]^2`` for each group of the parameter's entries.

        Args:
            total: Accumulator of :func:`group_shape`, float32 or float64; changed in place.
            by: Which entries make up a group.
            backend: Passed on to the operation.
        """
        for n in range(self.num_examples):
            total += group_squares(self.example(n), by)

    @abstractmethod
    def add_position_squares_(self, total: Tensor) -> None:
        """Add ``sum_{n,t} grad_{n,t}^2``, the squares of the single positions' terms, over the positions that count.

        Args:
            total: As in :meth:`add_squares_`.
        """

    @abstractmethod
    def num_terms(self) -> int | Tensor:
        """Count the terms whose squares :meth:`add_position_squares_` adds.

        Returns:
            Number of positions that count, over all examples and all uses; a tensor ``[]`` where a mask says which.
        """


@dataclass(frozen=True)
class OuterProductGrads(PerExampleGrads):
    """``grad_n = sum_t output_grads[n, t, :] (x) activations[n, t, :]``, the weight gradient of a linear map.

    Args:
        activations: ``[N, T, I]``.
        output_grads: ``[N, T, O]``, same dtype.
        shape: Shape of the parameter; its entries in order are those of ``[O, I]``.
        counted: Which positions are text and not padding, ``[N, T]``, bool; ``None`` if all are. At padding, output
            gradients are zero, activations are not.
    """

    activations: Tensor
    output_grads: Tensor
    shape: torch.Size
    counted: Tensor | None = None

    @property
    def num_examples(self) -> int:
        return self.activations.shape[0]

    @property
    def device(self) -> torch.device:
        return self.output_grads.device

    def example(self, n: int) -> Tensor:
        dtype = accumulates_in(self.activations.dtype)
        return (self.output_grads[n].to(dtype).mT @ self.activations[n].to(dtype)).view(self.shape)

    def add_squares_(self, total: Tensor, backend: Backend | None = None) -> None:
        operation = partial(sum_grad_squared, self.activations, self.output_grads, backend=backend)
        add_result_(self._as_matrix(total), operation, self.output_grads)

    def add_group_squares_(self, total: Tensor, by: Groups, backend: Backend | None = None) -> None:
        if len(self.shape) < 2:  # each entry is a group
            self.add_squares_(total.view(self.shape), backend)
            return
        operation = partial(group_sum_grad_squared, self.activations, self.output_grads, by=by, backend=backend)
        add_result_(total.view(-1) if total.ndim else total, operation, self.output_grads)

    def add_position_squares_(self, total: Tensor) -> None:
        g = where_counted(self.output_grads, self.counted)
        add_result_(self._as_matrix(total), partial(sum_position_grad_squared, self.activations, g), g)

    def num_terms(self) -> int | Tensor:
        return _num_counted(self.output_grads, self.counted)

    def unflattened(self, num_examples: int) -> Self:
        x, g = (_unflattened(factor, num_examples) for factor in (self.activations, self.output_grads))
        return type(self)(x, g, self.shape)  # which positions count is attached to the joined examples later

    def rows(self, example: Tensor, row: Tensor) -> Tensor:
        """Compute single rows of single examples' gradients.

        Args:
            example: Example of each requested row, ``[U]``, ascending.
            row: Number of the row, an output feature, ``[U]``.

        Returns:
            ``[U, I]``, float32 (float64 for float64 factors).
        """
        dtype = accumulates_in(self.activations.dtype)
        counts = torch.bincount(example, minlength=self.num_examples).tolist()
        parts = [
            self.output_grads[n][:, rows].to(dtype).mT @ self.activations[n].to(dtype)
            for n, rows in enumerate(row.split(counts))
        ]
        return torch.cat(parts)

    def _as_matrix(self, total: Tensor) -> Tensor:
        return total.view(self.output_grads.shape[-1], self.activations.shape[-1])

    @classmethod
    def joined(cls, uses: Sequence[Self]) -> Self:
        """Concatenate the positions of several uses of one parameter."""
        activations, grads = _cat(use.activations for use in uses), _cat(use.output_grads for use in uses)
        return cls(activations, grads, uses[0].shape, _all_counted([(use.output_grads, use.counted) for use in uses]))


@dataclass(frozen=True)
class EmbeddingGrads(PerExampleGrads):
    """``grad_n[v] = sum_{t: indices[n, t] = v} output_grads[n, t]``, the gradient of an embedding table.

    Args:
        indices: ``[N, T]``, integers.
        output_grads: ``[N, T, D]``.
        num_rows: ``V``.
        padding_idx: Row that never gets a gradient.
        counted: As for :class:`OuterProductGrads`.
    """

    indices: Tensor
    output_grads: Tensor
    num_rows: int
    padding_idx: int | None = None
    counted: Tensor | None = None

    @property
    def num_examples(self) -> int:
        return self.indices.shape[0]

    @property
    def device(self) -> torch.device:
        return self.output_grads.device

    def example(self, n: int) -> Tensor:
        _, row, grads = embedding_rows(
            self.indices[n : n + 1], self.output_grads[n : n + 1], padding_idx=self.padding_idx
        )
        return grads.new_zeros(self.num_rows, grads.shape[-1]).index_copy_(0, row, grads)

    def add_squares_(self, total: Tensor, backend: Backend | None = None) -> None:
        self._add_squares(self.indices, self.output_grads, total)

    def add_group_squares_(self, total: Tensor, by: Groups, backend: Backend | None = None) -> None:
        example, row, grads = self.pairs()
        add_rows_of_examples_(total, example, row, grads.square_(), by=by, num_examples=self.num_examples)

    def pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Form the rows of each example's gradient that can be other than zero, see :func:`embedding_rows`."""
        return embedding_rows(self.indices, self.output_grads, padding_idx=self.padding_idx)

    def add_position_squares_(self, total: Tensor) -> None:
        positions = self.indices.reshape(-1, 1)  # every position an example of its own
        self._add_squares(positions, where_counted(self.output_grads, self.counted).flatten(0, 1)[:, None], total)

    def num_terms(self) -> int | Tensor:
        return _num_counted(self.output_grads, self.counted)

    def unflattened(self, num_examples: int) -> Self:
        indices, g = (_unflattened(factor, num_examples) for factor in (self.indices, self.output_grads))
        return type(self)(indices, g, self.num_rows, self.padding_idx)

    def _add_squares(self, indices: Tensor, output_grads: Tensor, total: Tensor) -> None:
        options = {"num_rows": self.num_rows, "padding_idx": self.padding_idx}
        add_result_(total, partial(embedding_sum_grad_squared, indices, output_grads, **options), output_grads)

    @classmethod
    def joined(cls, uses: Sequence[Self]) -> Self:
        """Concatenate the positions of several uses of one table."""
        first, counted = uses[0], _all_counted([(use.output_grads, use.counted) for use in uses])
        indices, grads = _cat(use.indices for use in uses), _cat(use.output_grads for use in uses)
        return cls(indices, grads, first.num_rows, first.padding_idx, counted)


@dataclass(frozen=True)
class Factors:
    """What output gradients are multiplied by, entry by entry, in the gradient of a scale.

    Args:
        inputs: ``[N, T, *shape]``.
        norm: What a norm makes of them at each position, see :func:`fishkern.ops.scale_sum_grad_squared`.
        eps: Of the norm.
        rounded_to: Dtype that the module rounds its normalised inputs to.
    """

    inputs: Tensor
    norm: Norm | None = None
    eps: float = 0.0
    rounded_to: torch.dtype | None = None


@dataclass(frozen=True)
class PositionGrads(PerExampleGrads):
    """``grad_n = sum_t terms[n, t]``, for parameters that act on every position entry by entry.

    Args:
        output_grads: The terms, ``[N, T, *shape]``, or what the factors make them of.
        counted: As for :class:`OuterProductGrads`.
        factors: What the output gradients are multiplied by; ``None`` for nothing.
    """

    output_grads: Tensor
    counted: Tensor | None = None
    factors: Factors | None = None

    @property
    def num_examples(self) -> int:
        return self.output_grads.shape[0]

    @property
    def device(self) -> torch.device:
        return self.output_grads.device

    @property
    def features(self) -> int:
        """How many axes the parameter has."""
        return self.output_grads.ndim - 2

    @property
    def terms(self) -> Tensor:
        """The terms, ``[N, T, *shape]``, float32 (float64 for float64 output gradients) where they are products."""
        if self.factors is None:
            return self.output_grads
        inputs, g = self._flat(self.factors.inputs), self._flat(self.output_grads)
        terms = scale_factors(inputs, accumulates_in(g.dtype), **self._options()) * g
        return terms.view(self.output_grads.shape)

    def example(self, n: int) -> Tensor:
        terms = self._of_rows(slice(n, n + 1)).terms
        return terms[0].sum(0, dtype=accumulates_in(terms.dtype))

    def add_squares_(self, total: Tensor, backend: Backend | None = None) -> None:
        inputs = None if self.factors is None else self._flat(self.factors.inputs)
        operation = partial(scale_sum_grad_squared, inputs, self._flat(self.output_grads), backend=backend)
        add_result_(total.view(-1), partial(operation, **self._options()), self.output_grads)

    def add_group_squares_(self, total: Tensor, by: Groups, backend: Backend | None = None) -> None:
        shape = self.output_grads.shape[2:]  # small, as the parameter is
        squares = torch.zeros(shape, dtype=accumulates_in(self.output_grads.dtype), device=self.device)
        self.add_squares_(squares, backend)
        total += group_sums(squares, by)

    def add_position_squares_(self, total: Tensor) -> None:
        terms = where_counted(self.terms, self.counted)
        total += terms.to(accumulates_in(terms.dtype)).square().sum((0, 1))

    def num_terms(self) -> int | Tensor:
        return _num_counted(self.output_grads, self.counted)

    def unflattened(self, num_examples: int) -> Self:
        factors = self.factors
        if factors is not None:
            factors = replace(factors, inputs=_unflattened(factors.inputs, num_examples))
        return type(self)(_unflattened(self.output_grads, num_examples), factors=factors)

    def _of_rows(self, rows: slice) -> Self:
        factors = self.factors
        if factors is not None:
            factors = replace(factors, inputs=factors.inputs[rows])
        return type(self)(self.output_grads[rows], factors=factors)

    def _options(self) -> dict[str, Any]:
        factors = self.factors
        return {} if factors is None else {name: getattr(factors, name) for name in ("norm", "eps", "rounded_to")}

    @staticmethod
    def _flat(tensor: Tensor) -> Tensor:
        """``[N, T, *shape]`` as ``[N, T, D]``."""
        return tensor.reshape(*tensor.shape[:2], tensor.shape[2:].numel())

    @classmethod
    def joined(cls, uses: Sequence[Self]) -> Self:
        """Concatenate the positions of several uses of one parameter."""
        counted = _all_counted([(use.output_grads, use.counted) for use in uses])
        return cls(_cat(use.terms for use in uses), counted)


@dataclass(frozen=True)
class DenseGrads(PerExampleGrads):
    """``grad_n = values[n]``, stored.

    Args:
        values: ``[N, *shape]``.
    """

    values: Tensor

    @property
    def num_examples(self) -> int:
        return self.values.shape[0]

    @property
    def device(self) -> torch.device:
        return self.values.device

    def example(self, n: int) -> Tensor:
        return self.values[n].to(accumulates_in(self.values.dtype))

    def add_squares_(self, total: Tensor, backend: Backend | None = None) -> None:
        for value in self.values:
            grad = value.to(total.dtype)
            total.addcmul_(grad, grad)

    def add_position_squares_(self, total: Tensor) -> None:
        raise NotImplementedError("stored per-example gradients are sums over positions, which cannot be separated")

    def num_terms(self) -> int | Tensor:
        raise NotImplementedError("stored per-example gradients are sums over positions, whose number is not known")


@dataclass(frozen=True)
class SummedGrads(PerExampleGrads):
    """``grad_n = sum over uses``, computed one example at a time.

    Args:
        uses: Gradients of the same parameter and examples through its several uses.
    """

    uses: tuple[PerExampleGrads, ...]

    @property
    def num_examples(self) -> int:
        return self.uses[0].num_examples

    @property
    def device(self) -> torch.device:
        return self.uses[0].device

    def example(self, n: int) -> Tensor:
        first, *others = (use.example(n) for use in self.uses)
        for other in others:
            first = first + other
        return first

    def add_squares_(self, total: Tensor, backend: Backend | None = None) -> None:
        for n in range(self.num_examples):
            grad = self.example(n).to(total.dtype)
            total.addcmul_(grad, grad)

    def add_position_squares_(self, total: Tensor) -> None:
        for use in self.uses:
            use.add_position_squares_(total)

    def num_terms(self) -> int | Tensor:
        return sum(use.num_terms() for use in self.uses)


@dataclass(frozen=True)
class TiedRows(PerExampleGrads):
    """The addition of an embedding to the squares of the head that shares its weight.

    With ``A`` from the head and ``E`` from the embedding, ``(A + E)^2 = A^2 + (2 A + E) E``, and ``E`` is zero
    except on the rows of the example's tokens. ``A^2`` is added when the head's backward runs; this is the rest.

    Args:
        embedding: ``E``.
        head_pairs: Where ``A`` is known: ``example * V + row``, ascending, ``[U]``; includes all pairs of
            ``embedding``.
        head_rows: ``A`` at these pairs, ``[U, D]``.
    """

    embedding: EmbeddingGrads
    head_pairs: Tensor
    head_rows: Tensor

    @property
    def num_examples(self) -> int:
        return self.embedding.num_examples

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    def example(self, n: int) -> Tensor:
        raise NotImplementedError(
            "an estimator asked for single gradients of a weight that an embedding and a head share, after the head's "
            "were squared: an estimator that reads single gradients must say reads = 'examples'."
        )

    def add_squares_(self, total: Tensor, backend: Backend | None = None) -> None:
        example, row, added = self._added()
        counts = torch.bincount(example, minlength=self.num_examples).tolist()
        for rows, values in zip(row.split(counts), added.to(total.dtype).split(counts), strict=True):
            total[rows] += values  # rows of one example are distinct, so the order of adding is fixed

    def add_group_squares_(self, total: Tensor, by: Groups, backend: Backend | None = None) -> None:
        add_rows_of_examples_(total, *self._added(), by=by, num_examples=self.num_examples)

    def add_position_squares_(self, total: Tensor) -> None:
        self.embedding.add_position_squares_(total)

    def num_terms(self) -> int | Tensor:
        return self.embedding.num_terms()

    def _added(self) -> tuple[Tensor, Tensor, Tensor]:
        """Compute ``(2 A + E) E`` on the rows of each example: example ``[U]``, row ``[U]``, values ``[U, D]``."""
        example, row, grads = self.embedding.pairs()
        places = torch.searchsorted(self.head_pairs, example * self.embedding.num_rows + row)
        return example, row, (2 * self.head_rows[places] + grads) * grads


def join(uses: Sequence[PerExampleGrads]) -> PerExampleGrads:
    """Add up the uses of one parameter: the sum over uses comes before the square.

    Args:
        uses: At least one; the same parameter and the same examples.

    Returns:
        One form; positions are concatenated if all uses have the same form.
    """
    if len(uses) == 1:
        return uses[0]
    # two embeddings with different padding_idx drop different tokens, so their positions cannot be concatenated
    kinds = {(type(use), getattr(use, "padding_idx", None)) for use in uses}
    if len(kinds) == 1 and hasattr(uses[0], "joined"):
        return type(uses[0]).joined(uses)
    return SummedGrads(tuple(uses))


def add_rows_of_examples_(
    total: Tensor, example: Tensor, row: Tensor, values: Tensor, *, by: Groups, num_examples: int
) -> None:
    """Add values of some rows of examples' gradients of a table, by groups of the table's entries.

    Args:
        total: Accumulator of :func:`group_shape`; changed in place.
        example: The example of each value, ``[U]``, ascending.
        row: Its row in the table, ``[U]``; those of one example are distinct.
        values: ``[U, D]``.
        by: Which entries make up a group.
        num_examples: ``N``.
    """
    if by == "row":
        counts = torch.bincount(example, minlength=num_examples).tolist()
        for rows, sums in zip(row.split(counts), values.sum(1).to(total.dtype).split(counts), strict=True):
            total[rows] += sums  # rows of one example are distinct, so the order of adding is fixed
    else:
        total += values.sum(0) if by == "column" else values.sum()


def add_result_(total: Tensor, operation: Callable[..., Tensor], factor: Tensor) -> None:
    """Add the result of an operation, in place if it works in the accumulator's dtype.

    Args:
        total: The accumulator; changed in place.
        operation: Takes it as ``out=``, or gives a result to add.
        factor: What the operation works on.
    """
    if total.dtype == accumulates_in(factor.dtype):
        operation(out=total)
    else:
        total += operation()


def _unflattened(factor: Tensor, num_examples: int) -> Tensor:
    """``[N * M, T, ...]`` as ``[N, M * T, ...]``."""
    return factor.reshape(num_examples, factor.shape[0] // num_examples * factor.shape[1], *factor.shape[2:])


def where_counted(terms: Tensor, counted: Tensor | None) -> Tensor:
    """Set to zero what does not count.

    Args:
        terms: ``[N, T, ...]``.
        counted: ``[N, T]``, bool; ``None`` for all.

    Returns:
        Of the same shape.
    """
    return terms if counted is None else terms * counted.view(*counted.shape, *[1] * (terms.ndim - 2))


def _num_counted(terms: Tensor, counted: Tensor | None) -> int | Tensor:
    """Count the positions of ``[N, T, ...]`` that count."""
    return terms.shape[0] * terms.shape[1] if counted is None else counted.sum()


def _all_counted(uses: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor | None:
    """Concatenate which positions count, of terms ``[N, T, ...]``; ``None`` if all do."""
    if all(counted is None for _, counted in uses):
        return None
    ones = (terms.new_ones(terms.shape[:2], dtype=torch.bool) for terms, _ in uses)
    return _cat(one if counted is None else counted for one, (_, counted) in zip(ones, uses, strict=True))


def _cat(tensors: Iterable[Tensor]) -> Tensor:
    tensors = list(tensors)
    dtype = tensors[0].dtype
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return torch.cat([tensor.to(dtype) for tensor in tensors], dim=1)
