"""The distance and the scores in numpy, from their definition."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def histograms(
    reference: np.ndarray, current: np.ndarray, bins: int = 64, scale: str = "log", within: Sequence[float] = (1, 99)
) -> tuple[np.ndarray, np.ndarray]:
    """Counts of both on shared edges, of percentiles of both together."""
    pair = [np.abs(np.asarray(values, dtype=np.float64)).ravel() for values in (reference, current)]
    if scale == "log":
        pair = [np.log10(values + 1e-12) for values in pair]
    low, high = np.percentile(np.concatenate(pair), within if scale == "log" else [0, 100])
    edges = np.linspace(low, high if high > low else low + 1e-3, bins + 1)
    return tuple(np.histogram(values, edges)[0] for values in pair)


def distance(reference: np.ndarray, current: np.ndarray, **options) -> float:
    """The square root of the Jensen-Shannon divergence in nats."""
    p, q = (counts + 1e-12 for counts in histograms(reference, current, **options))
    p, q = p / p.sum(), q / q.sum()
    middle = (p + q) / 2
    return float(np.sqrt(max(0.0, np.sum(p * np.log(p / middle) + q * np.log(q / middle)) / 2)))


def total_variation(readings: Sequence[np.ndarray], bins: int = 64) -> tuple[float, float]:
    """Both scores of a slice: smoothed distances to the running mean of its values, decays of 0.9."""
    reference, smoothed = np.asarray(readings[0], dtype=np.float64), [0.0]
    for reading in readings[1:]:
        smoothed.append(0.9 * smoothed[-1] + 0.1 * distance(reference, reading, bins=bins))
        reference = 0.9 * reference + 0.1 * reading
    return float(np.abs(np.diff(smoothed)).sum()), float(np.mean(smoothed))


def log_normal(entries: int, *, seed: int = 0, center: float = -4.0, spread: float = 1.0) -> torch.Tensor:
    """Magnitudes whose decimal logarithms are normal, as those of a Fisher information about are."""
    generator = torch.Generator().manual_seed(seed)
    return 10 ** (center + spread * torch.randn(entries, generator=generator))
