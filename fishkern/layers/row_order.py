"""Which rows of a call are those of an example that has several, as a pair has a chosen and a rejected answer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowOrder:
    """The rows of ``N`` examples that have ``G`` rows each.

    Args:
        per_example: ``G``.
        adjacent: Whether the rows of example ``n`` follow one another, ``G n`` to ``G n + G - 1``. Otherwise they are
            ``n``, ``N + n``, ..., ``(G - 1) N + n``: all first rows come before all second ones.
    """

    per_example: int = 1
    adjacent: bool = True

    def count(self, num_examples: int) -> int:
        """Count the rows of ``N`` examples."""
        return self.per_example * num_examples

    def rows(self, n: int, num_examples: int) -> slice:
        """Say which rows are those of example ``n`` of ``N``."""
        if self.adjacent:
            return slice(n * self.per_example, (n + 1) * self.per_example)
        return slice(n, None, num_examples)

    def owners(self, num_examples: int) -> Tensor:
        """Say of which example each row is.

        Args:
            num_examples: ``N``.

        Returns:
            ``[G N]``, int64, on the CPU.
        """
        numbers = torch.arange(num_examples)
        return numbers.repeat_interleave(self.per_example) if self.adjacent else numbers.repeat(self.per_example)

    def indices(self, start: int, stop: int, num_examples: int) -> list[int]:
        """List the rows of some examples, in the same order.

        Args:
            start: Number of the first example.
            stop: Number after the last one.
            num_examples: ``N``.

        Returns:
            Their numbers.
        """
        if self.adjacent:
            return list(range(start * self.per_example, stop * self.per_example))
        return [first + n for first in range(0, self.count(num_examples), num_examples) for n in range(start, stop)]

    def by_example(self, tensor: Tensor, num_examples: int) -> Tensor:
        """Put rows into the order of the examples.

        Args:
            tensor: ``[G N, ...]``, or ``[G N M, ...]`` of rows that are flattened with ``M`` positions each.
            num_examples: ``N``.

        Returns:
            The same rows, those of one example after the other; a copy unless they are so already.
        """
        if self.adjacent or not len(tensor):
            return tensor
        positions = len(tensor) // self.count(num_examples)
        return tensor.unflatten(0, (self.per_example, num_examples, positions)).transpose(0, 1).flatten(0, 2)

    def joined(self, tensor: Tensor, num_examples: int) -> Tensor:
        """Make one row of those of each example.

        Args:
            tensor: ``[G N, T, ...]``.
            num_examples: ``N``.

        Returns:
            ``[N, G T, ...]``.
        """
        if self.per_example == 1:
            return tensor
        return self.by_example(tensor, num_examples).unflatten(0, (num_examples, self.per_example)).flatten(1, 2)


ONE_EACH = RowOrder()
"""Each example has one row."""


def orders(rows: int, num_examples: int) -> Iterator[RowOrder]:
    """List the orders in which rows may be dealt to examples.

    Args:
        rows: The number of rows.
        num_examples: ``N``.

    Yields:
        Each possible order; none where the rows are no multiple of ``N``.
    """
    if rows == num_examples:
        yield ONE_EACH
    elif rows and rows % num_examples == 0:
        yield RowOrder(rows // num_examples, adjacent=True)
        if num_examples > 1:  # of one example, all rows are its own
            yield RowOrder(rows // num_examples, adjacent=False)
