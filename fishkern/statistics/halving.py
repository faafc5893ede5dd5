"""Sums of followed entries in parts of the data, and how noisy their tops are from halves that are put together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from fishkern.statistics.precision import noise_of_unit

PARTS = 8
"""Interleaved parts of the data."""

# Ways to put eight parts together to halves: the rows of the Hadamard matrix of order 8 but the first, so that two of
# them have no more in common than chance.
_WAYS = [[(way & part).bit_count() % 2 == 0 for part in range(PARTS)] for way in range(1, PARTS)]


@dataclass(frozen=True, eq=False)
class Halves:
    """What a pass has added to followed entries.

    Args:
        parts: ``[8, F]``, float32: sums in each part of the data.
        units: ``[8]``, int64: the number of units in each.
    """

    parts: Tensor
    units: Tensor

    @property
    def divided(self) -> bool:
        """Whether there are two parts of the data, which can be compared."""
        return int(self.units.count_nonzero()) > 1

    def noise(self, counts: Sequence[int]) -> list[float]:
        """Compute the noise of a unit for tops of several sizes, from halves, and from how it has grown to them.

        Args:
            counts: Sizes of the tops.

        Returns:
            The noise for each, see :class:`fishkern.statistics.Precision`.
        """
        halves = self._compared((first, [not one for one in first]) for first in _WAYS)
        noise = noise_of_unit(*halves, counts)
        if not all(self.units):
            return noise
        quarters = [[part % 4 == quarter for part in range(PARTS)] for quarter in range(4)]
        lesser = noise_of_unit(*self._compared(combinations(quarters, 2)), counts)
        return [
            one + max(0.0, one * (one / less - 1) / math.sqrt(2)) if less else one
            for one, less in zip(noise, lesser, strict=True)
        ]

    def _compared(
        self, pairs: Iterable[tuple[list[bool], list[bool]]]
    ) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[int, int]]]:
        """Sum parts of the data, for pairs of sets of them that both hold something."""
        sums, units = [], []
        for pair in pairs:
            chosen = [torch.tensor(parts) for parts in pair]
            sizes = tuple(int(self.units[parts].sum()) for parts in chosen)
            if all(sizes):
                sums.append(tuple(parts.to(self.parts) @ self.parts for parts in chosen))
                units.append(sizes)
        return sums, units
