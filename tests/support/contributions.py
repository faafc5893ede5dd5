"""What ContributionTopK selects, once more and independently: in numpy, from one sorted list of all scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import cached_property

import numpy as np
from torch import Tensor


class Oracle:
    """The rule on scores by name.

    Args:
        scores: Floating tensors with rows.
        layers: The names of each layer.
        share: As in the rule.
        least_per_row: As in the rule.
        most_per_row: As in the rule.
        order: As in the rule.
    """

    def __init__(
        self,
        scores: Mapping[str, Tensor],
        layers: Sequence[Sequence[str]],
        *,
        share: str = "count",
        least_per_row: int = 1,
        most_per_row: int | None = None,
        order: str = "largest",
    ) -> None:
        self.share, self.least_per_row, self.most_per_row = share, least_per_row, most_per_row
        self.rows = {name: value.double().numpy().reshape(len(value), -1) for name, value in scores.items()}
        self.sign = -1 if order == "largest" else 1
        self.layers = layers
        number = {name: i for i, names in enumerate(layers) for name in names}
        self.layer = np.concatenate([np.full(rows.size, number[name]) for name, rows in self.rows.items()])
        self.values = np.concatenate([rows.ravel() for rows in self.rows.values()])
        self.first = np.argsort(self.sign * self.values, kind="stable")
        self.numels = [sum(self.rows[name].size for name in names) for names in layers]

    def counts(self, size: int) -> list[int]:
        """How many of the first ``size`` scores are in each layer."""
        return np.bincount(self.layer[self.first[:size]], minlength=len(self.layers)).tolist()

    def connections(self, size: int) -> list[int]:
        weights: list[int | Fraction] = list(self.counts(size))
        if self.share == "count-per-entry":
            weights = [Fraction(count, numel) for count, numel in zip(weights, self.numels, strict=True)]
        if self.share == "sum":
            weights = [Fraction(0)] * len(self.layers)
            for place in self.first[:size]:
                weights[self.layer[place]] += Fraction(float(self.values[place]))
        smallest = min([weight for weight in weights if weight > 0] or [1])
        result = []
        for weight in weights:
            ratio = Fraction(weight if weight > 0 else smallest) / Fraction(smallest)
            connections = max(1, (self.least_per_row * ratio).__floor__())
            result.append(connections if self.most_per_row is None else min(self.most_per_row, connections))
        return result

    def selected(self, size: int) -> int:
        """How many entries are selected with a top set of this size."""
        return sum(
            len(self.rows[name]) * min(connections, self.rows[name].shape[1])
            for names, connections in zip(self.layers, self.connections(size), strict=True)
            for name in names
        )

    def masks(self, size: int) -> dict[str, np.ndarray]:
        """Which entries are selected, by name."""
        masks = {}
        for names, connections in zip(self.layers, self.connections(size), strict=True):
            for name in names:
                mask = np.zeros(self.rows[name].shape, dtype=bool)
                for row, own in zip(self.rows[name], mask, strict=True):
                    own[np.argsort(self.sign * row, kind="stable")[:connections]] = True
                masks[name] = mask
        return masks

    def nearest(self, target: int) -> int:
        """The size whose selection is nearest to the target, then that nearest to a fifth of all, by trying all."""
        usual = len(self.values) // 5
        sizes = self.selected_by_size
        return min(sizes, key=lambda size: (abs(sizes[size] - target), abs(size - usual), size))

    @cached_property
    def selected_by_size(self) -> dict[int, int]:
        """How many entries are selected, for a top set of each size."""
        return {size: self.selected(size) for size in range(1, len(self.values) + 1)}
