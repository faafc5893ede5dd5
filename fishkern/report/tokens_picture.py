"""The image tokens that a model keeps as a picture: each image, and what is left of it after each reducing layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from fishkern.tokens import KeptTokens

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CELL = 1.9  # inches of an image
_VEIL = 0.85  # of a patch that is no token any more, so that it is seen on dark and on bright images


def draw_kept_tokens(
    images: Tensor, kept: Sequence[KeptTokens], *, names: Sequence[str] = (), title: str = ""
) -> Figure:
    """Draw a row for each image: as the model sees it, then after each reducing layer, without the dropped patches.

    A patch that has been merged into another token counts as dropped: it is veiled, and framed in grey.

    Args:
        images: As the model gets them, in colours from 0 to 1: ``[N, 3, H, W]`` or, without colours, ``[N, 1, H, W]``.
        kept: From :func:`fishkern.tokens.kept_tokens` of these images.
        names: Of the images, beside each row.
        title: Above the picture.

    Returns:
        A matplotlib figure; :func:`fishkern.report.plots.save` saves it.

    Raises:
        ValueError: There is no reducing layer, or the numbers of images differ.
    """
    from matplotlib.figure import Figure

    if not kept:
        raise ValueError("no layer of the model drops tokens: there is nothing to draw.")
    if any(len(layer.kept) != len(images) for layer in kept):
        raise ValueError(f"the tokens are those of {len(kept[0].kept)} images, and {len(images)} images are given.")
    rows, columns = len(images), len(kept) + 1
    figure = Figure(figsize=(_CELL * columns + 0.6, _CELL * rows + 0.9), layout="constrained")
    figure.suptitle(title, fontsize=10)
    all_axes = figure.subplots(rows, columns, squeeze=False)
    for n, (image, row) in enumerate(zip(images, all_axes, strict=True)):
        colours = image.clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0).float().cpu().numpy()
        for axes in row:
            axes.imshow(colours, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
        for axes, layer in zip(row[1:], kept, strict=True):
            _veil(axes, layer.kept[n].view(layer.grid), image.shape[1:])
        if names:
            row[0].set_ylabel(names[n], fontsize=8)
        for axes, layer in zip(row[1:], kept, strict=True):
            axes.set_xlabel(f"{int(layer.kept[n].sum()):,} of {layer.kept[n].numel():,} patches", fontsize=7)
    all_axes[0][0].set_title("image", fontsize=9)
    for axes, layer in zip(all_axes[0][1:], kept, strict=True):
        axes.set_title(f"after layer {layer.layer}", fontsize=9)
    return figure


def _veil(axes: Axes, kept: Tensor, size: Sequence[int]) -> None:
    """Cover the patches that are not kept.

    Args:
        axes: With the image.
        kept: ``[rows, columns]`` boolean, a cell for each patch.
        size: Height and width of the image; what whole patches do not cover stays bare.
    """
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    height, width = (pixels // patches for pixels, patches in zip(size, kept.shape, strict=True))
    places = (~kept).nonzero().tolist()
    patches = [Rectangle((column * width - 0.5, row * height - 0.5), width, height) for row, column in places]
    axes.add_collection(PatchCollection(patches, facecolor=(1, 1, 1, _VEIL), edgecolor="0.55", linewidth=0.4))
