"""What the readings of a slice are compared with, and how it follows them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fishkern.freezing.histograms import (
    Scale,
    bins_of,
    counts_of,
    distance_between,
    divergence_root,
    edges_of,
    size_of,
    span_of,
    widened,
)
from fishkern.freezing.readings import Factors, Reading
from fishkern.ops.magnitudes import NOT_FINITE

Reference = Literal["values", "factors", "histogram"]
Kept = tuple[Tensor, ...]


@dataclass(frozen=True)
class Follower(ABC):
    """One way to keep a reference; the fields are those of :class:`~fishkern.JensenShannon`.

    Args:
        bins: Bins of large slices.
        scale: Of the histograms.
        within: Both percentiles.
        decay: Of the reference.
    """

    bins: int
    scale: Scale
    within: tuple[float, float]
    decay: float

    @abstractmethod
    def first(self, reading: Reading) -> Kept:
        """Make the reference of a first reading.

        Args:
            reading: The reading, of at least one entry.

        Returns:
            What to keep, in memory of its own.

        Raises:
            ValueError: A value is NaN or infinite.
        """

    @abstractmethod
    def next(self, kept: Kept, reading: Reading) -> tuple[float, Kept]:
        """Compare a reading with the reference, and let the reference follow.

        Args:
            kept: What is kept; not changed.
            reading: The reading.

        Returns:
            The distance, and what to keep.

        Raises:
            ValueError: A value is NaN or infinite, or the reading does not fit the reference.
        """

    def _moved(self, reference: Tensor, current: Tensor) -> Tensor:
        """Compute decay * reference + (1 - decay) * current so that equal values stay equal to the bit."""
        return reference + (1 - self.decay) * (current - reference)


class FollowedValues(Follower):
    """The mean of the values, entry by entry."""

    def first(self, reading: Reading) -> Kept:
        values = _values(reading)
        _refuse_infinite(values)
        return (values.clone() if values is reading else values,)

    def next(self, kept: Kept, reading: Reading) -> tuple[float, Kept]:
        current = _values(reading)
        if [part.shape for part in kept] != [current.shape]:
            raise _other(kept, (current,))
        reference = kept[0].to(current.device)
        distance = distance_between(reference, current, self.bins, self.scale, self.within)
        return distance, (self._moved(reference, current),)


class FollowedFactors(FollowedValues):
    """The means of both factors; those of the values where a reading has no factors."""

    def first(self, reading: Reading) -> Kept:
        if not isinstance(reading, Factors):
            return super().first(reading)
        for factor in reading:
            _refuse_infinite(factor)
        return tuple(factor.clone() for factor in reading)

    def next(self, kept: Kept, reading: Reading) -> tuple[float, Kept]:
        if not isinstance(reading, Factors):
            return super().next(kept, reading)
        if [part.shape for part in kept] != [part.shape for part in reading]:
            raise _other(kept, reading)
        kept = tuple(part.to(current.device) for part, current in zip(kept, reading, strict=True))
        distance = distance_between(Factors(*kept), reading, self.bins, self.scale, self.within)
        return distance, tuple(map(self._moved, kept, reading))


class FollowedHistogram(Follower):
    """The mean of the counts, on edges of its own: ``(counts [B], edges [B + 1])``, float64, with an even ``B``."""

    def first(self, reading: Reading) -> Kept:
        bins = bins_of(size_of(reading), self.bins) // 2 * 2
        low, high = span_of((reading,), self.scale, self.within)
        edges = edges_of((low, max(high, widened(low, self.scale))), bins)  # so wide that doubling gets somewhere
        return counts_of(reading, edges, self.scale).double(), edges

    def next(self, kept: Kept, reading: Reading) -> tuple[float, Kept]:
        counts, edges = (part.cpu() for part in kept)
        low, high = span_of((reading,), self.scale, self.within)
        while low < edges[0] or high > edges[-1]:
            counts, edges = _coarser(counts, edges, upwards=bool(high - edges[-1] >= edges[0] - low))
        current = counts_of(reading, edges, self.scale).double()
        return divergence_root(counts, current), (self._moved(counts, current), edges)


REFERENCES: dict[str, type[Follower]] = {
    "values": FollowedValues,
    "factors": FollowedFactors,
    "histogram": FollowedHistogram,
}


def _coarser(counts: Tensor, edges: Tensor, *, upwards: bool) -> tuple[Tensor, Tensor]:
    """Make one bin of every two, and fill the half that gets free with empty bins of that width, on one side."""
    pairs, half, width = counts.view(-1, 2).sum(1), edges[::2], edges[-1] - edges[0]
    empty = torch.zeros_like(pairs)
    if upwards:
        return torch.cat([pairs, empty]), torch.cat([half, half[1:] + width])
    return torch.cat([empty, pairs]), torch.cat([half[:-1] - width, half])


def _values(reading: Reading) -> Tensor:
    return reading.values() if isinstance(reading, Factors) else reading


def _refuse_infinite(values: Tensor) -> None:
    if not bool(values.isfinite().all()):
        raise ValueError(NOT_FINITE)


def _other(kept: Kept, reading: Kept) -> ValueError:
    had, has = ([tuple(part.shape) for part in parts] for parts in (kept, reading))
    return ValueError(
        f"a slice keeps its size and kind from reading to reading; its reference has {had} and the reading {has}: "
        "follow it from its first reading on, with the slices and the statistic that it began with."
    )
