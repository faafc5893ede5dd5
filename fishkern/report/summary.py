"""Where a diagonal Fisher lies: sums by layer and type of module, and the distribution of its entries."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fishkern.files import pieces
from fishkern.report.parts import Layout, Place
from fishkern.statistics import Statistics

_HALF = 2**16  # a float32 above zero sorts as its bits do; they are counted half by half


@dataclass
class Part:
    """Scores of one part of a model.

    Attributes:
        coordinates: How many entries it has.
        total: Their sum.
        top: How many of them are among the largest of the whole.
    """

    coordinates: int = 0
    total: float = 0.0
    top: int = 0

    @property
    def mean(self) -> float:
        """Mean score of an entry."""
        return self.total / self.coordinates if self.coordinates else 0.0

    def add(self, other: Part) -> None:
        """Take another part in.

        Args:
            other: What to add.
        """
        self.coordinates += other.coordinates
        self.total += other.total
        self.top += other.top


@dataclass
class Summary:
    """What :func:`summarise` finds.

    Attributes:
        density: Fraction of the entries that is called the top.
        threshold: The smallest score among the top.
        whole: Everything.
        cells: Each layer and type of module, in the model's order; layer ``None`` is outside the layers.
        edges: Limits of the bins of the distribution, ``[B + 1]``, float64, equal steps of the logarithm.
        counts: Number of entries in each bin, ``[B]``.
        zeros: Number of entries that are zero (or below), which no bin holds.
    """

    density: float
    threshold: float
    whole: Part = field(default_factory=Part)
    cells: dict[Place, Part] = field(default_factory=dict)
    edges: Tensor = field(default_factory=lambda: torch.ones(1, dtype=torch.float64))
    counts: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    zeros: int = 0

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
            return {**vars(part), "mean": part.mean}

        return {
            "density": self.density,
            "threshold": self.threshold,
            "zeros": self.zeros,
            "whole": plain(self.whole),
            "layers": {name: plain(part) for name, part in self.layers.items()},
            "modules": {name: plain(part) for name, part in self.modules.items()},
            "distribution": {"edges": self.edges.tolist(), "counts": self.counts.tolist()},
        }


def summarise(
    scores: Mapping[str, Tensor], density: float = 0.005, report: Callable[[int, int], None] | None = None
) -> Summary:
    """Sum scores by layer and by type of module, and count their distribution.

    Reads every entry three times (once to count, once to find the exact threshold of the top, once to count the top),
    one piece in memory at a time; lazily loaded statistics are read from disk.

    Args:
        scores: Statistics, or float tensors by parameter name.
        density: Fraction of the entries that is called the top, in (0, 1].
        report: Told how many entries were read, and how many reads there will be.

    Returns:
        The summary.

    Raises:
        ValueError: ``density`` is out of range, or there is no entry.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}.")
    layout = Layout(scores)
    shapes = scores.shapes if isinstance(scores, Statistics) else {name: t.shape for name, t in scores.items()}
    size = sum(shape.numel() for shape in shapes.values())
    if not size:
        raise ValueError("there is nothing to summarise: no parameter has an entry.")
    k = max(1, int(density * size))
    read = 0

    def walk(name: str) -> Iterator[Tensor]:
        nonlocal read
        for piece in scores.pieces(name) if isinstance(scores, Statistics) else pieces(scores[name]):
            yield piece
            read += piece.numel()
            if report:
                report(read, 3 * size)

    cells: dict[Place, Part] = {}
    high = torch.zeros(_HALF, dtype=torch.long)
    zeros = 0
    for name in scores:
        part = cells.setdefault(layout[name], Part())
        for piece in walk(name):
            bits = _bits(piece)
            high += (bits >> 16).bincount(minlength=_HALF)
            zeros += int((bits == 0).sum())
            part.add(Part(piece.numel(), piece.sum(dtype=torch.float64).item()))
    upper, above = _kth(high, k)
    low = torch.zeros(_HALF, dtype=torch.long)
    for name in scores:
        for piece in walk(name):
            bits = _bits(piece)
            low += (bits[bits >> 16 == upper] & (_HALF - 1)).bincount(minlength=_HALF)
    lower, _ = _kth(low, k - above)
    threshold = torch.tensor((upper << 16) + lower, dtype=torch.int32).view(torch.float32).item()
    for name in scores:
        for piece in walk(name):
            cells[layout[name]].top += int((piece >= threshold).sum())
    high[0] -= zeros
    summary = Summary(density, threshold, cells=cells, zeros=zeros)
    for part in cells.values():
        summary.whole.add(part)
    summary.edges, summary.counts = _distribution(high)
    return summary


def _bits(piece: Tensor) -> Tensor:
    """Read float32 scores as integers of the same order; those that are not above zero become zero."""
    return torch.where(piece > 0, piece, 0.0).float().cpu().view(torch.int32)


def _kth(counts: Tensor, k: int) -> tuple[int, int]:
    """Find the bin of the k-th largest, and how many lie above that bin."""
    from_the_top = counts.flip(0).cumsum(0)
    place = int((from_the_top >= k).nonzero()[0])
    return len(counts) - 1 - place, int(from_the_top[place] - counts.flip(0)[place])


def _distribution(high: Tensor, per_decade: int = 8) -> tuple[Tensor, Tensor]:
    """Gather counts by the upper halves of float32 into bins of equal steps of the logarithm."""
    filled = high.nonzero().flatten()
    if not len(filled):
        return torch.ones(1, dtype=torch.float64), torch.zeros(0, dtype=torch.long)
    # the middle of what one upper half stands for: 128 of them in each factor of two
    values = ((filled.int() << 16) + _HALF // 2).view(torch.float32).double()
    places = (values.log10() * per_decade).floor().long()
    first, last = int(places.min()), int(places.max())
    counts = torch.zeros(last - first + 1, dtype=torch.long).index_add_(0, places - first, high[filled])
    edges = 10 ** (torch.arange(first, last + 2, dtype=torch.float64) / per_decade)
    return edges, counts
