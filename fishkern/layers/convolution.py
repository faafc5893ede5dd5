"""Convolutions without groups, as the linear maps of patches that they are."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn import functional as F

from fishkern.layers.base import Call, Layer, runs
from fishkern.layers.grads import OuterProductGrads, PerExampleGrads, PositionGrads


class Convolution(Layer):
    """``nn.Conv1d`` and ``nn.Conv2d``: positions are the places of the kernel, activations the patches under it."""

    def covers(self, module: nn.Module) -> frozenset[str]:
        plain = runs(module, nn.Conv1d) or runs(module, nn.Conv2d)
        if not plain or module.groups != 1 or module.padding_mode != "zeros":
            return frozenset()
        return frozenset({"weight", "bias"})

    def reads_input(self, names: frozenset[str]) -> bool:
        return "weight" in names

    def gives_factors(self, name: str) -> bool:
        return name == "weight"

    def per_example_grads(
        self, call: Call, output_grads: Tensor, names: frozenset[str]
    ) -> Iterator[tuple[str, PerExampleGrads]]:
        module = call.module
        g = output_grads.flatten(2).mT  # [N, places, O]
        if "weight" in names:
            x = _patches(module, call.input).to(g.dtype)
            yield "weight", OuterProductGrads(x, g, module.weight.shape)
        if "bias" in names:
            yield "bias", PositionGrads(g)


def _patches(module: nn.Conv1d | nn.Conv2d, images: Tensor) -> Tensor:
    """Patches under the kernel, ``[N, places, C * kernel]``."""
    flat = isinstance(module, nn.Conv1d)
    # F.pad's order is last axis first; the doubled list covers padding="same" too
    images = F.pad(images, module._reversed_padding_repeated_twice)
    if flat:
        images = images[:, :, None]

    def pair(value: tuple[int, ...]) -> tuple[int, ...]:
        return (1, *value) if flat else value

    patches = F.unfold(images, pair(module.kernel_size), dilation=pair(module.dilation), stride=pair(module.stride))
    return patches.mT
