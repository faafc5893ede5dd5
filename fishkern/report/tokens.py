"""How many image tokens enter and leave the layers that drop some."""

from __future__ import annotations

from dataclasses import dataclass

from fishkern.tokens import TokenReduction
from fishkern.tokens.reduce import kept_count


@dataclass(frozen=True)
class TokenCount:
    """The image tokens of one layer that drops some; class, distillation and register tokens do not count.

    Attributes:
        layer: Its number.
        entering: How many come from the layer before.
        leaving: How many go to the next layer, the merged one included.
    """

    layer: int
    entering: int
    leaving: int


def count_tokens(reduction: TokenReduction, patches: int) -> list[TokenCount]:
    """Count the tokens of an image in the layers that drop some.

    Args:
        reduction: The recipe.
        patches: Number of patches of the image.

    Returns:
        The counts of each reducing layer, in order.
    """
    counts = []
    for layer in reduction.layers:
        kept = kept_count(patches, reduction.share)
        leaving = kept + reduction.merge if kept < patches else patches
        counts.append(TokenCount(layer, patches, leaving))
        patches = leaving
    return counts
