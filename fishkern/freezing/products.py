"""Counts and percentiles of all products of two factors, which are never formed.

The products of one row rise with the magnitudes of the columns, so that in sorted columns a bisection finds how many of
them lie below a bound. It compares the products themselves, in float64, and so counts what a histogram of the formed
products would. Counting below ``E`` bounds costs E * m * log2(n) products instead of m * n.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fishkern.freezing.readings import Factors
from fishkern.ops.log_histogram import log_keys
from fishkern.ops.magnitudes import NOT_FINITE, keys_reaching, values_of

_AT_ONCE = 2**18  # bisections


def count_products(factors: Factors, edges: Tensor, scale: Literal["log", "raw"]) -> Tensor:
    """Count the products in each bin of a histogram.

    Args:
        factors: The factors.
        edges: ``[B + 1]``, float64, on the CPU.
        scale: Whether they are of log10(|x| + 1e-12) or of |x|.

    Returns:
        ``[B]``, int64, on the CPU.
    """
    integer = torch.int64
    keys = log_keys(edges, integer) if scale == "log" else keys_reaching(edges, Tensor.double, edges, integer)
    return _Products(factors).below(keys).diff()


def products_at(pool: Sequence[Factors], places: Sequence[int]) -> list[float]:
    """Find the magnitudes that stand at some places when those of all products are in ascending order.

    Args:
        pool: Factors, whose products count as one set.
        places: From 0, below the number of products.

    Returns:
        The magnitude at each place.

    Raises:
        ValueError: A factor is NaN or infinite, or a product overflows.
    """
    every = [_Products(factors) for factors in pool]
    largest = torch.stack([products.largest for products in every]).max()
    if not largest.isfinite():
        raise ValueError(NOT_FINITE)
    wanted = torch.tensor(places)
    # The value at a place is the largest magnitude that has no more than so many products below it.
    low, high = torch.zeros_like(wanted), largest.view(torch.int64).expand_as(wanted)
    while bool((low < high).any()):
        middle = high - (high - low) // 2
        fits = sum(products.below(middle) for products in every) <= wanted
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle - 1)
    return values_of(low).tolist()


class _Products:
    """Magnitudes of factors, float64 on the CPU; the longer ones are the columns, ascending."""

    def __init__(self, factors: Factors) -> None:
        self.rows, columns = (part.detach().cpu().double().abs() for part in sorted(factors, key=len))
        self.columns = columns.sort().values

    @property
    def largest(self) -> Tensor:
        """The largest product; NaN where a factor is NaN."""
        return self.rows.max() * self.columns.max()

    def below(self, keys: Tensor) -> Tensor:
        """Count the products whose keys lie below some keys, ``[E]``."""
        counts = torch.zeros(len(keys), dtype=torch.int64)
        for rows in self.rows.split(max(_AT_ONCE // len(keys), 1)):
            counts += self._places(rows, keys).sum(1)
        return counts

    def _places(self, rows: Tensor, keys: Tensor) -> Tensor:
        """Find for each key and row how many products of the row lie below it, ``[E, rows]``."""
        low = torch.zeros(len(keys), len(rows), dtype=torch.int64)
        high = torch.full_like(low, len(self.columns))
        for _ in range(len(self.columns).bit_length()):
            middle = (low + high) // 2
            products = rows * self.columns[middle.clamp(max=len(self.columns) - 1)]
            below = (products.view(torch.int64) < keys[:, None]) & (middle < high)
            low, high = torch.where(below, middle + 1, low), torch.where(below, high, middle)
        return low
