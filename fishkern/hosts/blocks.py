"""Which transformer layer a parameter belongs to: one count for every room.

Files of statistics and selections know a model by the names of its parameters only, so the count reads names. A model
gives the same answer, because it is asked for its names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from torch import nn

from fishkern.hosts.tasks import is_head
from fishkern.hosts.wrappers import named_parameters, unwrap
from fishkern.names import listed, without_wrappers

Role = Literal["vision", "text", "decoder", "encoder"]

# Names of lists of layers.
_LISTS = frozenset({"layers", "layer", "h", "blocks", "block", "resblocks", "albert_layers"})

# A word in the path of a stack says what the stack is for. The order matters: the vision tower of CLIP is
# vision_model.encoder.layers.
_ROLES: tuple[tuple[str, Role], ...] = (
    ("vision", "vision"),
    ("visual", "vision"),
    ("text", "text"),
    ("language", "text"),
    ("decoder", "decoder"),
    ("encoder", "encoder"),
)


@dataclass(frozen=True)
class Layer:
    """The place of one transformer layer in a model; not a layer rule (:class:`fishkern.layers.Layer`).

    Attributes:
        stack: Path of the list that the layer is in: ``"model.layers"``, ``"encoder.block"``. A model with an encoder
            and a decoder has two, CLIP one for images and one for text, Swin one for each stage.
        number: Its number in the stack, from the input, starting at 0.
        count: Number of layers in the stack.
    """

    stack: str
    number: int
    count: int

    @property
    def path(self) -> str:
        """Path of the layer's module, ``"model.layers.3"``."""
        return f"{self.stack}.{self.number}"

    @property
    def role(self) -> Role | None:
        """What the stack is for, by the words in its path; ``None`` if they do not say, as in LLaMA and ViT."""
        words = re.split(r"[._]", self.stack)
        return next((role for word, role in _ROLES if word in words), None)


def layer_of(model: nn.Module | Iterable[str]) -> dict[str, Layer | None]:
    """Find the layer that each parameter belongs to.

    A layer is a numbered entry of a list of layers (``layers``, ``layer``, ``h``, ``blocks``, ...: ``_LISTS``), of the
    outermost one in a name, and not in a head. Lists inside a layer (experts, the sub-layers of T5) do not count. The
    stages of Swin are no layers: each is a list of layers, and its other modules are in none.

        layers = hosts.layer_of(model)
        layers["model.layers.3.mlp.up_proj.weight"]  # Layer(stack="model.layers", number=3, count=32)
        layers["lm_head.weight"]  # None

    Args:
        model: A model, wrapped or not, or names of parameters or modules in it.

    Returns:
        The layer of each name, or ``None`` outside the layers: embeddings, final norm, head. A shared parameter is
        there under all its names. Without the model, the count of a stack is its highest number plus 1.
    """
    if not isinstance(model, nn.Module):
        return _by_name(model)
    layers = _by_name(named_parameters(model, remove_duplicate=False))
    # counted by the model as well, where the last layers have no parameters
    lengths = {path: len(blocks) for path, blocks in _lists(model, layers.values()).items()}
    return {
        name: layer and replace(layer, count=max(layer.count, lengths.get(layer.stack, 0)))
        for name, layer in layers.items()
    }


def stacks(model: nn.Module) -> dict[str, list[nn.Module]]:
    """Collect the layers of a model.

    Args:
        model: A model, wrapped or not.

    Returns:
        The layers of each stack in order, by :attr:`Layer.stack`, in the model's order; empty if it has none.
    """
    return _lists(model, _by_name(named_parameters(model, remove_duplicate=False)).values())


def stack_of(model: nn.Module, path: str | None = None) -> tuple[str, list[nn.Module]]:
    """Get the layers of one stack of a model.

    Args:
        model: A model, wrapped or not.
        path: The stack's path; ``None`` if the model has only one.

    Returns:
        The stack's path, and its layers in order.

    Raises:
        ValueError: The model has no layers, no stack of this path, or several stacks and ``path`` is ``None``.
    """
    name, by_path = type(unwrap(model)).__name__, stacks(model)
    if not by_path:
        raise ValueError(
            f"{name} has no list of layers: none of its parameters is in a numbered entry of a list called "
            f"{', '.join(sorted(_LISTS))}."
        )
    if path is None and len(by_path) > 1:
        raise ValueError(f"{name} has several lists of layers, {listed(by_path)}: choose one with stack=.")
    path = next(iter(by_path)) if path is None else path
    if path not in by_path:
        raise ValueError(f"{name} has no list of layers {path!r}; it has {listed(by_path)}.")
    return path, by_path[path]


def _by_name(names: Iterable[str]) -> dict[str, Layer | None]:
    entries = {name: _entry(name) for name in names}
    stages = {entry.outer for entry in entries.values() if entry and entry.outer != entry.stack}
    counts: dict[str, int] = {}
    for entry in filter(None, entries.values()):
        counts[entry.stack] = max(counts.get(entry.stack, 0), entry.number + 1)
    return {
        name: Layer(entry.stack, entry.number, counts[entry.stack]) if entry and entry.stack not in stages else None
        for name, entry in entries.items()
    }


class _ListEntry(NamedTuple):
    outer: str  # the list itself, or the list of stages around it
    stack: str
    number: int


def _entry(name: str) -> _ListEntry | None:
    """Read the outermost numbered list in a path, without knowing the other names."""
    path = name.split(".")
    outer = next((i for i in range(1, len(path)) if path[i].isdecimal() and path[i - 1] in _LISTS), None)
    if outer is None or is_head(".".join(path[: outer + 1])):
        return None
    is_stage = path[outer + 1 : outer + 2] == ["blocks"] and "".join(path[outer + 2 : outer + 3]).isdecimal()
    inner = outer + 2 if is_stage else outer
    return _ListEntry(".".join(path[:outer]), ".".join(path[:inner]), int(path[inner]))


def _lists(model: nn.Module, layers: Iterable[Layer | None]) -> dict[str, list[nn.Module]]:
    """Collect the modules of the stacks that these layers are in."""
    wanted = {layer.stack for layer in layers if layer}
    lists: dict[str, list[nn.Module]] = {}
    for path, module in unwrap(model).named_modules():
        if (stack := without_wrappers(path)) in wanted:
            entries = module._modules.items()  # named_children would leave out a layer that is there twice
            lists[stack] = [layer for name, layer in entries if layer is not None and name.isdecimal()]
    return lists
