"""The cells of a report: each parameter's row, its layer, and its column, the type of its module."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from fishkern import hosts

Path = tuple[str, ...]


@dataclass(frozen=True)
class Cell:
    """Row and column of a parameter.

    Attributes:
        layer: ``"layer 3"``, or ``"decoder.block 3"`` if there are several lists of layers; ``None`` outside them.
        module: The type of its module: inside a layer ``"q_proj"`` or ``"attention.output.dense"``, outside the module.
    """

    layer: str | None
    module: str


def cells_of(names: Iterable[str]) -> dict[str, Cell]:
    """Find the cell of each parameter, with labels as short as the names allow.

    Layers are counted by :func:`fishkern.hosts.layer_of`. Numbers inside a layer (experts, sub-layers) become ``*``, so
    that these share a column. A module is called by the shortest end of its path that no other module has.

    Args:
        names: Names of parameters, in the model's order.

    Returns:
        The cells by name, in the same order.
    """
    layers = hosts.layer_of(names)
    stacks = _shortest_ends(tuple(layer.stack.split(".")) for layer in layers.values() if layer)
    paths = {name: _module(name, layer) for name, layer in layers.items()}
    modules = _shortest_ends(paths.values())

    def label(layer: hosts.Layer) -> str:
        return f"{stacks[tuple(layer.stack.split('.'))] if len(stacks) > 1 else 'layer'} {layer.number}"

    return {name: Cell(layer and label(layer), modules[paths[name]]) for name, layer in layers.items()}


def _module(name: str, layer: hosts.Layer | None) -> Path:
    """Cut the layer's path, if any, and the parameter's own name off a name."""
    *path, own = (name.removeprefix(f"{layer.path}.") if layer else name).split(".")
    if len(path) > 1 and path[-1] == "default":
        path = path[:-1]  # PEFT's name of the only adapter
    if layer:  # a last number stays: an nn.Sequential has a module for each
        path = ["*" if part.isdecimal() and i < len(path) - 1 else part for i, part in enumerate(path)]
    return tuple(path) or (own,)


def _shortest_ends(paths: Iterable[Path]) -> dict[Path, str]:
    """Label each path by its shortest end that is not the end of another, and does not begin with a number."""
    distinct = list(dict.fromkeys(paths))
    ends = Counter(path[-length:] for path in distinct for length in range(1, len(path) + 1))

    def label(path: Path) -> str:
        unique = (end for n in range(1, len(path)) if ends[end := path[-n:]] == 1 and not end[0].isdecimal())
        return ".".join(next(unique, path))

    return {path: label(path) for path in distinct}
