"""How precise a mean of squares is: standard errors, and how much of its top is that of all further examples, too."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import NormalDist
from typing import Any, NamedTuple, Self

import numpy as np
from torch import Tensor

from fishkern.arguments import at_least, fraction_of
from fishkern.names import renamed

DENSITIES = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
"""The densities for which the expected overlap is known, and between which it is interpolated."""

LEAST = 50  # entries of a top that must be followed for its overlap to be told
_NORMAL = NormalDist()


class Entries(NamedTuple):
    """Followed entries of one parameter.

    Args:
        indices: ``[F]``, int64: their flat indices, ascending.
        means: ``[F]``, float64: the statistic there, up to its rounding.
        standard_errors: ``[F]``, float64: estimated standard deviation of the mean, from batch to batch.
    """

    indices: Tensor
    means: Tensor
    standard_errors: Tensor

    @property
    def relative_errors(self) -> Tensor:
        """``[F]``: standard errors, each divided by its mean; NaN where that is 0."""
        return self.standard_errors / self.means


@dataclass(frozen=True, eq=False)
class Precision:
    r"""What followed entries tell of the precision of a mean over ``count`` units.

    All of it regards the examples as independent draws from a population that has no end, such as the data would be if
    there were more of them. If they are drawn from a data set of ``M`` examples, and that is all there is, the errors
    are smaller by ``sqrt(1 - count / M)``.

    **Standard errors.** Of batch ``b`` with ``N_b`` units the sums ``S_b`` of each followed entry are known, so the
    variance of a unit is estimated by ``(sum_b S_b^2 / N_b - S^2 / n) / (B - 1)`` with ``S = sum_b S_b``, ``n = sum_b
    N_b``, which is unbiased whatever the sizes of the batches, and the standard error is ``sqrt(variance / n)``.

    **Overlap.** The followed entries are summed in eight interleaved parts of the batches, which are put together to
    halves in up to seven ways that are orthogonal to each other. With ``h`` the part of its top that a half shares with
    the other one, ``a`` and ``b`` their units, the noise of one unit is ``c = z / sqrt(1 / a + 1 / b)`` where ``h = 2
    Phi(-z)``, averaged over these ways, and the tops of ``n`` and of ``m`` others share ``2 Phi(-c sqrt(1 / n + 1 /
    m))``. This is exact where scores fall off like a power around the top's threshold, and their errors are log-normal
    and of one size. An entry of zero in a half is in no top of it. Squares have heavy tails, so that errors shrink more
    slowly than ``1 / sqrt(n)`` at first: where ``c`` has grown by some part from quarters of the data to halves, ``1 /
    sqrt(2)`` of that part is added once more.

    Args:
        count: Number of units of the mean.
        batches: Number of batches.
        total: Number of coordinates of the pool.
        followed: How many of them were followed.
        deviation: Relative standard deviation of one unit, all entries together: ``sqrt(sum variance / sum mean^2)``.
        noise: ``c`` by density, for those of :data:`DENSITIES` (and that of ``until``) whose top has enough entries.
        entries: The followed entries by name; empty where only a summary is known: from a file, and of merged ones.
    """

    count: int
    batches: int
    total: int
    followed: int
    deviation: float
    noise: Mapping[float, float]
    entries: Mapping[str, Entries] = field(default_factory=dict)

    @property
    def relative_error(self) -> float:
        """Expected relative distance, in L2, of all entries together from the mean over infinitely many units."""
        return self.deviation / math.sqrt(self.count)

    def overlap(self, density: float = 0.005, *, others: int | None = None) -> float:
        """Tell which part of the top entries is in the top of other examples, too.

        Args:
            density: Size of the top, as a fraction of all entries of the pool.
            others: ``None``: infinitely many other units, whose top is the true one. So this is the part of a
                selection that is right, and what ``until=`` speaks of. A number: as many independent ones, as for a
                comparison that somebody has really made; with ``others=count`` it is lower, since both have errors.

        Returns:
            The expected number of entries that the two tops share, divided by the number of entries of one.

        Raises:
            ValueError: The density is beyond those of :attr:`noise`.
            TypeError: An argument is not a number.
        """
        noise = self._noise_at(fraction_of(density))
        further = 0.0 if others is None else 1 / at_least(1, others, "others")
        return expected_overlap(noise, 1 / self.count + further)

    def _noise_at(self, density: float) -> float:
        if density in self.noise:
            return self.noise[density]
        known = sorted(self.noise)
        if not known:
            raise ValueError(
                f"the overlap is told from at least {LEAST} followed entries of a top, which none of up to "
                f"{DENSITIES[-1]:.0%} has here: {self.followed:,} entries of {self.total:,} are followed."
            )
        if not known[0] <= density <= known[-1]:
            raise ValueError(
                f"the overlap is known for densities from {known[0]:g} to {known[-1]:g}, got {density:g}: "
                f"{self.followed:,} entries of {self.total:,} are followed, and a top needs {LEAST} of them."
            )
        above = next(number for number, one in enumerate(known) if one > density)
        low, high = known[above - 1], known[above]
        share = math.log(density / low) / math.log(high / low)
        return self.noise[low] + share * (self.noise[high] - self.noise[low])

    def renamed(self, fn: Callable[[str], str]) -> Self:
        """Give the parameters other names.

        Args:
            fn: From the old name to the new one.

        Returns:
            The same otherwise.
        """
        return replace(self, entries=renamed(self.entries, fn))

    def plain(self) -> dict[str, Any]:
        """Give the summary as plain values, for the header of a file.

        Returns:
            All but the entries.
        """
        fields = ("count", "batches", "total", "followed", "deviation")
        return {**{name: getattr(self, name) for name in fields}, "noise": list(map(list, self.noise.items()))}

    @classmethod
    def of_plain(cls, values: Mapping[str, Any]) -> Self:
        """Read a summary.

        Args:
            values: From :meth:`plain`.

        Returns:
            The precision, without entries.

        Raises:
            ValueError: They are not such values.
        """
        counts = [values[name] for name in ("count", "batches", "total", "followed")]
        noise = dict(values["noise"])
        numbers = [values["deviation"], *noise.values()]
        if not all(type(one) is int and one >= 1 for one in counts):
            raise ValueError(f"counts are integers of at least 1, got {counts}")
        if not all(type(one) in (int, float) and math.isfinite(one) and one >= 0 for one in numbers):
            raise ValueError(f"deviation and noise are numbers of at least 0, got {numbers}")
        if not all(type(density) in (int, float) and 0 < density <= 1 for density in noise):
            raise ValueError(f"densities are above 0 and at most 1, got {list(noise)}")
        return cls(*counts, values["deviation"], noise)

    def __repr__(self) -> str:
        tops = ""
        if 0.005 in self.noise:
            tops = f", {self.overlap():.1%} of the top 0.5 % right"
        return f"Precision(relative error {self.relative_error:.2g}{tops}, from {self.followed:,} followed entries)"


def merged_precision(parts: Sequence[Precision | None]) -> Precision | None:
    """Combine the precision of statistics of different data, that are merged by their counts.

    Args:
        parts: Of the same pool.

    Returns:
        Squared deviation and noise of a unit are means of those of the parts, by their counts. ``None`` if a part has
        none.
    """
    if None in parts or len({part.total for part in parts}) != 1:
        return None
    count = sum(part.count for part in parts)

    def mean(values: Sequence[float]) -> float:
        return math.sqrt(sum(part.count * one**2 for part, one in zip(parts, values, strict=True)) / count)

    noise = {
        density: mean([part.noise[density] for part in parts])
        for density in parts[0].noise
        if all(density in part.noise for part in parts)
    }
    batches, followed = sum(part.batches for part in parts), min(part.followed for part in parts)
    deviation = mean([part.deviation for part in parts])
    return Precision(count, batches, parts[0].total, followed, deviation, noise)


def expected_overlap(noise: float, inverses: float) -> float:
    """Compute the expected overlap of two tops, see :class:`Precision`.

    Args:
        noise: That of one unit.
        inverses: ``1 / n + 1 / m``.

    Returns:
        Between 0 and 1.
    """
    return 2 * _NORMAL.cdf(-noise * math.sqrt(inverses))


def noise_of_unit(
    halves: Sequence[tuple[Tensor, Tensor]], units: Sequence[tuple[int, int]], counts: Sequence[int]
) -> list[float]:
    """Compute the noise of one unit, see :class:`Precision`.

    Args:
        halves: For each way to halve the data the sums ``[F]`` of both halves; at least one.
        units: The number of units in each half.
        counts: Sizes of the tops, at most ``F``.

    Returns:
        The noise for each size.
    """
    totals = [0.0] * len(counts)
    for (first, second), (a, b) in zip(halves, units, strict=True):
        for number, (count, shared) in enumerate(zip(counts, _shared(first, second, counts), strict=True)):
            h = max(shared, 0.5) / count  # none of them would be infinite noise
            totals[number] += -_NORMAL.inv_cdf(h / 2) / math.sqrt(1 / a + 1 / b)
    return [abs(total) / len(halves) for total in totals]


def _shared(first: Tensor, second: Tensor, counts: Sequence[int]) -> list[int]:
    """Count the entries that the tops of both have in common, for several sizes."""
    # By thresholds, since torch.topk takes longer on a CPU.
    halves = [half.cpu().numpy() for half in (first, second)]
    ordered = [np.sort(half) for half in halves]
    return [
        np.count_nonzero(np.logical_and(*(_top(*half, count) for half in zip(halves, ordered, strict=True))))
        for count in counts
    ]


def _top(values: np.ndarray, ordered: np.ndarray, count: int) -> np.ndarray:
    """Mark the ``count`` largest, of equal ones the first; what is zero is in no top."""
    threshold = ordered[-count]
    chosen = values > threshold
    if threshold > 0:
        more = count - np.count_nonzero(chosen)
        chosen[np.flatnonzero(values == threshold)[:more]] = True
    return chosen
