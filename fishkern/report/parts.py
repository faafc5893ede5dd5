"""From parameter names to the places that people think in: which layer, which type of module."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

Path = tuple[str, ...]


@dataclass(frozen=True)
class Place:
    """Where a parameter stands.

    Attributes:
        layer: ``"layer 3"``, with several stacks ``"decoder.block 3"``; ``None`` outside the layers.
        module: What it belongs to inside its layer, ``"q_proj"`` or ``"attention.output.dense"``; outside, its module.
    """

    layer: str | None
    module: str


class Layout:
    """The places of a model's parameters, labelled as briefly as their names allow.

    A layer is what stands under the first number of a name: ``model.layers.3.mlp.up_proj.weight`` belongs to the stack
    ``model.layers``, the layer 3 and the module ``mlp.up_proj``. Further numbers (experts, sub-layers) are taken
    together as ``*``. A module is called by the shortest end of its path that no other module has.

    Args:
        names: Names of parameters, in the model's order.
    """

    def __init__(self, names: Iterable[str]) -> None:
        split = {name: _split(name) for name in names}
        stacks = _labels(stack for stack, number, _ in split.values() if number is not None)
        modules = _labels(module for _, _, module in split.values())
        self._places = {
            name: Place(None if number is None else _layer(stacks, stack, number), modules[module])
            for name, (stack, number, module) in split.items()
        }

    def __getitem__(self, name: str) -> Place:
        return self._places[name]


def _split(name: str) -> tuple[Path, int | None, Path]:
    """Cut a name into the stack, the number of the layer, and the module inside; the parameter's own name goes."""
    *path, own = name.split(".")
    first = next((place for place, component in enumerate(path) if component.isdecimal()), None)
    stack, number = ((), None) if first is None else (tuple(path[:first]), int(path[first]))
    inside = path if first is None else path[first + 1 :]
    if inside and inside[-1] == "default" and len(inside) > 1:
        inside = inside[:-1]  # PEFT's name of the only adapter
    module = [
        "*" if component.isdecimal() and place < len(inside) - 1 else component
        for place, component in enumerate(inside)
    ]
    return stack, number, tuple(module) or (own,)


def _layer(stacks: dict[Path, str], stack: Path, number: int) -> str:
    return f"layer {number}" if len(stacks) == 1 else f"{stacks[stack]} {number}"


def _labels(paths: Iterable[Path]) -> dict[Path, str]:
    """Name each path by its shortest end that is not the end of another."""
    distinct = list(dict.fromkeys(paths))
    ends = Counter(path[-length:] for path in distinct for length in range(1, len(path) + 1))
    labels = {}
    for path in distinct:
        length = next((n for n in range(1, len(path)) if ends[path[-n:]] == 1), len(path))
        labels[path] = ".".join(path[-length:]) if path else "layer"
    return labels
