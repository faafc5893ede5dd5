"""Adapters that PEFT lacks: small trained modules inside the layers of a frozen transformer.

An adapter is a frozen recipe. :func:`attach` puts its modules around chosen parts of the model, as PEFT does: what
stood there lives on as ``base_layer``, with its own weights and code. :func:`detach` takes them out again.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, fields
from json import dumps
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fishkern import hosts
from fishkern.files import Format, in_brief, open_tensors, parsing, read_json, save_tensors

FORMAT = Format("fishkern.adapter", version=1, saved_by="fishkern.adapters.save")


@dataclass(frozen=True)
class Places:
    """Where a transformer layer has what adapters wrap, as paths inside the layer.

    Attributes:
        attention: Projects, attends, and takes ``attention_mask`` and ``past_key_values`` by keyword.
        query_key_value: Its three projections.
        attention_output: The linear behind it, in front of the residual.
        feed_forward_output: The second linear of the feed-forward part.
    """

    attention: str
    query_key_value: tuple[str, str, str]
    attention_output: str
    feed_forward_output: str


_PLACES = (
    Places(  # BERT and what is built like it: RoBERTa, ELECTRA, CamemBERT, XLM-R, the MiniLMs
        "attention.self",
        ("attention.self.query", "attention.self.key", "attention.self.value"),
        "attention.output.dense",
        "output.dense",
    ),
    Places(  # LLaMA and what is built like it: Mistral, Qwen, Gemma
        "self_attn",
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attn.o_proj",
        "mlp.down_proj",
    ),
)


class Wrapper(nn.Module):
    """A trained module around a part of the model, which lives on as ``base_layer``."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer


@dataclass(frozen=True)
class Adapter(ABC):
    """What is put into which layers.

    Args:
        layers: Numbers of the layers, from the bottom; ``None`` for all.
    """

    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))

    @abstractmethod
    def wrappers(self, layer: nn.Module, places: Places) -> dict[str, Wrapper]:
        """Make the modules for one layer.

        Args:
            layer: The layer.
            places: Where it has what.

        Returns:
            What shall stand at a path inside the layer, around what stands there.
        """


def attach(model: nn.Module, adapter: Adapter, *, train: tuple[str, ...] = hosts.HEADS, seed: int = 0) -> list[str]:
    """Put an adapter into a model, and freeze everything else but the head.

    Args:
        model: A transformers model of the BERT or LLaMA family, changed in place.
        adapter: The recipe.
        train: Names of modules that are trained besides: the head, by its usual names.
        seed: Seed of the adapter's first values; the global generators are left alone.

    Returns:
        The adapter's parameters by canonical name, in the model's order.

    Raises:
        ValueError: The model already has an adapter, none of its layers is of a known kind, or ``adapter.layers``
            names one that it lacks.
    """
    if any(isinstance(module, Wrapper) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} already has an adapter: detach it first.")
    prefix, blocks = transformer_layers(model)
    places = places_of(blocks[0], model)
    chosen = range(len(blocks)) if adapter.layers is None else adapter.layers
    if outside := [number for number in chosen if not 0 <= number < len(blocks)]:
        raise ValueError(f"{prefix} has the layers 0 to {len(blocks) - 1}, and the adapter names {outside}.")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # that of the CPU: only it is restored
        made = {number: adapter.wrappers(blocks[number], places) for number in chosen}
    model.requires_grad_(False)
    for number, wrappers in made.items():
        for path, wrapper in wrappers.items():
            like = next(parameter for parameter in wrapper.base_layer.parameters() if parameter.is_floating_point())
            wrapper.to(like.device, like.dtype)
            blocks[number].set_submodule(path, wrapper)
    names = adapter_parameters(model)
    for name, parameter in hosts.named_parameters(model).items():
        if name in names or hosts.is_head(name, train):
            parameter.requires_grad_(True)
    return names


def detach(model: nn.Module) -> None:
    """Take the adapter out; the base model's parameters stay frozen as they are.

    Args:
        model: Changed in place.
    """
    while wrapped := [(path, module) for path, module in model.named_modules() if isinstance(module, Wrapper)]:
        path, wrapper = wrapped[0]
        model.set_submodule(path, wrapper.base_layer)


def adapter_parameters(model: nn.Module) -> list[str]:
    """List the parameters that an attached adapter has brought.

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
    """List the parameters of an attached adapter that only say how much of it comes through.

    Args:
        model: A model.

    Returns:
        Canonical names, in the model's order.
    """
    return [name for name in adapter_parameters(model) if "gate" in name.split(".")]


def save(model: nn.Module, adapter: Adapter, path: str | os.PathLike[str]) -> Path:
    """Save an attached adapter, with the head and whatever else is trained.

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
    """Attach a saved adapter to a base model and give everything that was trained its saved value.

    Args:
        model: The base model without an adapter, changed in place.
        path: What :func:`save` wrote.

    Returns:
        The recipe.

    Raises:
        ValueError: The model lacks a saved parameter, or has it in another shape; the model is then as it was, but for
            what is frozen.
    """
    metadata, stored = open_tensors(path, format=FORMAT)
    with parsing(f"{path} has a damaged header"):
        adapter = _from_description(read_json(metadata["adapter"]))
        _check_sizes(adapter, {size for tensor in stored.values() for size in tensor.shape})
    if odd := [name for name, tensor in stored.items() if not tensor.dtype.is_floating_point]:
        raise ValueError(f"{path} holds {in_brief(odd[0], 80)} as {stored[odd[0]].dtype}, and an adapter is floating.")
    attach(model, adapter, train=())
    named = hosts.named_parameters(model)
    for name, tensor in stored.items():
        if name not in named or named[name].shape != tensor.shape:
            detach(model)
            has = f"has it as {tuple(named[name].shape)}" if name in named else "has no such parameter"
            shown = f"{in_brief(name, 80)} {tuple(tensor.shape)}"
            raise ValueError(f"{path} holds {shown}, and {type(model).__name__} {has}.")
    with torch.no_grad():
        for name, tensor in stored.items():
            named[name].copy_(tensor.read())
            named[name].requires_grad_(True)
    return adapter


def transformer_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Find the layers of a transformer: its longest list of modules of one class.

    Args:
        model: A model.

    Returns:
        The path of the list, and the list.

    Raises:
        ValueError: It has none.
    """
    lists = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len({type(block) for block in module}) == 1
    ]
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of layers to put an adapter into.")
    return max(lists, key=lambda found: len(found[1]))


def places_of(layer: nn.Module, model: nn.Module) -> Places:
    """Recognise what a layer has where.

    Args:
        layer: One layer.
        model: Its model, for the message.

    Returns:
        The places.

    Raises:
        ValueError: The layer is of no known kind.
    """
    paths = {path for path, _ in layer.named_modules()}
    for places in _PLACES:
        parts = {places.attention, *places.query_key_value, places.attention_output, places.feed_forward_output}
        if parts <= paths:
            return places
    raise ValueError(
        f"the layers of {type(model).__name__} ({type(layer).__name__}) are built neither like BERT's nor like "
        "LLaMA's: take one of PEFT's adapters, such as LoRA."
    )


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
    """Demand that every size is that of a stored tensor, before memory is taken for it."""
    for field in fields(adapter):
        value = getattr(adapter, field.name)
        if field.type == "int" and not (type(value) is int and 0 <= value <= max(stored, default=0)):
            raise ValueError(f"{field.name} is {value!r}, and no tensor has this size")
        if field.type == "float" and not (type(value) in (int, float) and isfinite(value)):
            raise ValueError(f"{field.name} is a number, got {value!r}")
