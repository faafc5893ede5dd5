"""What a rule may spend: a count, or a fraction of a pool."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from decimal import ROUND_CEILING, Context, Decimal
from fractions import Fraction

from fishkern.arguments import count_of, fraction_of
from fishkern.selection.base import Rule


@dataclass(frozen=True)
class Budgeted(Rule, ABC):
    """A rule with a budget: exactly one of ``k`` and ``density``.

    Args:
        k: How many; or
        density: A fraction.
        always: As for every rule.
        never: As for every rule.

    Raises:
        ValueError: Both or neither are given, ``k`` is negative, or ``density`` is outside (0, 1].
        TypeError: The one that is given is not a number.
    """

    k: int | None = None
    density: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.k is None) == (self.density is None):
            raise ValueError(f"give either k or density, got k={self.k} and density={self.density}.")
        if self.k is not None:
            vars(self).update(k=count_of(self.k))
        else:
            vars(self).update(density=fraction_of(self.density))

    def budget_of(self, total: int) -> int:
        """Count how many coordinates may be selected.

        Args:
            total: What ``density`` is a fraction of.

        Returns:
            ``k``, or floor(density * total).
        """
        return self.k if self.k is not None else share(self.density, total)

    def budget_of_pool(self, total: int, available: int) -> int:
        """Count how many coordinates of the whole pool may be selected, and check that there are as many.

        Args:
            total: Coordinates of the whole pool.
            available: Coordinates that are neither in ``always`` nor in ``never``.

        Returns:
            ``k``, or floor(density * total).

        Raises:
            ValueError: It exceeds what is available.
        """
        if (k := self.budget_of(total)) > available:
            raise ValueError(
                f"k={k:,} of a pool of {total:,} was requested, but only {available:,} are left to choose from after "
                "always= and never=: lower k or density."
            )
        return k


def share(density: float, total: int) -> int:
    """Compute floor(density * total) exactly.

    Args:
        density: Read as the decimal number that it prints as: 0.29 of 100 is 29, where ``int(0.29 * 100)`` is 28.
        total: What it is a fraction of.

    Returns:
        The count.
    """
    return int(Fraction(repr(float(density))) * total)


def density_of(count: int, total: int, digits: int = 3) -> float:
    """Find a short density that is enough for a count: floor(density * total) is at least ``count``.

    Args:
        count: At most ``total``.
        total: What the density is a fraction of.
        digits: How many significant ones the density has.

    Returns:
        count / total, rounded up.
    """
    return float(Context(prec=digits, rounding=ROUND_CEILING).divide(Decimal(count), Decimal(total)))
