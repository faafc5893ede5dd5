"""Statistics as a user writes them, outside the package: another shape, one number for each parameter, and a sign."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

import fishkern as fk


@dataclass(frozen=True)
class SquaredFactors(fk.Estimator):
    """Mean over examples of the squares of what enters a linear map and of what is back-propagated to its output.

    State and result are ``[O + I]``; sums run over the positions that count.
    """

    reads = "factors"
    definition: ClassVar[dict] = {"estimator": "SquaredFactors", "unit": "example"}

    def init(self, parameter):
        O, I = parameter.shape
        zeros = torch.zeros(O + I, dtype=parameter.dtype, device=parameter.device)
        return {"both": zeros, "name": fk.Constant(parameter.name)}

    def update_(self, state, grads, parameter, backend=None):
        assert state["name"].value == parameter.name
        d, h = grads.output_grads.to(parameter.dtype), grads.activations.to(parameter.dtype)
        if grads.counted is not None:
            h = h * grads.counted[..., None]
        state["both"] += torch.cat([d.square().sum((0, 1)), h.square().sum((0, 1))])

    def result(self, state, count):
        return (state["both"] / count).float()


@dataclass(frozen=True)
class GradientNorm(fk.Estimator):
    """Mean over examples of the norm of each parameter's gradient: a scalar for each."""

    definition: ClassVar[dict] = {"estimator": "GradientNorm", "unit": "example"}

    def init(self, parameter):
        return (torch.zeros((), dtype=parameter.dtype, device=parameter.device),)

    def update_(self, state, grads, parameter, backend=None):
        for n in range(grads.num_examples):
            state[0].add_(grads.example(n).norm())

    def of_gradient(self, grad, parameter):
        return (grad.to(parameter.dtype).norm(),)

    def result(self, state, count):
        return (state[0] / count).float()


@dataclass(frozen=True)
class MeanGradient(fk.Estimator):
    """The gradient itself, with its sign."""

    definition: ClassVar[dict] = {"estimator": "MeanGradient", "unit": "example"}

    def update_(self, state, grads, parameter, backend=None):
        for n in range(grads.num_examples):
            state += grads.example(n)

    def of_gradient(self, grad, parameter):
        return grad.to(parameter.dtype)


OWN = {"factors": SquaredFactors(), "norm": GradientNorm(), "signed": MeanGradient()}
