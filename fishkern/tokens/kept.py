"""Which patches of an image are still tokens behind each reducing layer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fishkern import hosts
from fishkern.tokens.attach import reducing_layers
from fishkern.tokens.towers import special_tokens, tower_of


@dataclass(frozen=True, eq=False)
class KeptTokens:
    """The patches that are still tokens behind one layer.

    Attributes:
        layer: Number of the layer.
        kept: ``[N, patches]`` bool; ``False`` for patches that were dropped or merged in this layer or an earlier one.
        grid: Rows and columns of patches in an image; ``kept.view(N, *grid)`` is a picture.
    """

    layer: int
    kept: Tensor
    grid: tuple[int, int]


def kept_tokens(model: nn.Module, pixel_values: Tensor, **options: Any) -> list[KeptTokens]:
    """Run images through a model, and follow their patches through its reducing layers.

    Args:
        model: A model with token reduction; it is run in evaluation mode, without gradient, and comes back as it was.
        pixel_values: Images, ``[N, channels, height, width]``.
        **options: As for the vision transformer, such as ``interpolate_pos_encoding=True``.

    Returns:
        One entry for each reducing layer, in their order.

    Raises:
        ValueError: The model does not reduce tokens.
    """
    model = hosts.unwrap(model)
    if not (layers := list(reducing_layers(model).values())):
        raise ValueError(f"{type(model).__name__} does not reduce tokens: fishkern.tokens.attach a recipe first.")
    tower, splits = tower_of(model), []

    def choose(layer: nn.Module, args: tuple[Any, ...]) -> None:
        splits.append(layer.split(args[0]))

    hooks = [layer.register_forward_pre_hook(choose) for layer in layers]
    try:
        eager = torch.compiler.set_stance("force_eager")  # hooks that are added after a compiled run never fire
        with hosts.evaluation_mode(tower, checkpointing=False), eager, torch.no_grad():
            tower(pixel_values=pixel_values, **options)
    finally:
        for hook in hooks:
            hook.remove()
    recipe, special = layers[0].recipe, special_tokens(tower)
    grid = _grid(tower, pixel_values)
    # the patch that each token is; the merged tokens of all layers go to one column more than there are patches
    patches = math.prod(grid)
    places = torch.arange(patches, device=pixel_values.device).expand(len(pixel_values), -1)
    entries = []
    for number, split in zip(recipe.layers, splits, strict=True):
        if split is not None:
            places = places.gather(1, split.kept - special)
            if recipe.merge:
                places = torch.nn.functional.pad(places, (0, 1), value=patches)
        kept = torch.zeros(len(places), patches + 1, dtype=torch.bool, device=places.device).scatter_(1, places, True)
        entries.append(KeptTokens(number, kept[:, :patches], grid))
    return entries


def _grid(tower: nn.Module, pixel_values: Tensor) -> tuple[int, int]:
    size = tower.config.patch_size
    height, width = size if isinstance(size, Iterable) else (size, size)
    return pixel_values.shape[-2] // height, pixel_values.shape[-1] // width
