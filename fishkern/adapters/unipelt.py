"""UniPELT: LoRA, a prefix and a bottleneck in one layer, each with a gate (Mao et al., 2022, arXiv:2110.07577)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fishkern import hosts
from fishkern.adapters.base import Adapter, Wrapper
from fishkern.adapters.bottleneck import Bottleneck, feed_forward_output, small_linear
from fishkern.adapters.prefix import Prefixed, prefixed_attention


@dataclass(frozen=True)
class UniPELTAdapter(Adapter):
    """LoRA on query, key and value, a prefix, and a bottleneck after the feed-forward part, each times its gate.

    A gate is ``sigmoid(w x + b)`` of the input of the part that it scales: one number for each position, and for the
    prefix, which has no positions in the text, their mean. A padded position therefore matters only in that mean. The
    sizes are a reconstruction: they give the parameter counts printed in FISH-Tuning (arXiv:2504.04050), but so would
    some others.

    Args:
        rank: LoRA's rank ``R``.
        alpha: LoRA's scale times its rank.
        length: Prefix positions.
        width: Size of the bottleneck.
        layers: Numbers of the layers, from the input, starting at 0; ``None`` for all.
    """

    rank: int = 1
    alpha: float = 2.0
    length: int = 1
    width: int = 8

    def wrappers(self, layer: nn.Module, points: hosts.InsertionPoints) -> dict[str, Wrapper]:
        attention, projections = prefixed_attention(layer, points)
        query, key, value = projections
        output = feed_forward_output(layer, points)
        gate = make_gate(query.in_features)  # one for the three
        inner = {
            path: GatedLoRA(projection, self.rank, self.alpha / self.rank, gate)
            for path, projection in zip(points.projections, projections, strict=True)
        }
        return inner | {
            points.attention.module: GatedPrefix(attention, self.length, key, value, query.in_features),
            output: GatedBottleneck(layer.get_submodule(output), self.width),
        }


class GatedLoRA(Wrapper):
    """``base_layer(x) + gate(x) * scaling * B A x``; neither factor starts at zero.

    Args:
        base_layer: The linear layer.
        rank: ``R``.
        scaling: Factor of the product.
        gate: Shared with the other projections of the layer.
    """

    def __init__(self, base_layer: nn.Linear, rank: int, scaling: float, gate: nn.Linear) -> None:
        super().__init__(base_layer)
        self.lora_A = small_linear(base_layer.in_features, rank, bias=False)
        self.lora_B = small_linear(rank, base_layer.out_features, bias=False)
        self.scaling = scaling
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + torch.sigmoid(self.gate(x)) * (self.scaling * self.lora_B(self.lora_A(x)))


class GatedPrefix(Prefixed):
    """A prefix times its gate."""

    def __init__(self, base_layer: nn.Module, length: int, key: nn.Linear, value: nn.Linear, features: int) -> None:
        super().__init__(base_layer, length, key, value)
        self.gate = make_gate(features)

    def rows(self, hidden: Tensor) -> Tensor:
        return torch.sigmoid(self.gate(hidden)).mean(1, keepdim=True) * super().rows(hidden)


class GatedBottleneck(Bottleneck):
    """A bottleneck times its gate."""

    def __init__(self, base_layer: nn.Linear, width: int) -> None:
        super().__init__(base_layer, width)
        self.gate = make_gate(base_layer.out_features)

    def change(self, hidden: Tensor) -> Tensor:
        return torch.sigmoid(self.gate(hidden)) * super().change(hidden)


def make_gate(features: int) -> nn.Linear:
    """Make a gate that starts half open.

    Args:
        features: Size of its input.

    Returns:
        A linear layer to one number, near zero.
    """
    return small_linear(features, 1)
