"""The serial bottleneck adapter (Houlsby et al., 2019, arXiv:1902.00751)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from fishkern.adapters.base import Adapter, Places, Wrapper


@dataclass(frozen=True)
class BottleneckAdapter(Adapter):
    """Two bottlenecks in each layer: behind attention and behind the feed-forward part, in front of the residual.

        h + B gelu(A h + a) + b,    A: [width, D], B: [D, width]

    Both matrices start at random, with a standard deviation of 0.01 as in the paper: where one were zero, the other's
    gradient, and so its Fisher information, would be zero too.

    Args:
        width: Size of the bottleneck.
        layers: Numbers of the layers, from the bottom; ``None`` for all.
    """

    width: int = 48

    def wrappers(self, layer: nn.Module, places: Places) -> dict[str, Wrapper]:
        return {
            path: Bottleneck(layer.get_submodule(path), self.width)
            for path in (places.attention_output, places.feed_forward_output)
        }


class Bottleneck(Wrapper):
    """A bottleneck behind a linear layer.

    Args:
        base_layer: The linear.
        width: Size of the bottleneck.
    """

    def __init__(self, base_layer: nn.Linear, width: int) -> None:
        super().__init__(base_layer)
        features = base_layer.out_features
        self.down = small_linear(features, width)
        self.up = small_linear(width, features)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.base_layer(x)
        return hidden + self.change(hidden)

    def change(self, hidden: Tensor) -> Tensor:
        """Compute what the bottleneck adds to the linear's output.

        Args:
            hidden: ``[N, T, D]``.

        Returns:
            ``[N, T, D]``.
        """
        return self.up(F.gelu(self.down(hidden)))


def small_linear(inputs: int, outputs: int, *, bias: bool = True) -> nn.Linear:
    """Make a linear layer that starts near zero, but not at it.

    Args:
        inputs: In-features.
        outputs: Out-features.
        bias: Whether it has one.

    Returns:
        The layer: weights from ``N(0, 0.01^2)``, biases zero.
    """
    linear = nn.Linear(inputs, outputs, bias=bias)
    nn.init.normal_(linear.weight, std=0.01)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear
