"""The serial bottleneck adapter (Houlsby et al., 2019, arXiv:1902.00751)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from fishkern import hosts
from fishkern.adapters.base import Adapter, Wrapper


@dataclass(frozen=True)
class BottleneckAdapter(Adapter):
    """Two bottlenecks in each layer: after attention and after the feed-forward part, before the residual is added.

        h + B gelu(A h + a) + b,    A: [width, D], B: [D, width]

    Both matrices start at random, with a standard deviation of 0.01 as in the paper: if one were zero, the gradient of
    the other, and with it the Fisher information, would be zero too.

    Args:
        width: Size of the bottleneck.
        layers: Numbers of the layers, from the input, starting at 0; ``None`` for all.
    """

    width: int = 48

    def wrappers(self, layer: nn.Module, points: hosts.InsertionPoints) -> dict[str, Wrapper]:
        paths = (points.attention.output, feed_forward_output(layer, points))
        return {path: Bottleneck(layer.get_submodule(path), self.width) for path in paths}


class Bottleneck(Wrapper):
    """A bottleneck after a linear layer.

    Args:
        base_layer: The linear layer.
        width: Size of the bottleneck.
    """

    def __init__(self, base_layer: nn.Linear, width: int) -> None:
        super().__init__(base_layer)
        features = base_layer.nf if hasattr(base_layer, "nf") else base_layer.out_features  # nf: Conv1D of GPT-2
        self.down = small_linear(features, width)
        self.up = small_linear(width, features)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.base_layer(x)
        return hidden + self.change(hidden)

    def change(self, hidden: Tensor) -> Tensor:
        """Compute the term that the bottleneck adds to the output of the linear layer.

        Args:
            hidden: ``[N, T, D]``.

        Returns:
            ``[N, T, D]``.
        """
        return self.up(F.gelu(self.down(hidden)))


def feed_forward_output(layer: nn.Module, points: hosts.InsertionPoints) -> str:
    """Find the linear layer that a bottleneck follows in the feed-forward part.

    Args:
        layer: A transformer layer.
        points: The paths of its parts.

    Returns:
        The path of the linear layer.

    Raises:
        ValueError: There is not one that can be wrapped.
    """
    if points.feed_forward.output is None:
        raise ValueError(
            f"a bottleneck goes after the last linear layer of the feed-forward part, and {type(layer).__name__} has "
            "none that can be wrapped: use a PrefixAdapter, or one of PEFT's adapters, such as LoRA."
        )
    return points.feed_forward.output


def small_linear(inputs: int, outputs: int, *, bias: bool = True) -> nn.Linear:
    """Make a linear layer that starts near zero, but not at zero.

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
