"""An unbiased sketch of the diagonal empirical Fisher, for any layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from fishkern.arguments import integer
from fishkern.backend import Backend
from fishkern.layers import PerExampleGrads
from fishkern.statistics.base import Estimator, ParameterInfo, Reads, losses_of
from fishkern.statistics.predictive import Predictive
from fishkern.statistics.streams import uniform


@dataclass(frozen=True)
class SketchedFisher(Estimator):
    r"""Square the gradient of a randomly signed sum of losses.

    With independent signs ``e_n = +-1``, ``E ( sum_n e_n grad_n )^2 = sum_n grad_n^2``: the cross terms have mean zero.
    It takes one ordinary backward pass for each draw and batch, and works with any module, sharing or wrapper. It is an
    approximation: its variance grows with the batch size and falls with the number of draws.

    Args:
        draws: Sign vectors for each batch.
        seed: Seed of the signs; an example's signs depend on its index in the data, not on its batch.

    Raises:
        ValueError: ``draws`` is below 1.
        TypeError: ``draws`` or ``seed`` is not an integer.
    """

    reads: ClassVar[Reads] = "sums"
    draws: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("draws", "seed"):
            object.__setattr__(self, name, integer(getattr(self, name), name))
        if self.draws < 1:
            raise ValueError(f"draws must be at least 1, got {self.draws}.")

    @property
    def definition(self) -> dict[str, Any]:
        return {"estimator": "SketchedFisher", "fisher_type": "empirical", "unit": "example"}

    @property
    def settings(self) -> dict[str, Any]:
        return {"draws": self.draws, "seed": self.seed}

    def objectives(self, answer: Predictive | Tensor, examples: range) -> Iterator[Tensor]:
        losses = losses_of(answer)
        for draw in range(self.draws):
            signs = uniform(self.seed, draw, examples, 1)[:, 0].sub(0.5).sign()
            yield losses * signs.to(losses) / self.draws**0.5

    def units(self, num_examples: int) -> int:
        return num_examples

    def update_(
        self, state: Tensor, grads: PerExampleGrads, parameter: ParameterInfo, backend: Backend | None = None
    ) -> None:
        grads.add_squares_(state, backend)
