"""Layer normalisation."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from fishkern.layers.base import Call, Layer, positions, runs
from fishkern.layers.grads import Factors, PerExampleGrads, PositionGrads


class LayerNorm(Layer):
    """``y = xhat * w + b``: ``grad_n w = sum_t output_grads * xhat``, ``grad_n b = sum_t output_grads``."""

    def covers(self, module: nn.Module) -> frozenset[str]:
        return frozenset({"weight", "bias"}) if runs(module, nn.LayerNorm) else frozenset()

    def reads_input(self, names: frozenset[str]) -> bool:
        return "weight" in names

    def per_example_grads(
        self, call: Call, output_grads: Tensor, names: frozenset[str]
    ) -> Iterator[tuple[str, PerExampleGrads]]:
        shape = call.module.normalized_shape
        g = positions(output_grads, len(shape))
        if "weight" in names:
            inputs = positions(call.input.expand_as(output_grads), len(shape))
            yield "weight", PositionGrads(g, factors=Factors(inputs, "layer", call.module.eps))
        if "bias" in names:
            yield "bias", PositionGrads(g)
