"""The ``k`` best coordinates of each parameter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fishkern.backend import Backend
from fishkern.files import AnyTensor
from fishkern.selection.ranking import TopK, num_non_zero, of_one, position_decides, topk, warn_of_zeros


@dataclass(frozen=True)
class PerTensorTopK(TopK):
    """Select the ``k`` first scores of each parameter, so every one of them gets its share.

    Args:
        k: How many of each parameter; or
        density: floor(density * size) of each parameter.
        order: ``"largest"`` scores first, or ``"smallest"``.
        always: As for every rule.
        never: As for every rule.

    Raises:
        ValueError: Not exactly one of ``k`` and ``density`` is given, or an argument is out of range.
        TypeError: ``k`` or ``density`` is not a number.
    """

    streams: ClassVar[bool] = True
    on_shards: ClassVar[bool] = True

    def choose(
        self, scores: Mapping[str, AnyTensor], total: int, backend: Backend | None = None
    ) -> Mapping[str, Tensor]:
        if small := [name for name, score in scores.items() if self.k is not None and score.numel() < self.k]:
            raise ValueError(
                f"k={self.k} exceeds the size of {len(small)} of {len(scores)} parameters, such as {small[0]}: take "
                "density=, or name them in always= or never=."
            )
        selected: dict[str, Tensor] = {}
        zeros = []
        for name, score in scores.items():
            k = self.budget_of(score.numel())
            alone = of_one(scores, name)
            indices, threshold = topk(alone, k, self.order, backend)
            selected |= indices
            if threshold == 0 and position_decides(self.order, k, num_non_zero(alone), score.numel()):
                zeros.append(name)
        if zeros:
            budget = f"density={self.density}" if self.k is None else f"k={self.k:,}"
            warn_of_zeros(self.order, budget, f"{len(zeros)} of {len(scores)} parameters (such as {zeros[0]})")
        return selected
