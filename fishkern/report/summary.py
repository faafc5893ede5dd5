"""Scores and selected coordinates by layer and type of module, and the distribution of the scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fishkern.files import AnyTensor, pieces
from fishkern.report.grouped import Grouped
from fishkern.selection import Selection
from fishkern.selection.ranking import topk
from fishkern.statistics import Statistics

_BINS = 2**16  # positive float32 values sort like their bits; the upper 16 of these are the bin


@dataclass
class Part:
    """Scores of one part of a model.

    Attributes:
        coordinates: Number of entries.
        selected: Number of entries that are selected, or among the largest of the model.
        sum: Sum of the finite scores.
        infinite: Number of entries that are infinite, or too large for float32.
    """

    coordinates: int = 0
    selected: int = 0
    sum: float = 0.0
    infinite: int = 0

    @property
    def mean(self) -> float:
        """Mean of the finite scores."""
        finite = self.coordinates - self.infinite
        return self.sum / finite if finite else 0.0

    @property
    def density(self) -> float:
        """Fraction of the entries that is selected."""
        return self.selected / self.coordinates if self.coordinates else 0.0

    def add(self, other: Part) -> None:
        """Add another part to this one.

        Args:
            other: The other part.
        """
        self.coordinates += other.coordinates
        self.selected += other.selected
        self.sum += other.sum
        self.infinite += other.infinite


@dataclass
class Parts(Grouped[Part]):
    """The parts of a model, with their means and densities among the plain values."""

    @staticmethod
    def _plain(part: Part) -> dict[str, Any]:
        return {**vars(part), "mean": part.mean, "density": part.density}


@dataclass
class Summary(Parts):
    """The result of :func:`summarise`. In its parts, selected means among the top.

    Attributes:
        density: The top, as a fraction of the entries.
        threshold: The smallest score among the top; ``None`` if it is not known, or infinite.
        edges: Edges of the bins of the distribution, ``[B + 1]``, float64, equally spaced in the logarithm.
        counts: Number of entries in each bin, ``[B]``. Zero, negative and infinite entries are in none.
        zeros: Number of entries that are zero.
        negative: Number of entries below zero.
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
    """Sum scores by layer and by type of module, and find their distribution and the largest.

    Reads every entry twice, one piece in memory at a time; lazily loaded statistics are read from disk.

    Args:
        scores: Statistics, or floating tensors by parameter name.
        density: The top, as a fraction of the entries in (0, 1].
        report: Called with the number of entries read so far, and of all.

    Returns:
        The summary.

    Raises:
        ValueError: ``density`` is out of range, there are no entries, or one is NaN; the message names its parameter.
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
    counts[0] -= below  # zeros and negative entries, which were counted as zeros
    threshold = threshold if threshold is not None and math.isfinite(threshold) else None
    return Summary(Part, parameters, density, threshold, *_distribution(counts), below - negative, negative)


def locate(selection: Selection) -> Parts:
    """Count the selected entries by layer and by type of module.

    Args:
        selection: The selection.

    Returns:
        The parts of its pool, without scores.
    """
    counts = selection.counts.items()
    return Parts(Part, {name: Part(selection.shapes[name].numel(), count) for name, count in counts})


def _distribution(counts: Tensor, per_decade: int = 8) -> tuple[Tensor, Tensor]:
    """Merge counts by the upper 16 bits of float32 into bins of equal width in the logarithm."""
    filled = counts.nonzero().flatten()
    if not len(filled):
        return torch.ones(1, dtype=torch.float64), torch.zeros(0, dtype=torch.long)
    # the middle of the values with these upper bits, of which there are 128 ranges in each factor of two
    values = ((filled.int() << 16) + _BINS // 2).view(torch.float32).double()
    bins = (values.log10() * per_decade).floor().long()
    first, last = int(bins.min()), int(bins.max())
    merged = torch.zeros(last - first + 1, dtype=torch.long).index_add_(0, bins - first, counts[filled])
    edges = 10 ** (torch.arange(first, last + 2, dtype=torch.float64) / per_decade)
    return edges, merged
