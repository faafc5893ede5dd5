"""The diagonal of the Fisher information."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from fishkern.arguments import integer
from fishkern.backend import Backend
from fishkern.layers import PerExampleGrads
from fishkern.statistics.base import Estimator, ParameterInfo, Reads, State, losses_of
from fishkern.statistics.predictive import Predictive
from fishkern.statistics.streams import uniform

_FISHER_TYPES = ("empirical", "mc", "type-2")
_UNITS = ("example", "position", "batch")


@dataclass(frozen=True)
class DiagonalFisher(Estimator):
    r"""Diagonal of the Fisher information: the mean over examples of the squared gradient of each one's loss.

        F[p] = 1/N sum_n ( d loss_n / d theta[p] )^2

    Variants differ in the labels of ``loss_n`` (Kunstner et al., 2019, arXiv:1905.12558; Martens, 2014,
    arXiv:1412.1193). Labels are drawn or enumerated for each position given the data's inputs (teacher forcing).

    Args:
        fisher_type: ``"empirical"``: the data's labels; one backward pass. ``"mc"``: labels drawn from the model's
            predictive distribution; ``mc_samples`` backward passes. ``"type-2"``: the exact expectation over labels;
            one backward pass for each label of each position.
        unit: What is summed before squaring. ``"example"``: an example's positions, the Fisher information.
            ``"position"``: nothing, ``sum_{n,t} (g_nt x_nt)^2 / N``: cheap and common, and *not* the Fisher of token
            losses. ``"batch"``: the gradient of the batch's mean loss, squared and averaged over batches: common, and
            another quantity; where FSDP2 shards the model, the batch is what all ranks run at one time. The last two
            are for comparison.
        mc_samples: Draws for each example.
        seed: Seed of the draws; an example's draw depends on its index in the data, not on its batch.
        max_label_passes: ``"type-2"`` raises when a batch needs more backward passes than this.

    Raises:
        ValueError: An argument is not among the values above.
        TypeError: ``mc_samples``, ``seed`` or ``max_label_passes`` is not an integer.
    """

    fisher_type: Literal["empirical", "mc", "type-2"] = "empirical"
    unit: Literal["example", "position", "batch"] = "example"
    mc_samples: int = 1
    seed: int = 0
    max_label_passes: int = 4096

    def __post_init__(self) -> None:
        if self.fisher_type not in _FISHER_TYPES:
            raise ValueError(f"fisher_type must be one of {_FISHER_TYPES}, got {self.fisher_type!r}.")
        if self.unit not in _UNITS:
            raise ValueError(f"unit must be one of {_UNITS}, got {self.unit!r}.")
        for name in ("mc_samples", "seed", "max_label_passes"):
            object.__setattr__(self, name, integer(getattr(self, name), name))
        if self.mc_samples < 1:
            raise ValueError(f"mc_samples must be at least 1, got {self.mc_samples}.")
        if self.unit != "example" and self.fisher_type == "type-2":
            raise ValueError(f"fisher_type='type-2' is defined for unit='example' only, got unit={self.unit!r}.")

    @property
    def reads(self) -> Reads:
        return {"example": "squares", "position": "positions", "batch": "batches"}[self.unit]

    @property
    def definition(self) -> dict[str, Any]:
        return {"estimator": "DiagonalFisher", "fisher_type": self.fisher_type, "unit": self.unit}

    @property
    def settings(self) -> dict[str, Any]:
        return {"mc_samples": self.mc_samples, "seed": self.seed} if self.fisher_type == "mc" else {}

    def objectives(self, answer: Predictive | Tensor, examples: range) -> Iterator[Tensor | None]:
        weight = 1 / len(examples) if self.unit == "batch" else 1.0
        if self.fisher_type == "empirical":
            yield weight * losses_of(answer)
            return
        if isinstance(answer, Tensor):
            raise ValueError(
                f"fisher_type={self.fisher_type!r} needs the distribution of the labels, which a likelihood given as a "
                "function does not define. Pass a fishkern likelihood, or use fisher_type='empirical'."
            )
        if self.fisher_type == "type-2":
            if answer.label_passes > self.max_label_passes:
                raise ValueError(
                    f"fisher_type='type-2' would need {answer.label_passes} backward passes for one batch (labels "
                    f"times positions), more than max_label_passes={self.max_label_passes}. Raise it, or use "
                    "fisher_type='mc'."
                )
            yield from answer.label_losses()
            return
        for draw in range(self.mc_samples):
            numbers = uniform(self.seed, draw, examples, answer.draws_per_example)
            losses = answer.drawn_losses(numbers)
            yield losses * (weight / self.mc_samples**0.5)  # the squares then add up to the mean over draws

    def units(self, num_examples: int) -> int:
        return 1 if self.unit == "batch" else num_examples

    def update_(
        self, state: Tensor, grads: PerExampleGrads, parameter: ParameterInfo, backend: Backend | None = None
    ) -> None:
        if self.unit == "position":
            grads.add_position_squares_(state)
        else:
            grads.add_squares_(state, backend)

    def of_gradient(self, grad: Tensor, parameter: ParameterInfo) -> State:
        return grad.to(parameter.dtype).square()

    def result(self, state: Tensor, count: int) -> Tensor:
        # a tied weight's squares are formed as A^2 + (2A + E)E, which rounding may leave just below zero
        return super().result(state.clamp_(min=0), count)
