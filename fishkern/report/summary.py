"""Where scores and selected coordinates lie: sums by layer and type of module, and the distribution of the scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from fishkern.files import AnyTensor, pieces
from fishkern.report.parts import Layout, Place
from fishkern.selection import Selection
from fishkern.selection.ranking import topk
from fishkern.statistics import Statistics

_BINS = 2**16  # a float32 above zero sorts as its bits do; it is counted by the upper half of them


@dataclass
class Part:
    """Scores of one part of a model.

    Attributes:
        coordinates: How many entries it has.
        selected: How many of them are selected, or among the largest of the whole.
        sum: Sum of the scores that are finite.
        infinite: How many entries are infinite, or above all of float32.
    """

    coordinates: int = 0
    selected: int = 0
    sum: float = 0.0
    infinite: int = 0

    @property
    def mean(self) -> float:
        """Mean score of the entries that are finite."""
        finite = self.coordinates - self.infinite
        return self.sum / finite if finite else 0.0

    @property
    def density(self) -> float:
        """Which part of the entries is selected."""
        return self.selected / self.coordinates if self.coordinates else 0.0

    def add(self, other: Part) -> None:
        """Take another part in.

        Args:
            other: What to add.
        """
        self.coordinates += other.coordinates
        self.selected += other.selected
        self.sum += other.sum
        self.infinite += other.infinite


@dataclass
class Parts:
    """A model's parts.

    Attributes:
        cells: Each layer and type of module, in the model's order; layer ``None`` is outside the layers.
        parameters: Each parameter, by its name.
    """

    cells: dict[Place, Part]
    parameters: dict[str, Part]

    @classmethod
    def of(cls, parameters: dict[str, Part], *rest: Any) -> Self:
        """Gather parameters into layers and types of module.

        Args:
            parameters: Each parameter's own, by its name.
            rest: What else a subclass holds.

        Returns:
            The parts.
        """
        layout = Layout(parameters)
        cells: dict[Place, Part] = {}
        for name, part in parameters.items():
            cells.setdefault(layout[name], Part()).add(part)
        return cls(cells, parameters, *rest)

    @property
    def whole(self) -> Part:
        """Everything."""
        return self._grouped(lambda _: "").get("", Part())

    @property
    def layers(self) -> dict[str, Part]:
        """Sums by layer; what lies outside the layers stands under its module's name."""
        return self._grouped(lambda place: place.layer or place.module)

    @property
    def modules(self) -> dict[str, Part]:
        """Sums by type of module."""
        return self._grouped(lambda place: place.module)

    def _grouped(self, label: Callable[[Place], str]) -> dict[str, Part]:
        groups: dict[str, Part] = {}
        for place, part in self.cells.items():
            groups.setdefault(label(place), Part()).add(part)
        return groups

    def to_dict(self) -> dict[str, Any]:
        """Say it in plain values.

        Returns:
            What JSON can hold.
        """

        def plain(part: Part) -> dict[str, Any]:
            return {**vars(part), "mean": part.mean, "density": part.density}

        return {
            "whole": plain(self.whole),
            "layers": {name: plain(part) for name, part in self.layers.items()},
            "modules": {name: plain(part) for name, part in self.modules.items()},
            "parameters": {name: plain(part) for name, part in self.parameters.items()},
        }


@dataclass
class Summary(Parts):
    """What :func:`summarise` finds; in its parts, selected means among the top.

    Attributes:
        density: Fraction of the entries that is called the top.
        threshold: The smallest score among the top; ``None`` where it is not known, or infinite.
        edges: Limits of the bins of the distribution, ``[B + 1]``, float64, equal steps of the logarithm.
        counts: Number of entries in each bin, ``[B]``.
        zeros: Number of entries that are zero, which no bin holds.
        negative: Number of entries below zero, which no bin holds; an infinite one is in none, either.
    """

    density: float
    threshold: float | None
    edges: Tensor
    counts: Tensor
    zeros: int
    negative: int

    def to_dict(self) -> dict[str, Any]:
        return {
            "density": self.density,
            "threshold": self.threshold,
            "zeros": self.zeros,
            "negative": self.negative,
            **super().to_dict(),
            "distribution": {"edges": self.edges.tolist(), "counts": self.counts.tolist()},
        }


def summarise(
    scores: Mapping[str, Tensor], density: float = 0.005, report: Callable[[int, int], None] | None = None
) -> Summary:
    """Sum scores by layer and by type of module, count their distribution, and find the largest.

    Reads every entry twice, one piece in memory at a time; lazily loaded statistics are read from disk.

    Args:
        scores: Statistics, or floating tensors by parameter name.
        density: Fraction of the entries that is called the top, in (0, 1].
        report: Told how many entries were counted, and how many there are.

    Returns:
        The summary.

    Raises:
        ValueError: ``density`` is out of range, there is no entry, or one is NaN; its parameter is named.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}.")
    blocks: Mapping[str, AnyTensor] = scores.blocks if isinstance(scores, Statistics) else scores
    size = sum(block.numel() for block in blocks.values())
    if not size:
        raise ValueError("there is nothing to summarise: no parameter has an entry.")
    indices, threshold = topk(blocks, max(1, int(density * size)), "largest", None)
    parameters: dict[str, Part] = {}
    counts = torch.zeros(_BINS, dtype=torch.long)
    read = below = negative = 0
    for name, block in blocks.items():
        part = parameters[name] = Part(block.numel(), len(indices[name]))
        for piece in pieces(block):
            read += piece.numel()
            if infinite := int((beyond := piece.float().isinf()).sum()):
                part.infinite += infinite
                piece = piece[~beyond]
            bits = torch.where(piece > 0, piece, 0.0).float().cpu().view(torch.int32)
            counts += (bits >> 16).bincount(minlength=_BINS)
            below += int((bits == 0).sum())
            negative += int((piece < 0).sum())
            part.sum += piece.sum(dtype=torch.float64).item()
            if report:
                report(read, size)
    counts[0] -= below
    threshold = threshold if threshold is not None and math.isfinite(threshold) else None
    return Summary.of(parameters, density, threshold, *_distribution(counts), below - negative, negative)


def locate(selection: Selection) -> Parts:
    """Count what is selected by layer and by type of module.

    Args:
        selection: Which coordinates.

    Returns:
        The parts of its pool; they carry no scores.
    """
    counts = selection.counts.items()
    return Parts.of({name: Part(selection.shapes[name].numel(), count) for name, count in counts})


def _distribution(counts: Tensor, per_decade: int = 8) -> tuple[Tensor, Tensor]:
    """Gather counts by the upper halves of float32 into bins of equal steps of the logarithm."""
    filled = counts.nonzero().flatten()
    if not len(filled):
        return torch.ones(1, dtype=torch.float64), torch.zeros(0, dtype=torch.long)
    # the middle of what one upper half stands for: 128 of them in each factor of two
    values = ((filled.int() << 16) + _BINS // 2).view(torch.float32).double()
    places = (values.log10() * per_decade).floor().long()
    first, last = int(places.min()), int(places.max())
    gathered = torch.zeros(last - first + 1, dtype=torch.long).index_add_(0, places - first, counts[filled])
    edges = 10 ** (torch.arange(first, last + 2, dtype=torch.float64) / per_decade)
    return edges, gathered
