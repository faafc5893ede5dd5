"""UniPELT: LoRA, a prefix and a bottleneck in one layer, each behind a gate (Mao et al., 2022, arXiv:2110.07577)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fishkern.adapters.base import Adapter, Places, Wrapper
from fishkern.adapters.bottleneck import Bottleneck, small_linear
from fishkern.adapters.prefix import Prefixed


@dataclass(frozen=True)
class UniPELTAdapter(Adapter):
    """LoRA on query, key and value, a prefix, and a bottleneck behind the feed-forward part, each times its gate.

    A gate is ``sigmoid(w x + b)`` of what goes into the part that it guards: one number for each position, and for the
    prefix, which has no positions of the text, their mean. So a padded position changes nothing but through that mean.
    The sizes are a reconstruction: they give the parameter counts that FISH-Tuning (arXiv:2504.04050) prints, as some
    others would.

    Args:
        rank: LoRA's rank ``R``.
        alpha: LoRA's scale times its rank.
        length: Prefix positions.
        width: Size of the bottleneck.
        layers: Numbers of the layers, from the bottom; ``None`` for all.
    """

    rank: int = 1
    alpha: float = 2.0
    length: int = 1
    width: int = 8

    def wrappers(self, layer: nn.Module, places: Places) -> dict[str, Wrapper]:
        projections = {path: layer.get_submodule(path) for path in places.query_key_value}
        query, key, value = projections.values()
        gate = make_gate(query.in_features)  # one for the three
        attention = layer.get_submodule(places.attention)
        inner = {
            path: GatedLoRA(projection, self.rank, self.alpha / self.rank, gate)
            for path, projection in projections.items()
        }
        return inner | {
            places.attention: GatedPrefix(attention, self.length, key, value, query.in_features),
            places.feed_forward_output: GatedBottleneck(layer.get_submodule(places.feed_forward_output), self.width),
        }


class GatedLoRA(Wrapper):
    """``base_layer(x) + gate(x) * scaling * B A x``, neither factor starting at zero.

    Args:
        base_layer: The linear.
        rank: ``R``.
        scaling: What the product is multiplied by.
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
        features: Size of what it looks at.

    Returns:
        A linear to one number, near zero.
    """
    return small_linear(features, 1)
