"""Per-example gradients of parameters that are stacked by expert: a position's rows go to the experts that it chose.

The gradient of example ``n`` in expert ``e`` is a sum over the rows that its positions sent there. Rows are sorted by
expert, and by position within each, so those of one expert and one example lie next to each other.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from functools import partial
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from fishkern.backend import Backend
from fishkern.layers.grads import PerExampleGrads, add_result_
from fishkern.ops import expert_sum_grad_squared
from fishkern.ops.dtypes import accumulates_in


@dataclass(frozen=True)
class Routes:
    """Which rows went to which expert, and whose they are.

    Args:
        expert: Expert of each row, ``[S]``, int64, ascending.
        position: Position that sent the row, ``[S]``, int64, ascending within each expert.
        num_positions: How many positions there are in all, those of each example next to each other.
        num_examples: ``N``; divides ``num_positions``.
    """

    expert: Tensor
    position: Tensor
    num_positions: int
    num_examples: int

    def groups(self) -> tuple[Tensor, Tensor, Tensor]:
        """List the groups of rows of one expert and one example: expert, example and number of rows.

        Returns:
            Each ``[U]``, on the CPU.
        """
        example = self.position // (self.num_positions // self.num_examples)
        group, counts = (self.expert * self.num_examples + example).unique_consecutive(return_counts=True)
        group, counts = torch.stack([group, counts]).cpu()
        return group // self.num_examples, group % self.num_examples, counts


@dataclass(frozen=True, kw_only=True)
class Routed(PerExampleGrads):
    """What the gradients of weights and biases have in common.

    Args:
        output_grads: ``[S, O]``.
        routes: Whose rows they are.
        shape: Shape of the parameter.
        sizes: Its axes, apart.
        axes: Their order that has ``E`` first, and then those of an expert's gradient.
        counted: Which positions are text and not padding, ``[N, T]``, bool; ``None`` if all are.
    """

    output_grads: Tensor
    routes: Routes
    shape: torch.Size
    sizes: tuple[int, ...]
    axes: tuple[int, ...]
    counted: Tensor | None = None

    @property
    def num_examples(self) -> int:
        return self.routes.num_examples

    @property
    def device(self) -> torch.device:
        return self.output_grads.device

    def example(self, n: int) -> Tensor:
        grad = torch.zeros(self.shape, dtype=accumulates_in(self.output_grads.dtype), device=self.device)
        by_expert, start = self._by_expert(grad), 0
        for expert, example, count in zip(*(one.tolist() for one in self.routes.groups()), strict=True):
            if example == n:
                by_expert[expert] = self._of_rows(slice(start, start + count))
            start += count
        return grad

    @abstractmethod
    def _of_rows(self, rows: slice) -> Tensor:
        """Compute the gradient in one expert, of one example, from its rows there."""

    def add_position_squares_(self, total: Tensor) -> None:
        g = self.output_grads
        if self.counted is not None:
            g = g * self.counted.flatten()[self.routes.position, None]
        # a router may send a position to one expert twice, so that two rows make one term
        routes = replace(self.routes, num_examples=self.routes.num_positions)
        replace(self, output_grads=g, routes=routes).add_squares_(total)

    def num_terms(self) -> int | Tensor:
        return self.routes.num_positions if self.counted is None else self.counted.sum()

    def unflattened(self, num_examples: int) -> Self:
        return replace(self, routes=replace(self.routes, num_examples=num_examples))

    def _by_expert(self, total: Tensor) -> Tensor:
        """View a tensor of the parameter's shape as one matrix, or one vector, for each expert."""
        return total.view(self.sizes).permute(self.axes)


@dataclass(frozen=True, kw_only=True)
class RoutedGrads(Routed):
    """``grad_n[e] = sum_s output_grads[s, :] (x) activations[s, :]``, over the rows of example ``n`` in expert ``e``.

    Args:
        activations: ``[S, I]``, same dtype as ``output_grads``.
    """

    activations: Tensor

    def add_squares_(self, total: Tensor, backend: Backend | None = None) -> None:
        if not len(self.output_grads):
            return
        expert, _, counts = self.routes.groups()
        total, options = self._by_expert(total), {"expert": expert, "offsets": F.pad(counts.cumsum(0), (1, 0))}
        run = partial(expert_sum_grad_squared, self.activations, self.output_grads, len(total), **options)
        add_result_(total, partial(run, backend=backend), self.output_grads)

    def _of_rows(self, rows: slice) -> Tensor:
        dtype = accumulates_in(self.output_grads.dtype)
        return self.output_grads[rows].to(dtype).mT @ self.activations[rows].to(dtype)


@dataclass(frozen=True, kw_only=True)
class RoutedBiasGrads(Routed):
    """``grad_n[e] = sum_s output_grads[s, :]``, over the rows of example ``n`` in expert ``e``."""

    def add_squares_(self, total: Tensor, backend: Backend | None = None) -> None:
        if not len(self.output_grads):
            return
        expert, _, counts = self.routes.groups()
        squares = _sums(self.output_grads.to(total.dtype), counts).square_()
        expert, counts = expert.unique_consecutive(return_counts=True)
        self._by_expert(total)[expert.to(total.device)] += _sums(squares, counts)

    def _of_rows(self, rows: slice) -> Tensor:
        return self.output_grads[rows].sum(0, dtype=accumulates_in(self.output_grads.dtype))


def _sums(rows: Tensor, counts: Tensor) -> Tensor:
    """Sum rows that follow each other, so many at a time, each sum from its first row to its last."""
    # not index_add_, whose atomic additions race on a GPU; a bag is summed by one thread
    firsts = (counts.cumsum(0) - counts).to(rows.device)
    return F.embedding_bag(torch.arange(len(rows), device=rows.device), rows, firsts, mode="sum")
