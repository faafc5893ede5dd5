"""Trained values by layer and type of module, and how far they moved: sums over a delta or a start."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fishkern.report.grouped import Grouped
from fishkern.selection import Delta


@dataclass
class ValuePart:
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

    def add(self, other: ValuePart) -> None:
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


def summarise_values(
    values: Delta | Mapping[str, Tensor], start: Mapping[str, Tensor] | None = None
) -> Grouped[ValuePart]:
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
        return Grouped(ValuePart, {name: _value_part(tensor.numel(), tensor, None) for name, tensor in values.items()})
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
        parts[name] = _value_part(shape.numel(), trained, before)
    return Grouped(ValuePart, parts)


def _value_part(coordinates: int, values: Tensor, before: Tensor | None) -> ValuePart:
    values = values.double().flatten()
    part = ValuePart(coordinates, len(values), _largest(values), infinite=int((~values.isfinite()).sum()))
    if before is not None:
        move = values - before.double()
        part.moved, part.largest_move = int((move != 0).sum()), _largest(move)
    return part


def _largest(values: Tensor) -> float:
    finite = values[values.isfinite()]
    largest = finite.abs().max().item() if len(finite) else 0.0
    return largest if math.isfinite(largest) else 0.0
