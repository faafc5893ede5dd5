"""Adapters that PEFT lacks: small trained modules inside the layers of a frozen transformer.

An adapter is a frozen recipe. :func:`attach` puts its modules around parts of the model, as PEFT does: each part
becomes the ``base_layer`` of its wrapper, with its own weights and code. :func:`detach` takes the wrappers out again.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from json import dumps
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fishkern import hosts
from fishkern.files import Format, in_brief, open_tensors, parsing, read_json, save_tensors
from fishkern.selection.start import misfit

FORMAT = Format("fishkern.adapter", version=1, saved_by="fishkern.adapters.save")


class Wrapper(hosts.Wrapper):
    """A wrapper whose own parameters are trained."""


@dataclass(frozen=True)
class Adapter(ABC):
    """A recipe: which modules to put into which layers.

    Args:
        layers: Numbers of the layers, from the input, starting at 0; ``None`` for all.
    """

    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))

    @abstractmethod
    def wrappers(self, layer: nn.Module, points: hosts.InsertionPoints) -> dict[str, Wrapper]:
        """Make the modules for one layer.

        Args:
            layer: The layer.
            points: The paths of its parts.

        Returns:
            Wrappers by the path of the part, inside the layer, that each is made around.

        Raises:
            ValueError: The layer lacks a part that the adapter needs.
        """


def attach(
    model: nn.Module,
    adapter: Adapter,
    *,
    stack: str | None = None,
    train: tuple[str, ...] = hosts.HEADS,
    seed: int = 0,
) -> list[str]:
    """Put an adapter into a model, and freeze everything else but the head.

    Args:
        model: A transformer, changed in place.
        adapter: The recipe.
        stack: Path of the list of layers, such as ``"vision_model.encoder.layers"``; ``None`` if there is only one.
        train: Names of modules that are also trained: the head, by its usual names.
        seed: Seed of the adapter's first values; the global generators are left alone.

    Returns:
        Canonical names of the adapter's parameters, in the model's order.

    Raises:
        ValueError: The model already has an adapter; it has no layers, or several lists of them and ``stack`` names
            none; its layers are of no known kind, or lack a part that the adapter needs; or ``adapter.layers``
            contains a number that they do not have.
    """
    if any(isinstance(module, Wrapper) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} already has an adapter: detach it first.")
    path, layers = hosts.stack_of(model, stack)
    numbers = range(len(layers)) if adapter.layers is None else adapter.layers
    if outside := [number for number in numbers if not 0 <= number < len(layers)]:
        raise ValueError(f"{path} has the layers 0 to {len(layers) - 1}, and the adapter names {outside}.")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # that of the CPU: only it is restored
        wrappers = {number: adapter.wrappers(layers[number], _points(layers[number], model)) for number in numbers}
    model.requires_grad_(False)
    for number, inside in wrappers.items():
        for wrapper in inside.values():
            like = next(parameter for parameter in wrapper.base_layer.parameters() if parameter.is_floating_point())
            wrapper.to(like.device, like.dtype)
        hosts.insert(layers[number], inside)
    names = adapter_parameters(model)
    for name, parameter in hosts.named_parameters(model).items():
        if name in names or hosts.is_head(name, train):
            parameter.requires_grad_(True)
    return names


def detach(model: nn.Module) -> None:
    """Take the adapter out; the base model's parameters stay frozen.

    Args:
        model: Changed in place.
    """
    hosts.remove(model, Wrapper)


def adapter_parameters(model: nn.Module) -> list[str]:
    """List the parameters of an attached adapter.

    Args:
        model: A model.

    Returns:
        Canonical names, in the model's order.
    """
    own = {
        parameter
        for module in model.modules()
        if isinstance(module, Wrapper)
        for name, parameter in module.named_parameters()
        if not name.startswith("base_layer.")
    }
    return [name for name, parameter in hosts.named_parameters(model).items() if parameter in own]


def gates(model: nn.Module) -> list[str]:
    """List the parameters of an attached adapter's gates, which only scale its other parts.

    Args:
        model: A model.

    Returns:
        Canonical names, in the model's order.
    """
    return [name for name in adapter_parameters(model) if "gate" in name.split(".")]


def save(model: nn.Module, adapter: Adapter, path: str | os.PathLike[str]) -> Path:
    """Save an attached adapter, with the head and all other trained parameters.

    Args:
        model: The model.
        adapter: The recipe that was attached.
        path: ``name.safetensors``.

    Returns:
        The file.

    Raises:
        ValueError: No adapter is attached.
    """
    if not adapter_parameters(model):
        raise ValueError(f"{type(model).__name__} has no adapter to save: attach one first.")
    tensors = {name: value.detach() for name, value in hosts.named_parameters(model).items() if value.requires_grad}
    return save_tensors(path, tensors, format=FORMAT, metadata={"adapter": dumps(_described(adapter))})


def load(model: nn.Module, path: str | os.PathLike[str]) -> Adapter:
    """Attach a saved adapter to a base model, and load the saved values of all trained parameters.

    Args:
        model: The base model without an adapter, changed in place.
        path: What :func:`save` wrote.

    Returns:
        The recipe.

    Raises:
        ValueError: The model lacks a saved parameter, or has it in another shape. The model is then as it was.
    """
    metadata, stored = open_tensors(path, format=FORMAT)
    with parsing(f"{path} has a damaged header"):
        adapter = _from_description(read_json(metadata["adapter"]))
        _check_sizes(adapter, {size for tensor in stored.values() for size in tensor.shape})
    if odd := [name for name, tensor in stored.items() if not tensor.dtype.is_floating_point]:
        raise ValueError(f"{path} holds {in_brief(odd[0], 80)} as {stored[odd[0]].dtype}, and an adapter is floating.")
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    attach(model, adapter, stack=_stack(model, stored), train=())
    named = hosts.named_parameters(model)
    for name, tensor in stored.items():
        if reason := misfit(name, tensor.shape, named, model):
            detach(model)
            for parameter, requires in required.items():
                parameter.requires_grad_(requires)
            raise ValueError(f"{path} {reason}.")
    with torch.no_grad():
        for name, tensor in stored.items():
            named[name].copy_(tensor.read())
            named[name].requires_grad_(True)
    return adapter


def _points(layer: nn.Module, model: nn.Module) -> hosts.InsertionPoints:
    points = hosts.insertion_points(layer)
    if points is None:
        raise ValueError(
            f"fishkern finds no attention and feed-forward part in {type(layer).__name__}, a layer of "
            f"{type(model).__name__}: use one of PEFT's adapters, such as LoRA."
        )
    return points


def _stack(model: nn.Module, names: Iterable[str]) -> str | None:
    """Find the one list of layers that these parameters are in."""
    used = {layer.stack for layer in hosts.layer_of(names).values() if layer} & hosts.stacks(model).keys()
    return used.pop() if len(used) == 1 else None


def _described(adapter: Adapter) -> dict[str, Any]:
    return {"type": type(adapter).__name__, **asdict(adapter)}


def _from_description(described: Any) -> Adapter:
    settings = dict(described)
    cls = {known.__name__: known for known in Adapter.__subclasses__()}.get(settings.pop("type", ""))
    if cls is None or settings.keys() != {field.name for field in fields(cls)}:
        raise ValueError(f"an adapter that this fishkern does not know, {described!r}: update fishkern")
    if (layers := settings["layers"]) is not None and not all(type(number) is int for number in layers):
        raise ValueError(f"layers have numbers, got {layers!r}")
    return cls(**settings)


def _check_sizes(adapter: Adapter, stored: set[int]) -> None:
    """Check that every size is a size of a stored tensor, before memory is allocated for it."""
    for field in fields(adapter):
        value = getattr(adapter, field.name)
        if field.type == "int" and not (type(value) is int and 0 <= value <= max(stored, default=0)):
            raise ValueError(f"{field.name} is {value!r}, and no tensor has this size")
        if field.type == "float" and not (type(value) in (int, float) and isfinite(value)):
            raise ValueError(f"{field.name} is a number, got {value!r}")
