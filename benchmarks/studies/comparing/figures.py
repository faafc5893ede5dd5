"""Numbers of a run as its record has them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

WINDOW = 25  # steps that a training loss is the mean of


def finite(value: float) -> float | None:
    """A number, or None, which JSON has, for what is none."""
    return value if math.isfinite(value) else None


def means(losses: Sequence[float], window: int = WINDOW) -> list[float | None]:
    """The mean of each stretch of training losses; the last one may be shorter."""
    stretches = (losses[start : start + window] for start in range(0, len(losses), window))
    return [finite(statistics.fmean(stretch)) for stretch in stretches]
