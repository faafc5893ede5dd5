"""The ``k`` best coordinates of all parameters together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fishkern.backend import Backend
from fishkern.files import AnyTensor
from fishkern.selection.ranking import TopK, num_non_zero, position_decides, topk, warn_of_zeros


@dataclass(frozen=True)
class GlobalTopK(TopK):
    """Select the ``k`` first scores of the whole pool, whichever parameter they are in (Sung et al., 2021, 2111.09839).

    ``k`` is exact: ties go to the earlier parameter, then to the smaller index.

    Args:
        k: How many; or
        density: floor(density * pool), where the pool is every scored coordinate, those of ``always`` and ``never``
            included.
        order: ``"largest"`` scores first, or ``"smallest"``.
        always: As for every rule: selected whole, on top of the ``k``.
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
        available = sum(score.numel() for score in scores.values())
        k = self.budget_of_pool(total, available)
        indices, threshold = topk(scores, k, self.order, backend)
        if threshold == 0:  # ties at any other score are no sign that the data do not rank
            non_zero = num_non_zero(scores)
            if position_decides(self.order, k, non_zero, available):
                count = non_zero if self.order == "largest" else available - non_zero
                warn_of_zeros(self.order, f"k={k:,}", "the pool", count)
        return indices
