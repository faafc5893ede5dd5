"""How many directions each matrix gets: one budget of ranks, dealt out by importance."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any

from fishkern.arguments import at_least, integer, number
from fishkern.names import listed


@dataclass(frozen=True)
class RankRule(ABC):
    """Recipe that gives each matrix a rank by its importance."""

    @property
    def settings(self) -> dict[str, Any]:
        """The rule in plain values, for the header of a file."""
        return {"name": type(self).__name__, **{entry.name: getattr(self, entry.name) for entry in fields(self)}}

    @abstractmethod
    def ranks(self, importances: Mapping[str, float], largest: Mapping[str, int]) -> dict[str, int]:
        """Give each matrix a rank.

        Args:
            importances: By name; finite, none negative, not all zero.
            largest: The largest rank that a matrix can have, by name; names may be missing.

        Returns:
            The rank of each matrix, at least 1.

        Raises:
            ValueError: The budget cannot be spent.
        """


@dataclass(frozen=True)
class UniformRank(RankRule):
    """Give every matrix the same rank, whatever its importance.

    Args:
        rank: The rank, at least 1.

    Raises:
        TypeError: It is not an integer.
        ValueError: It is below 1.
    """

    rank: int

    def __post_init__(self) -> None:
        vars(self).update(rank=at_least(1, self.rank, "rank"))

    def ranks(self, importances: Mapping[str, float], largest: Mapping[str, int]) -> dict[str, int]:
        if small := [f"{name} ({largest[name]})" for name in importances if largest.get(name, self.rank) < self.rank]:
            raise ValueError(
                f"rank {self.rank} is more than {len(small)} of {len(importances)} matrices can have "
                f"({listed(small)}): take a smaller rank, or leave them out."
            )
        return dict.fromkeys(importances, self.rank)


@dataclass(frozen=True)
class _Shared(RankRule):
    """A rule that deals out ``average`` times as many ranks as there are matrices, within bounds.

    A matrix gets a share of the budget that is proportional to its weight; what the bounds take from one, or give to
    it, changes the shares of the others alike. The shares are rounded down, and the ranks that are left go to the
    largest remainders, of equal ones to the name that comes first in the alphabet. All of this is computed in
    fractions, without rounding. So the sum is exact, and of two matrices the one with the larger weight never has the
    smaller rank.
    """

    average: float
    least: int = 1
    most: int | None = None

    def __post_init__(self) -> None:
        average = number(self.average, "average")
        vars(self).update(average=average, least=at_least(1, self.least, "least"))
        if self.most is not None:
            vars(self).update(most=integer(self.most, "most"))
            if self.most < self.least:
                raise ValueError(f"most={self.most} is below least={self.least}.")
        if not (math.isfinite(average) and average >= self.least and average <= (self.most or average)):
            raise ValueError(f"average={average:g} must be between least={self.least} and most={self.most}.")

    @abstractmethod
    def weights(self, importances: Mapping[str, float]) -> dict[str, float]:
        """Weigh the matrices.

        Args:
            importances: By name; finite, none negative, not all zero.

        Returns:
            The weight of each matrix, from 0 to infinity. One of infinite weight gets what it can have before any
            other does, one of weight 0 what no other can have.
        """

    def ranks(self, importances: Mapping[str, float], largest: Mapping[str, int]) -> dict[str, int]:
        total = _total(self.average, len(importances))
        least, most = self.least, {}
        for name in importances:
            limits = [limit for limit in (self.most, largest.get(name)) if limit is not None]
            most[name] = min(limits, default=total)
        if small := [f"{name} ({most[name]})" for name in importances if most[name] < least]:
            raise ValueError(
                f"least={least} is more than {len(small)} of {len(importances)} matrices can have ({listed(small)}): "
                "take a smaller one, or leave them out."
            )
        if total > sum(most.values()):
            raise ValueError(
                f"average={self.average:g} of {len(importances)} matrices is {total:,} ranks, and they can have "
                f"{sum(most.values()):,} together, because of most={self.most} and of their sizes: take an average of "
                f"at most {Fraction(sum(most.values()), len(importances))}."
            )
        return _rounded(_shares(self.weights(importances), least, most, total), total)


@dataclass(frozen=True)
class InverseImportance(_Shared):
    """Give a matrix a share of the ranks that is inverse to its importance, as FARSS does to shallow layers.

    The sum is average * N exactly, where the published code rounds and then clips, and so spends less or more. A matrix
    of importance 0 gets ``most``, as far as the budget goes.

    Args:
        average: Mean rank; times the number of matrices it must be a whole number.
        least: Smallest rank.
        most: Largest rank; ``None`` for as many as the matrix can have.

    Raises:
        TypeError: An argument is not a number.
        ValueError: ``least`` is below 1, or ``average`` is not between ``least`` and ``most``.
    """

    most: int | None = 64

    def weights(self, importances: Mapping[str, float]) -> dict[str, float]:
        # of the smallest importance, so that no weight overflows
        smallest = min(filter(None, importances.values()))
        return {name: smallest / value if value else math.inf for name, value in importances.items()}


@dataclass(frozen=True)
class ProportionalImportance(_Shared):
    """Give a matrix a share of the ranks that is proportional to its importance.

    The sum is average * N exactly. A matrix of importance 0 gets ``least``, unless the others cannot have more.

    Args:
        average: Mean rank; times the number of matrices it must be a whole number.
        least: Smallest rank.
        most: Largest rank; ``None`` for as many as the matrix can have.

    Raises:
        TypeError: An argument is not a number.
        ValueError: ``least`` is below 1, or ``average`` is not between ``least`` and ``most``.
    """

    def weights(self, importances: Mapping[str, float]) -> dict[str, float]:
        return dict(importances)


def allocate_ranks(
    importances: Mapping[str, float], rule: RankRule, *, largest: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Deal out ranks to matrices by their importance.

    Only the ratios of importances count, and the order of the names does not. Of two matrices that can have the same
    rank, the one that the rule ranks higher never gets less; equal ones get the same rank or one that differs by 1.

    Args:
        importances: Of each matrix by name, as ``energies[name].importance``; finite, none negative, not all zero.
        rule: :class:`UniformRank`, :class:`InverseImportance`, :class:`ProportionalImportance`, or one of your own.
        largest: The largest rank that each matrix can have, by name: the smaller of its two sizes. A name may be
            missing; ``None`` for no limit but the rule's.

    Returns:
        The rank of each matrix, in the order of ``importances``.

    Raises:
        TypeError: ``rule`` is not a rule, or ``importances`` are not numbers by name.
        ValueError: There is no matrix; an importance is negative or not finite, or all are zero; ``largest`` has a name
            that ``importances`` lacks; the budget is not a whole number of ranks; or the bounds do not allow it.
    """
    if not isinstance(rule, RankRule):
        raise TypeError(f"rule must be a rule for ranks such as UniformRank(16), got {rule!r}.")
    values = _checked(importances)
    limits = {name: at_least(1, limit, f"largest[{name!r}]") for name, limit in (largest or {}).items()}
    if unknown := [name for name in limits if name not in values]:
        raise ValueError(f"largest= has {listed(unknown)}, and importances have no such name.")
    ranks = rule.ranks(values, limits)
    if ranks.keys() != values.keys():
        raise ValueError(
            f"{type(rule).__name__}.ranks must give a rank for each matrix: those of {listed(ranks.keys() ^ values)} "
            "are missing or too many."
        )
    return {name: at_least(1, ranks[name], f"the rank of {name}") for name in values}


def _checked(importances: Mapping[str, float]) -> dict[str, float]:
    values: dict[str, float] = {}
    if not isinstance(importances, Mapping):
        raise TypeError(f"importances are a mapping from names to numbers, got {type(importances).__name__}.")
    if not importances:
        raise ValueError("there are no importances to allocate ranks by, the mapping is empty.")
    if missing := [name for name, value in importances.items() if value is None]:
        raise ValueError(
            f"{len(missing)} of {len(importances)} matrices have no importance ({listed(missing)}): estimate with "
            'DirectionEnergy(importance="kronecker"), whose importance_of= covers them.'
        )
    for name, value in importances.items():
        try:
            values[name] = float(value)
        except (TypeError, ValueError, RuntimeError):  # the last of a tensor with several entries
            raise TypeError(f"importances are numbers, that of {name} is {value!r}.") from None
    if odd := [f"{name} ({value:g})" for name, value in values.items() if not (math.isfinite(value) and value >= 0)]:
        raise ValueError(f"importances must be finite and not negative; those of {listed(odd)} are not.")
    if not any(values.values()):
        raise ValueError(
            f"all importances are zero ({listed(values)}), so that the data do not rank these matrices: look at the "
            "loss, or take UniformRank with importances of 1."
        )
    return values


def _total(average: float, count: int) -> int:
    """Multiply out the budget, which must be a whole number up to the rounding of ``average``."""
    total = round(average * count)
    if not math.isclose(total / count, average, rel_tol=1e-12):
        below, above = math.floor(average * count), math.ceil(average * count)
        raise ValueError(
            f"average={average:g} of {count} matrices is {average * count:g} ranks, which is no whole number: take "
            f"average={below}/{count} or {above}/{count}."
        )
    return total


def _shares(weights: Mapping[str, float], least: int, most: Mapping[str, int], total: int) -> dict[str, Fraction]:
    """Deal out a budget within bounds, first to infinite weights, then to positive ones, then to zeros."""
    shares = dict.fromkeys(weights, Fraction(least))
    spare = total - least * len(weights)
    kinds = [
        {name: Fraction(1) for name, weight in weights.items() if math.isinf(weight)},
        {name: Fraction(weight) for name, weight in weights.items() if 0 < weight < math.inf},
        {name: Fraction(1) for name, weight in weights.items() if weight == 0},
    ]
    for kind in kinds:
        dealt = min(spare, sum(most[name] - least for name in kind))
        shares |= _filled(kind, least, most, Fraction(least * len(kind) + dealt))
        spare -= dealt
    return shares


def _filled(
    weights: Mapping[str, Fraction], least: int, most: Mapping[str, int], total: Fraction
) -> dict[str, Fraction]:
    """Find the level at which clip(level * weight, least, most) adds up to the total, and give these values."""
    shares: dict[str, Fraction] = {}
    free = dict(weights)
    while free:
        level = (total - sum(shares.values())) / sum(free.values())
        excess = {name: level * weight - most[name] for name, weight in free.items() if level * weight > most[name]}
        lack = {name: least - level * weight for name, weight in free.items() if level * weight < least}
        if not excess and not lack:
            break
        # Where the bounds take more than they give, the level rises: what is at the upper bound then stays there.
        if sum(excess.values()) >= sum(lack.values()):
            shares |= {name: Fraction(most[name]) for name in excess}
        else:
            shares |= dict.fromkeys(lack, Fraction(least))
        free = {name: weight for name, weight in free.items() if name not in shares}
    return shares | {name: level * weight for name, weight in free.items()}


def _rounded(shares: Mapping[str, Fraction], total: int) -> dict[str, int]:
    """Round shares to whole numbers of the same sum, by their largest remainders."""
    ranks = {name: math.floor(share) for name, share in shares.items()}
    by_remainder = sorted(shares, key=lambda name: (ranks[name] - shares[name], name))
    for name in by_remainder[: total - sum(ranks.values())]:
        ranks[name] += 1
    return ranks
