"""Put token reduction into a model, and take it out."""

from __future__ import annotations

from torch import nn

from fishkern import hosts
from fishkern.tokens.layer import ReducingLayer, reducing_class
from fishkern.tokens.recipe import TokenReduction
from fishkern.tokens.towers import has_known_forward, layers_of, special_tokens, tower_of


def attach(model: nn.Module, recipe: TokenReduction) -> nn.Module:
    """Make layers of a vision transformer drop tokens, in training and in evaluation.

    Each of the layers becomes an instance of a subclass of its own class. Modules, parameters and their names, hooks
    and ``state_dict`` stay as they are, so a checkpoint is that of the model without reduction: save the recipe beside
    it. The reduced model is another function of the image, and evaluation needs the same recipe.

    Args:
        model: A model of transformers, or one that contains it, changed in place.
        recipe: Which layers, and how many tokens stay.

    Returns:
        ``model``.

    Raises:
        ValueError: The model reduces tokens already; it is of no known kind, or reads patches by their place; or it
            has no such layer. The message says which. The model is then as it was.
        TypeError: ``recipe`` is no :class:`TokenReduction`.
    """
    if not isinstance(recipe, TokenReduction):
        raise TypeError(f"attach takes a TokenReduction, got {type(recipe).__name__}.")
    if reducing_layers(model):
        name = type(hosts.unwrap(model)).__name__
        raise ValueError(f"{name} reduces tokens already: fishkern.tokens.detach it first.")
    tower = tower_of(model)
    special = special_tokens(tower)
    classes = []
    for number, (layer, parts) in layers_of(tower, recipe.layers).items():
        _check_instance(layer, f"layer {number}", "attach before that")
        if recipe.place == "before_mlp" and not has_known_forward(layer):
            raise ValueError(
                f"layer {number}, a {type(layer).__name__}, has a forward pass of its own, into which fishkern cannot "
                "look: place='after_layer' reduces behind it."
            )
        classes.append((layer, reducing_class(type(layer), recipe, parts, special)))
    for layer, cls in classes:
        layer.__class__ = cls
    return model


def detach(model: nn.Module) -> nn.Module:
    """Take token reduction out of a model.

    Args:
        model: Changed in place; one that does not reduce tokens stays as it is.

    Returns:
        ``model``.

    Raises:
        ValueError: Since :func:`attach`, something has replaced a layer's forward pass or its class, as FSDP does. The
            model is then as it was.
    """
    layers = reducing_layers(model)
    for path, layer in layers.items():
        _check_instance(layer, path, "undo that first")
        if ReducingLayer not in type(layer).__bases__:
            name = type(layer).__name__
            raise ValueError(f"the class of {path} has been changed to {name}, as FSDP does: detach before that.")
    for layer in layers.values():
        layer.__class__ = type(layer).original
    return model


def attached(model: nn.Module) -> TokenReduction | None:
    """Get the recipe that a model reduces tokens by.

    Args:
        model: A model.

    Returns:
        The recipe, ``None`` if the model does not reduce tokens.

    Raises:
        ValueError: Parts of it do so by different recipes.
    """
    recipes = {layer.recipe for layer in reducing_layers(model).values()}
    if len(recipes) > 1:
        raise ValueError(f"parts of {type(model).__name__} reduce tokens by {len(recipes)} recipes: ask for one part.")
    return next(iter(recipes), None)


def reducing_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Find the layers that reduce tokens.

    Args:
        model: A model.

    Returns:
        By path, in the order in which they run.
    """
    return {path: module for path, module in model.named_modules() if isinstance(module, ReducingLayer)}


def _check_instance(layer: nn.Module, name: str, remedy: str) -> None:
    if "forward" in vars(layer):
        raise ValueError(
            f"{name} has a forward pass set on the module itself, as by accelerate's hooks for device maps: {remedy}."
        )
