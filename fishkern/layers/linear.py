"""Linear maps: ``nn.Linear``, transformers' ``Conv1D``, and linears whose frozen weight is quantised."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fishkern.layers.base import Call, Layer, is_patched, positions, runs
from fishkern.layers.grads import OuterProductGrads, PerExampleGrads, PositionGrads


class Linear(Layer):
    """``y = x W^T + b`` with ``W [O, I]``: ``grad_n W = sum_t output_grads[n, t] (x) activations[n, t]``."""

    def covers(self, module: nn.Module) -> frozenset[str]:
        plain = runs(module, nn.Linear) and module.weight.is_floating_point()
        return frozenset({"weight", "bias"}) if plain else frozenset()

    def reads_input(self, names: frozenset[str]) -> bool:
        return "weight" in names

    def per_example_grads(
        self, call: Call, output_grads: Tensor, names: frozenset[str]
    ) -> Iterator[tuple[str, PerExampleGrads]]:
        g = positions(output_grads)
        if "weight" in names:
            x = positions(call.input).to(g.dtype)  # under autocast the input is wider
            yield "weight", OuterProductGrads(x, g, weight_shape(call.module))
        if "bias" in names:
            yield "bias", PositionGrads(g)


class QuantizedLinear(Linear):
    """A linear whose weight is stored in integers: the statistic is that of the dequantised weight ``[O, I]``."""

    def covers(self, module: nn.Module) -> frozenset[str]:
        sized = all(isinstance(getattr(module, name, None), int) for name in ("in_features", "out_features"))
        weight = getattr(module, "weight", None)
        integer = isinstance(weight, Tensor) and not weight.is_floating_point()
        return frozenset({"weight", "bias"}) if sized and integer else frozenset()


class Conv1D(Layer):
    """transformers' transposed linear, ``y = x W + b`` with ``W [I, O]``, as in GPT-2."""

    def covers(self, module: nn.Module) -> frozenset[str]:
        named = type(module).__name__ == "Conv1D" and hasattr(module, "nf") and not is_patched(module)
        return frozenset({"weight", "bias"}) if named else frozenset()

    def reads_input(self, names: frozenset[str]) -> bool:
        return "weight" in names

    def per_example_grads(
        self, call: Call, output_grads: Tensor, names: frozenset[str]
    ) -> Iterator[tuple[str, PerExampleGrads]]:
        g = positions(output_grads)
        if "weight" in names:
            x = positions(call.input).to(g.dtype)
            yield "weight", OuterProductGrads(activations=g, output_grads=x, shape=call.module.weight.shape)
        if "bias" in names:
            yield "bias", PositionGrads(g)


def weight_shape(module: Any) -> torch.Size:
    """Shape of a linear's weight as the arithmetic sees it, whatever it is stored in.

    Args:
        module: A linear with ``in_features`` and ``out_features``.

    Returns:
        ``[O, I]``.
    """
    return torch.Size((module.out_features, module.in_features))
