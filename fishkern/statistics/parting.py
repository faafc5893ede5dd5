"""Which parameters each pass over the data is for: as an estimator divides them, and as the caller does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from fishkern.names import listed
from fishkern.statistics.base import Estimator

Parts = Sequence[Sequence[str]] | None
"""Names of the parameters of each pass; ``None`` for as few passes as an estimator takes."""


def groups_of(estimator: Estimator, names: list[str], parts: Parts) -> list[list[str]]:
    """Say which parameters each pass over the data is for.

    Args:
        estimator: Has groups of its own, which ``parts`` divides further.
        names: Canonical names of the requested parameters, in the model's order.
        parts: As for :func:`fishkern.estimate`.

    Returns:
        Canonical names.

    Raises:
        TypeError: ``parts`` is not made of lists of names.
        ValueError: The groups or the parts do not have every requested parameter once.
    """
    groups = estimator.passes(tuple(names))
    if sorted(name for one in groups for name in one) != sorted(names):
        raise ValueError(f"{type(estimator).__name__}.passes must give every requested parameter once, got {groups}.")
    if parts is None:
        return groups
    if not isinstance(parts, Sequence) or isinstance(parts, str) or not all(map(_is_of_names, parts)):
        raise TypeError("parts must be lists of names, one for each pass, as fishkern.plan(...).parts(...) gives them.")
    counts = Counter(name for one in parts for name in one)
    if odd := sorted(counts.keys() ^ set(names)) or [name for name, count in counts.items() if count > 1]:
        raise ValueError(
            f"parts must have every requested parameter once: {listed(odd)} is not requested, missing or there twice. "
            "Plan with the same parameters= as here."
        )
    divided = [[name for name in group if name in set(part)] for part in parts for group in groups]
    return [group for group in divided if group]


def _is_of_names(part: object) -> bool:
    return isinstance(part, Collection) and not isinstance(part, str) and all(isinstance(name, str) for name in part)
