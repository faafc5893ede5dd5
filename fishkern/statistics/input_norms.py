"""Squared norms of what enters each linear map, by input feature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fishkern.arguments import one_of
from fishkern.backend import Backend
from fishkern.layers import LinearMap, OuterProductGrads
from fishkern.statistics.base import Estimator, ParameterInfo, Positions, Reads, State


@dataclass(frozen=True)
class InputNorms(Estimator):
    r"""Mean over examples of the squared norm of each input feature of a linear map, over the example's positions.

        S[i] = 1/N sum_n sum_t x_nt[i]^2

    ``sqrt(N S)`` is the norm over all data, by which Wanda scores a weight (:func:`fishkern.saliency`). The result is
    :class:`fishkern.Statistics` of shape ``[I]`` by the weight's name. ``parameters=None`` of :func:`fishkern.estimate`
    takes the weight of every linear map with ``requires_grad``; another parameter is refused by name. The pass is one
    of the Fisher information, with its backward pass.

    Args:
        positions: Which positions count: those that ``attention_mask`` marks (``"attended"``), those whose output has
            a label (``"labelled"``), or ``"all"``. A module without positions has one for each example.

    Raises:
        ValueError: ``positions`` is none of these.
    """

    reads: ClassVar[Reads] = "factors"
    by_default: ClassVar[Literal["trainable", "linear"]] = "linear"
    positions: Positions = "attended"

    def __post_init__(self) -> None:
        one_of(self.positions, ("attended", "labelled", "all"), "positions")

    @property
    def definition(self) -> dict[str, Any]:
        return {"estimator": "InputNorms", "unit": "example", "positions": self.positions}

    def init(self, parameter: ParameterInfo) -> State:
        return torch.zeros(_map(parameter).shape[1], dtype=parameter.dtype, device=parameter.device)

    def update_(
        self, state: Tensor, grads: OuterProductGrads, parameter: ParameterInfo, backend: Backend | None = None
    ) -> None:
        # of the stored matrix, whose rows are the input's features where it is transposed
        inputs = grads.output_grads if _map(parameter).transposed else grads.activations
        inputs = inputs.flatten(0, -2) if grads.counted is None else inputs[grads.counted]
        state += inputs.to(state.dtype).square().sum(0)


def _map(parameter: ParameterInfo) -> LinearMap:
    if parameter.linear is None:
        raise TypeError(f"{parameter.name} is described without the linear map whose weight it is.")
    return parameter.linear
