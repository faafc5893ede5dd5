"""Trained values by layer and type of module, and how far they moved: sums over a delta or a start."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fishkern.report.cells import cells_of
from fishkern.selection import Delta


@dataclass
class Held:
    """Values of one part of a model.

    Attributes:
        coordinates: Number of entries.
        values: Number of entries that have a value.
        largest: Largest magnitude of the values.
        moved: Number of values that differ from those before training; ``None`` if these are not known.
        largest_move: Largest magnitude of these differences; ``None`` likewise.
        infinite: Number of values that are infinite or NaN; the maxima leave them out.
    """

    coordinates: int = 0
    values: int = 0
    largest: float = 0.0
    moved: int | None = None
    largest_move: float | None = None
    infinite: int = 0

    def add(self, other: Held) -> None:
        """Add another part to this one.

        Args:
            other: The other part.
        """
        self.coordinates += other.coordinates
        self.values += other.values
        self.infinite += other.infinite
        self.largest = max(self.largest, other.largest)
        if other.moved is not None:
            self.moved = (self.moved or 0) + other.moved
            self.largest_move = max(self.largest_move or 0.0, other.largest_move or 0.0)


@dataclass
class Values:
    """The result of :func:`held_values`.

    Attributes:
        parameters: Parts by parameter name.
    """

    parameters: dict[str, Held]

    @property
    def whole(self) -> Held:
        """Sum over the model."""
        return self._grouped(lambda _: "").get("", Held())

    @property
    def layers(self) -> dict[str, Held]:
        """Sums by layer, and outside the layers by module."""
        cells = cells_of(self.parameters)
        return self._grouped(lambda name: cells[name].layer or cells[name].module)

    @property
    def modules(self) -> dict[str, Held]:
        """Sums by type of module."""
        cells = cells_of(self.parameters)
        return self._grouped(lambda name: cells[name].module)

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain values.

        Returns:
            Dictionaries and numbers, for JSON.
        """
        groups = {"layers": self.layers, "modules": self.modules, "parameters": self.parameters}
        plain = {group: {name: asdict(held) for name, held in parts.items()} for group, parts in groups.items()}
        return {"whole": asdict(self.whole), **plain}

    def _grouped(self, label: Callable[[str], str]) -> dict[str, Held]:
        groups: dict[str, Held] = {}
        for name, held in self.parameters.items():
            groups.setdefault(label(name), Held()).add(held)
        return groups


def held_values(values: Delta | Mapping[str, Tensor], start: Mapping[str, Tensor] | None = None) -> Values:
    """Sum up the values of a delta or of a start.

    Args:
        values: A delta, or tensors by parameter name.
        start: The parameters of the delta before training, whole, by name.

    Returns:
        The sums.

    Raises:
        ValueError: ``start`` lacks a parameter of the delta, or has it with another shape.
    """
    if not isinstance(values, Delta):
        return Values({name: _held(tensor.numel(), tensor, None) for name, tensor in values.items()})
    parts = {}
    for name, shape in values.selection.shapes.items():
        count = values.selection.counts[name]
        trained = values.values(name) if count else torch.empty(0)
        before = None
        if start is not None:
            if name not in start or start[name].shape != shape:
                has = f"as {tuple(start[name].shape)}" if name in start else "not at all"
                raise ValueError(
                    f"the delta holds {name} {tuple(shape)}, and the start has it {has}: it is another run's start."
                )
            before = start[name].flatten()[values.selection.indices(name).long()]
        parts[name] = _held(shape.numel(), trained, before)
    return Values(parts)


def _held(coordinates: int, values: Tensor, before: Tensor | None) -> Held:
    values = values.double().flatten()
    held = Held(coordinates, len(values), _largest(values), infinite=int((~values.isfinite()).sum()))
    if before is not None:
        move = values - before.double()
        held.moved, held.largest_move = int((move != 0).sum()), _largest(move)
    return held


def _largest(values: Tensor) -> float:
    finite = values[values.isfinite()]
    largest = finite.abs().max().item() if len(finite) else 0.0
    return largest if math.isfinite(largest) else 0.0
