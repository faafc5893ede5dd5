"""How much the statistic of a slice changes from reading to reading."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fishkern.arguments import at_least, one_of, share_of
from fishkern.freezing.followers import REFERENCES, Reference
from fishkern.freezing.histograms import Scale, distance_between, size_of
from fishkern.freezing.readings import Reading


class Track(NamedTuple):
    """What is kept of one slice between its readings.

    Args:
        reference: What the next reading is compared with, see ``reference`` of :class:`JensenShannon`.
        smoothed: Running mean J of the distances.
        variation: Sum of |J_t - J_(t-1)| over all readings.
        total: Sum of J_t over all readings.
        readings: How many there were, the first one included.
    """

    reference: tuple[Tensor, ...]
    smoothed: float = 0.0
    variation: float = 0.0
    total: float = 0.0
    readings: int = 1


Score = Literal["total-variation", "mean"]


@dataclass(frozen=True)
class JensenShannon:
    """Recipe that follows how the values of each slice are distributed, reading by reading.

    A reading is compared with a reference that follows the readings slowly. Its distance d_t is the square root of the
    Jensen-Shannon divergence, in nats, of their histograms of log10(|x| + 1e-12): 0 for equal ones, at most sqrt(ln 2).
    The edges span the percentiles ``range`` of both together, and what is outside of them is dropped, but for slices of
    a single entry. Then

        J_t = smoothing J_(t-1) + (1 - smoothing) d_t,  J_0 = 0 at the first reading

    and the score is the total variation, sum_t |J_t - J_(t-1)|, which only grows, or the mean of all J_t, the first one
    included (FisherAdapTune, Rostami et al., 2026, arXiv:2606.10196; its defaults are these). A slice whose values stay
    the same has distances and score of exactly 0. Multiplying reference and reading by the same number changes a
    distance by no more than rounding does, as long as the values are far above 1e-12.

    Args:
        bins: Bins of a histogram. A slice of fewer than 16 * ``bins`` entries has as many as leave 16 entries for each,
            at least 4, since an almost empty histogram measures chance; the paper always takes ``bins``.
        scale: ``"log"``, or ``"raw"`` for |x| between its smallest and largest value, without ``range``.
        range: Both percentiles, as fractions.
        decay: Of the reference: ref <- decay ref + (1 - decay) reading, after the distance is computed.
        smoothing: Of the distances.
        score: ``"total-variation"`` or ``"mean"``.
        reference: What is kept of a slice and moves with ``decay``. ``"values"``: its entries, as in the paper; a copy
            of the model in float32, and readings of factors are multiplied out. ``"factors"``: both factors of the
            entries, each by itself, which takes a row and a column instead of a matrix. Their product is then not the
            mean of the products, so that distances differ from those of ``"values"`` a little. A reading without
            factors is followed by its values. ``"histogram"``: counts on edges of its own, those of the first reading.
            Where a reading exceeds them, every two bins become one, as often as needed. So a slice takes a kilobyte,
            whatever its size; but the bins get coarser the further its values move, the reference is a mixture of
            distributions rather than the distribution of a mean, and which entry moved is not seen at all.

    Raises:
        TypeError: A number is none.
        ValueError: ``bins`` is below 2, a fraction is outside [0, 1], the percentiles do not ascend, or a word is
            unknown.
    """

    bins: int = 64
    scale: Scale = "log"
    range: tuple[float, float] = (0.01, 0.99)
    decay: float = 0.9
    smoothing: float = 0.9
    score: Score = "total-variation"
    reference: Reference = "values"

    def __post_init__(self) -> None:
        for name, allowed in (("scale", Scale), ("score", Score), ("reference", Reference)):
            one_of(getattr(self, name), get_args(allowed), name)
        vars(self).update(
            bins=at_least(2, self.bins, "bins"),
            range=_checked_range(self.range),
            decay=share_of(self.decay, "decay"),
            smoothing=share_of(self.smoothing, "smoothing"),
        )

    @property
    def settings(self) -> dict[str, Any]:
        """The recipe in plain values, for the header of a file."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return values | {"range": list(self.range)}

    @staticmethod
    def distance(
        reference: Tensor,
        current: Tensor,
        *,
        bins: int = 64,
        scale: Scale = "log",
        range: tuple[float, float] = (0.01, 0.99),
    ) -> float:
        """Compare the distributions of two tensors' magnitudes.

        Args:
            reference: Any shape, floating.
            current: Any shape, floating; not necessarily of the same size.
            bins: As of the recipe, and fewer for small tensors, by the smaller of both.
            scale: As of the recipe.
            range: As of the recipe.

        Returns:
            The square root of the Jensen-Shannon divergence in nats, from 0 to sqrt(ln 2).

        Raises:
            TypeError: One of both is no floating tensor.
            ValueError: One of both is empty, or has values that are NaN or infinite; or as for the recipe.
        """
        for name, tensor in (("reference", reference), ("current", current)):
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                what = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise TypeError(f"{name} must be a floating tensor, got {what}.")
            if not tensor.numel():
                raise ValueError(f"{name} must have entries, got {tuple(tensor.shape)}.")
        one_of(scale, get_args(Scale), "scale")
        dtype = torch.promote_types(reference.dtype, current.dtype)
        pair = (reference.detach().to(current.device, dtype), current.detach().to(dtype))
        return distance_between(*pair, at_least(2, bins, "bins"), scale, _checked_range(range))

    def follow(self, track: Track | None, reading: Reading) -> Track:
        """Take another reading of a slice into account.

        Args:
            track: What was kept of the slice; ``None`` at its first reading, which is only stored.
            reading: Its values, or their factors. Nothing is changed in it, nor in ``track``.

        Returns:
            What to keep.

        Raises:
            ValueError: The reading is empty, or has values that are NaN or infinite; or it is of another size or kind
                than those before it.
        """
        if not size_of(reading):
            raise ValueError("a slice has at least one entry, and the reading has none.")
        reference = REFERENCES[self.reference](self.bins, self.scale, self.range, self.decay)
        if track is None:
            return Track(reference.first(reading))
        return self._counted_in(track, *reference.next(track.reference, reading))

    def _counted_in(self, track: Track, distance: float, kept: tuple[Tensor, ...]) -> Track:
        smoothed = self.smoothing * track.smoothed + (1 - self.smoothing) * distance
        return Track(
            reference=kept,
            smoothed=smoothed,
            variation=track.variation + abs(smoothed - track.smoothed),
            total=track.total + smoothed,
            readings=track.readings + 1,
        )

    def score_of(self, track: Track) -> float:
        """Score a slice.

        Args:
            track: What :meth:`follow` returned for it.

        Returns:
            The score; 0 for a slice that never changed.
        """
        return track.variation if self.score == "total-variation" else track.total / track.readings


def _checked_range(within: tuple[float, float]) -> tuple[float, float]:
    low, high = (share_of(fraction, "range") for fraction in within)
    if not low < high:
        raise ValueError(f"range must be two ascending fractions such as (0.01, 0.99), got {within}.")
    return low, high
