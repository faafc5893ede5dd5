"""Histograms of two readings on the same edges, and how far apart they are.

Both scales go through one function of the magnitude: its logarithm or itself. Percentiles and counts are exact, of
values and of products that are never formed, and take memory for pieces of them only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fishkern.freezing.products import count_products, products_at
from fishkern.freezing.readings import Factors, Reading
from fishkern.ops.log_histogram import SMALLEST, log_histogram, log_magnitude
from fishkern.ops.magnitudes import count_below, key_dtype, keys_reaching, magnitudes_at

Scale = Literal["log", "raw"]

_WIDENED = 1e-3
_EMPTY = 1e-12  # what is added to each count, so that no bin has probability zero
_LEAST_BINS, _ENTRIES_OF_A_BIN = 4, 16
_SMALL = 2**14  # products that are formed


def distance_between(
    reference: Reading, current: Reading, bins: int, scale: Scale, within: tuple[float, float]
) -> float:
    """Compare the distributions of two readings of one kind, on edges that span both.

    Args:
        reference: The one.
        current: The other.
        bins: Bins of large ones.
        scale: As for :func:`span_of`.
        within: As for :func:`span_of`.

    Returns:
        As :func:`divergence_root`.

    Raises:
        ValueError: A value is NaN or infinite.
    """
    pair = (reference, current)
    edges = edges_of(span_of(pair, scale, within), bins_of(min(map(size_of, pair)), bins))
    return divergence_root(*(counts_of(reading, edges, scale) for reading in pair))


def bins_of(entries: int, bins: int) -> int:
    """Say how many bins the histogram of a slice has.

    Args:
        entries: Of the slice.
        bins: Of a large one.

    Returns:
        ``bins``, or as many as leave 16 entries for each, but at least 4.
    """
    return min(bins, max(entries // _ENTRIES_OF_A_BIN, _LEAST_BINS))


def span_of(pool: Sequence[Reading], scale: Scale, within: tuple[float, float]) -> tuple[float, float]:
    """Find the range of a histogram.

    Args:
        pool: Readings of one kind, which count as one.
        scale: ``"log"``: the percentiles of log10(|x| + 1e-12), with linear interpolation, of readings of a single
            entry the smallest and largest; ``"raw"``: the smallest and the largest |x|.
        within: Both percentiles, as fractions.

    Returns:
        Its ends, which :func:`widened` sets apart where they are one value.

    Raises:
        ValueError: A value is NaN or infinite.
    """
    entries = sum(size_of(reading) for reading in pool)
    if scale == "raw":
        low, high = _magnitudes_at(pool, [0, entries - 1])
    else:
        within = (0.0, 1.0) if entries == len(pool) else within  # else the percentiles would leave out all there is
        virtual = [fraction * (entries - 1) for fraction in within]
        places = [place for at in virtual for place in (math.floor(at), min(math.floor(at) + 1, entries - 1))]
        marks = log_magnitude(torch.tensor(_magnitudes_at(pool, places), dtype=torch.float64)).tolist()
        low, high = (_between(*marks[2 * n : 2 * n + 2], at - math.floor(at)) for n, at in enumerate(virtual))
    return low, high if high > low else widened(low, scale)


def widened(low: float, scale: Scale) -> float:
    """Give a range of one value another end.

    Args:
        low: The value.
        scale: ``"log"``: the range is 1e-3; ``"raw"``: it is a thousandth of the value, 1e-12 of zero.

    Returns:
        The upper end.
    """
    return low + (_WIDENED if scale == "log" else _WIDENED * low or SMALLEST)


def edges_of(span: tuple[float, float], bins: int) -> Tensor:
    """Cut a range into bins of one width.

    Args:
        span: Its ends.
        bins: Their number.

    Returns:
        ``[bins + 1]``, float64, rounded as numpy's.
    """
    low, high = span
    edges = torch.arange(bins + 1, dtype=torch.float64) * ((high - low) / bins) + low
    edges[-1] = high
    return edges


def counts_of(reading: Reading, edges: Tensor, scale: Scale) -> Tensor:
    """Count the entries of a reading in each bin.

    Args:
        reading: The reading.
        edges: ``[B + 1]``, float64, on the CPU.
        scale: Of the edges.

    Returns:
        ``[B]``, int64, on the CPU.
    """
    if isinstance(reading := _formed_if_small(reading), Factors):
        return count_products(reading, edges, scale)
    if scale == "log":
        return log_histogram(reading, edges).cpu()
    keys = keys_reaching(edges, Tensor.double, edges, key_dtype(reading.dtype))
    return count_below(reading, keys.to(reading.device)).diff().cpu()


def divergence_root(counts: Tensor, others: Tensor) -> float:
    """Compute the distance between two histograms on the same edges.

        d = sqrt( KL(P | M) / 2 + KL(Q | M) / 2 ),  M = (P + Q) / 2

    where P and Q are the counts + 1e-12, normalised: the square root of the Jensen-Shannon divergence in nats.

    Args:
        counts: ``[B]``, none negative.
        others: ``[B]``.

    Returns:
        From 0 to sqrt(ln 2); exactly 0 for equal histograms.
    """
    p, q = (part.double() + _EMPTY for part in (counts, others))
    p, q = p / p.sum(), q / q.sum()
    mean = (p + q) / 2
    divergence = ((p * (p / mean).log()).sum() + (q * (q / mean).log()).sum()) / 2
    return math.sqrt(max(float(divergence), 0.0))


def size_of(reading: Reading) -> int:
    """Count the entries of a reading.

    Args:
        reading: The reading.

    Returns:
        Their number.
    """
    return reading.size if isinstance(reading, Factors) else reading.numel()


def _magnitudes_at(pool: Sequence[Reading], places: list[int]) -> list[float]:
    pool = [_formed_if_small(reading) for reading in pool]
    return (products_at if isinstance(pool[0], Factors) else magnitudes_at)(pool, places)


def _formed_if_small(reading: Reading) -> Reading:
    """Multiply out factors of few products, which are counted faster than by bisection, and alike."""
    if isinstance(reading, Factors) and reading.size <= _SMALL:
        return torch.outer(reading.rows.double(), reading.columns.double())
    return reading


def _between(low: float, high: float, part: float) -> float:
    """Interpolate as numpy does, from the closer end, so that it rounds alike."""
    return low + (high - low) * part if part < 0.5 else high - (high - low) * (1 - part)
