"""The ``k`` best coordinates of all parameters together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fishkern.backend import Backend
from fishkern.files import AnyTensor
from fishkern.ops.streaming_topk import Order
from fishkern.selection.base import Rule, budget, by_position, check_order, either, num_non_zero, topk, warn_of_zeros


@dataclass(frozen=True)
class GlobalTopK(Rule):
    """Select the ``k`` first scores of the whole pool, whichever parameter they lie in (Sung et al., 2021, 2111.09839).

    ``k`` is exact: of equal scores those come first whose parameter does, then those of smaller index.

    Args:
        k: How many; or
        density: floor(density * pool), where the pool is every scored coordinate, those of ``always`` and ``never``
            included.
        order: ``"largest"`` scores first, or ``"smallest"``.
        always: As for every rule: selected whole, beside the ``k``.
        never: As for every rule.

    Raises:
        ValueError: Not exactly one of ``k`` and ``density`` is given, or an argument is out of range.
        TypeError: ``k`` or ``density`` is no number.
    """

    streams: ClassVar[bool] = True
    k: int | None = None
    density: float | None = None
    order: Order = "largest"

    def __post_init__(self) -> None:
        super().__post_init__()
        vars(self).update(either(self.k, self.density))
        check_order(self.order)

    def choose(
        self, scores: Mapping[str, AnyTensor], total: int, backend: Backend | None = None
    ) -> Mapping[str, Tensor]:
        k = budget(self.k, self.density, total)
        if k > (available := sum(score.numel() for score in scores.values())):
            raise ValueError(
                f"k={k:,} of a pool of {total:,} was asked for, but only {available:,} are left to choose from beside "
                "always= and never=: lower k or density."
            )
        indices, threshold = topk(scores, k, self.order, backend)
        if threshold == 0:
            non_zero = num_non_zero(scores.values())
            if by_position(self.order, k, non_zero, available):
                number = non_zero if self.order == "largest" else available - non_zero
                warn_of_zeros(self.order, f"k={k:,}", f"{number:,}")
        return indices
