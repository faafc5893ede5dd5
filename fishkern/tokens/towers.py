"""Which vision transformers can reduce tokens, and why the others cannot.

Classes are compared by name, so that transformers is not imported.
"""

from __future__ import annotations

import inspect

from torch import nn

from fishkern import hosts
from fishkern.names import listed
from fishkern.tokens.layer import Parts

# Vision transformers with a class token in front, whose layers know no place of a token.
_TOWERS = frozenset(
    {
        "ViTModel",
        "ViTMSNModel",
        "DeiTModel",
        "Dinov2Model",
        "Dinov2WithRegistersModel",
        "CLIPVisionModel",
    }
)
# Models around them that read the class token, or the mean of the others.
_READERS = frozenset(
    {
        "ViTForImageClassification",
        "ViTMSNForImageClassification",
        "DeiTForImageClassification",
        "DeiTForImageClassificationWithTeacher",
        "Dinov2ForImageClassification",
        "Dinov2WithRegistersForImageClassification",
        "CLIPModel",
        "CLIPVisionModelWithProjection",
        "CLIPForImageClassification",
    }
)
_KNOWN = "ViT, ViT-MSN, DeiT, DINOv2 (with and without registers), and CLIP"

# By the start of the name of a class.
_REFUSED = {
    "Siglip": "has no class token, by whose attention tokens are ranked",
    "DINOv3ViT": "rotates queries and keys by the place of each patch",
    "Beit": "adds a bias to attention for each pair of places",
    "Data2VecVision": "adds a bias to attention for each pair of places",
    "Yolos": "adds positions between its layers, and has detection tokens behind the patches",
    "ViTMAE": "drops patches at random and puts them back in their places",
    "Swin": "attends inside windows of neighbouring patches",
}


def tower_of(model: nn.Module) -> nn.Module:
    """Find the vision transformer in a model.

    Args:
        model: The transformer itself, or a model that contains it, wrapped or not.

    Returns:
        The module that embeds the image and has the layers.

    Raises:
        ValueError: There is none that can reduce tokens, or there are several; or a model of transformers around it may
            read patches by their place.
    """
    model = hosts.unwrap(model)
    towers = {path: module for path, module in model.named_modules() if _is(module, _TOWERS)}
    if not towers:
        raise ValueError(_none_in(model))
    if len(towers) > 1:
        raise ValueError(
            f"{type(model).__name__} has several vision transformers, {listed(map(repr, towers))}: take one of these "
            "parts instead."
        )
    ((path, tower),) = towers.items()
    names = path.split(".") if path else []
    for module in (model.get_submodule(".".join(names[:depth])) for depth in range(len(names))):
        if _transformers_classes(module) and not _is(module, _READERS):
            raise ValueError(
                f"{type(module).__name__} is not known to read the class token or the mean of the tokens only. What "
                "reads patches by their place (segmentation, depth, detection, reconstruction, language models with "
                f"vision) would be wrong once tokens are gone. Token reduction fits {_KNOWN}, and their classifiers."
            )
    return tower


def layers_of(tower: nn.Module, numbers: tuple[int, ...]) -> dict[int, tuple[nn.Module, Parts]]:
    """Find layers of a vision transformer, and their modules.

    Args:
        tower: From :func:`tower_of`.
        numbers: Numbers of the layers.

    Returns:
        Each layer, without wrappers of torch, and the names of its modules.

    Raises:
        ValueError: There is no such number, or a layer is not built as those of transformers.
    """
    _, layers = hosts.stack_of(tower)
    if outside := [number for number in numbers if number >= len(layers)]:
        raise ValueError(
            f"{type(tower).__name__} has the layers 0 to {len(layers) - 1}, and the recipe names {outside}."
        )
    return {number: _parts(layers[number], number) for number in numbers}


def special_tokens(tower: nn.Module) -> int:
    """Count the tokens that are not of the image: class, distillation and register tokens, in front of the others.

    Args:
        tower: From :func:`tower_of`.

    Returns:
        Their number, at least 1.
    """
    registers = getattr(tower.embeddings, "register_tokens", None)
    distillation = getattr(tower.embeddings, "distillation_token", None)
    return 1 + (distillation is not None) + (0 if registers is None else registers.shape[1])


def is_own_forward(layer: nn.Module) -> bool:
    """Check whether the forward pass of a layer is that of transformers.

    Args:
        layer: From :func:`layers_of`.

    Returns:
        ``False`` if a subclass has another one.
    """
    return inspect.unwrap(type(layer).forward).__module__.startswith("transformers.models.")


def _parts(entry: nn.Module, number: int) -> tuple[nn.Module, Parts]:
    points = hosts.insertion_points(entry)
    if points is None or points.attention.norm is None or len(points.projections) != 3:
        raise ValueError(
            f"layer {number}, a {type(entry).__name__}, is not built as those of {_KNOWN}: attention and an MLP, each "
            "behind a norm, with layers for queries, keys and values. Token reduction has to know them."
        )
    outer, _, attention = points.attention.module.rpartition(".")
    layer = entry.get_submodule(outer)
    branches = (points.attention, points.feed_forward)
    norms, scales = (
        tuple(name and name.rpartition(".")[2] for name in names)
        for names in ((branch.norm for branch in branches), (branch.scale for branch in branches))
    )
    drop = next((name for name in ("dropout", "drop_path") if name in dict(layer.named_children())), None)
    return layer, Parts(attention, points.feed_forward.module.rpartition(".")[2], norms, scales, drop)


def _is(module: nn.Module, names: frozenset[str]) -> bool:
    return any(cls.__name__ in names for cls in _transformers_classes(module))


def _transformers_classes(module: nn.Module) -> list[type]:
    """List the classes of models that transformers has itself, without the common ones for all models of a kind."""
    return [
        cls
        for cls in type(module).__mro__
        if cls.__module__.startswith("transformers.models.") and not cls.__name__.endswith("PreTrainedModel")
    ]


def _none_in(model: nn.Module) -> str:
    for module in model.modules():
        for cls in _transformers_classes(module):
            if cls.__name__.endswith("Backbone"):
                return f"{cls.__name__} gives feature maps, in which each patch has its place: it cannot lose tokens."
            for start, reason in _REFUSED.items():
                if cls.__name__.startswith(start):
                    return f"{cls.__name__} {reason}: it cannot lose tokens. Token reduction fits {_KNOWN}."
    return (
        f"{type(model).__name__} has no vision transformer of transformers that fishkern knows, with image patches and "
        f"a class token: token reduction fits {_KNOWN}."
    )
