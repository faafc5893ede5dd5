"""The ``k`` best coordinates of each parameter."""

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
class PerTensorTopK(Rule):
    """Select the ``k`` first scores of each parameter, so that every one of them gets its share.

    Args:
        k: How many of each parameter; or
        density: floor(density * size) of each parameter.
        order: ``"largest"`` scores first, or ``"smallest"``.
        always: As for every rule.
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
        if small := [name for name, score in scores.items() if self.k is not None and score.numel() < self.k]:
            raise ValueError(
                f"k={self.k} exceeds the size of {len(small)} of {len(scores)} parameters, such as {small[0]}: take "
                "density=, or name them in always= or never=."
            )
        chosen: dict[str, Tensor] = {}
        zeros = []
        for name, score in scores.items():
            k = budget(self.k, self.density, score.numel())
            indices, threshold = topk({name: score}, k, self.order, backend)
            chosen |= indices
            if threshold == 0 and by_position(self.order, k, num_non_zero([score]), score.numel()):
                zeros.append(name)
        if zeros:
            where = f"in {len(zeros)} of {len(scores)} parameters, such as {zeros[0]}, k"
            warn_of_zeros(self.order, where, "number of")
        return chosen
