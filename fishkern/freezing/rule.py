"""Which slices stop training, of those that still train."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from fractions import Fraction
from itertools import accumulate
from typing import Any

from fishkern.arguments import count_of, fraction_of, number, patterns_of
from fishkern.freezing.slices import Key
from fishkern.names import listed
from fishkern.selection.base import Patterns, matching
from fishkern.selection.budgeted import share


@dataclass(frozen=True)
class FreezeRule:
    """Recipe that chooses by their scores which slices stop training.

    A slice stops where its score lies strictly below

        mean + margin * standard deviation

    of the scores of all slices that still train, with the standard deviation of a population. Where all scores are
    equal, nothing stops. ``most``, ``least`` and ``spare`` hold some of these back. The published rule (FisherAdapTune,
    Rostami et al., 2026, arXiv:2606.10196) has ``margin`` alone, ``FreezeRule(1.0, most=None, size_aware=False)``, and
    keeps the best slice of the model where none would be left; ``most``, ``spare``, ``size_aware``, and ``least`` for
    each type are ours.

    Args:
        margin: How far above the mean a score has to be in order to train on. The larger, the more stops: with 1, the
            paper's value, about the top 16 % of normally distributed scores train on after each event, and of those
            about 16 % after the next, unless ``most`` is less. With 0 it is about half, and with -1 what is clearly
            below the others stops, about 16 %.
        most: Largest share of the entries of the whole pool that one event may freeze, in (0, 1]; ``None`` for any. The
            lowest scores go first, until the next slice would exceed it. A slice that is larger than this on its own
            never stops, and the others do not wait for it.
        least: So many slices of each type of parameter train on, those of the highest scores; 0 for no such limit. A
            type is what has the same name in every layer: the name without its numbers.
        spare: Patterns of names (``fnmatch``), as in :class:`~fishkern.Rule`, of parameters that never stop: the head,
            say. They count in the mean and in the standard deviation.
        size_aware: Which go first where ``most`` holds some back, and so which wait for the next event. Two histograms
            of n values drawn anew differ by about 1 / sqrt(n) even if nothing changed, so where readings come from
            other data each time, large slices have low scores and would go first. If true, scores are compared after
            they are multiplied by sqrt(n): by how far they are above what such noise gives to a slice of their size.
            Readings on a fixed probe have no such noise; there it only lets small slices go before large ones of
            similar score, and what stands still, at 0, before both. The threshold never depends on sizes.

    Raises:
        TypeError: An argument is not a number.
        ValueError: ``margin`` is not finite, ``most`` is outside (0, 1], ``least`` is negative, or a pattern is not a
            string.
    """

    margin: float = 1.0
    most: float | None = 0.25
    least: int = 1
    spare: Patterns = ()
    size_aware: bool = True

    def __post_init__(self) -> None:
        spare = patterns_of(self.spare, "spare")
        if not math.isfinite(margin := number(self.margin, "margin")):
            raise ValueError(f"margin must be finite, got {margin}.")
        most = None if self.most is None else fraction_of(self.most, "most")
        least = count_of(self.least, "least")
        vars(self).update(margin=margin, most=most, least=least, spare=spare, size_aware=bool(self.size_aware))

    @property
    def settings(self) -> dict[str, Any]:
        """The rule in plain values, for the header of a file."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return values | {"spare": list(self.spare)}

    def choose(self, scores: Mapping[Key, float], sizes: Mapping[Key, int], total: int) -> frozenset[Key]:
        """Choose the slices that stop.

        The order of the mappings makes no difference. Of equal scores, the name that comes first in the alphabet and
        the smaller number go first.

        Args:
            scores: Of every slice that still trains.
            sizes: Entries of at least these slices.
            total: Entries of the whole pool, of what has stopped already too.

        Returns:
            Which of them stop.

        Raises:
            ValueError: A score is not finite, a slice has no size, ``total`` is less than the slices have, or a pattern
                of ``spare`` matches no name.
        """
        _check(scores, sizes, total)
        spared = set(matching(self.spare, sorted({name for name, _ in scores}), "spare"))
        below = [key for key in self._below_threshold(scores) if key[0] not in spared]
        below.sort(key=lambda key: (scores[key] * math.sqrt(sizes[key]) if self.size_aware else scores[key], key))
        return frozenset(self._within_most(self._without_least(below, scores), sizes, total))

    def _below_threshold(self, scores: Mapping[Key, float]) -> list[Key]:
        """Compare scores with the threshold in fractions, so that rounding puts none of them on its other side."""
        values = {key: Fraction(score) for key, score in scores.items()}
        count, total, margin = len(values), sum(values.values()), Fraction(self.margin)
        spread = count * sum(value * value for value in values.values()) - total * total  # count^2 * variance
        # score < mean + margin * deviation, times count; then both sides are squared and keep their signs
        limit = margin * abs(margin) * spread
        return [key for key, value in values.items() if (far := count * value - total) * abs(far) < limit]

    def _without_least(self, below: list[Key], scores: Iterable[Key]) -> list[Key]:
        """Leave out the last ones of each type that would have too few slices without them."""
        spare = Counter(type_of(name) for name, _ in scores)
        chosen = []
        for key in below:
            if spare[type_of(key[0])] > self.least:
                spare[type_of(key[0])] -= 1
                chosen.append(key)
        return chosen

    def _within_most(self, below: list[Key], sizes: Mapping[Key, int], total: int) -> list[Key]:
        """Take the first ones, as many as one event may freeze."""
        most = total if self.most is None else share(self.most, total)
        fitting = [key for key in below if sizes[key] <= most]
        frozen = accumulate(sizes[key] for key in fitting)
        return [key for key, entries in zip(fitting, frozen, strict=True) if entries <= most]


def type_of(name: str) -> str:
    """Say what a parameter is in every layer.

    Args:
        name: Its canonical name.

    Returns:
        The name with ``*`` for each number: ``"layers.*.mlp.weight"`` of ``"layers.3.mlp.weight"``.
    """
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def _check(scores: Mapping[Key, float], sizes: Mapping[Key, int], total: int) -> None:
    if odd := [f"{name}[{n}] ({score})" for (name, n), score in scores.items() if not math.isfinite(score)]:
        raise ValueError(f"scores must be finite; those of {listed(odd)} are not.")
    if missing := [f"{name}[{n}]" for name, n in scores if (name, n) not in sizes]:
        raise ValueError(f"{len(missing)} of {len(scores)} slices have no size ({listed(missing)}).")
    if (held := sum(sizes[key] for key in scores)) > total:
        raise ValueError(f"total must be the entries of the whole pool, got {total:,}, and the slices have {held:,}.")
