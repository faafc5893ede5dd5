"""Entries that are followed through a pass: after each batch, what it has added to them is read from the sums."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from fishkern.arguments import fraction_of
from fishkern.statistics.base import Estimator
from fishkern.statistics.diagonal_fisher import DiagonalFisher
from fishkern.statistics.precision import (
    DENSITIES,
    LEAST,
    Entries,
    Precision,
    expected_overlap,
    noise_of_unit,
)
from fishkern.statistics.shards import Ranks
from fishkern.statistics.states import States

MOST = 2**18  # entries that are followed, of 56 bytes each with their indices
_SEED = 0
_PARTS = 8
# Ways to put eight parts together to halves: the rows of the Hadamard matrix of order 8 but the first, so that two of
# them have no more in common than chance.
_WAYS = [[(way & part).bit_count() % 2 == 0 for part in range(_PARTS)] for way in range(1, _PARTS)]
_FEWEST = 8  # batches, before which a pass does not stop
_STEP = math.log(17 / 16)  # of the logarithm of the number of units, after which the overlap is looked at again


@dataclass(frozen=True)
class Until:
    """When a pass may stop.

    Args:
        overlap: The expected overlap with the top of all further examples, above 0 and below 1.
        density: Size of the top.
    """

    overlap: float
    density: float = 0.005

    @classmethod
    def of(cls, argument: float | tuple[float, float], estimator: Estimator) -> Until:
        """Read the argument of :func:`fishkern.estimate`.

        Args:
            argument: An overlap, or that and a density.
            estimator: The recipe.

        Returns:
            The same, checked.

        Raises:
            ValueError: A number is out of range, or nothing is followed for such a recipe.
            TypeError: It is neither a number nor two of them.
        """
        if not follows(estimator):
            raise ValueError(
                f"until= follows entries of a DiagonalFisher, and {type(estimator).__name__} is another recipe: give "
                "the number of examples, max_examples=."
            )
        values = argument if isinstance(argument, tuple) else (argument, cls.density)
        if len(values) != 2:
            raise TypeError(f"until must be an overlap such as 0.9, or (overlap, density), got {argument!r}.")
        overlap, density = fraction_of(values[0], "until"), fraction_of(values[1], "the density of until")
        if overlap == 1:
            raise ValueError("until must be below 1: a top that is exactly that of all further examples takes them.")
        if density > DENSITIES[-1]:
            raise ValueError(
                f"until= speaks of a top of at most {DENSITIES[-1]:.0%} of the entries, got {density:g}: what is most "
                "of the pool hardly depends on the examples."
            )
        return cls(overlap, density)


def follows(estimator: Estimator) -> bool:
    """Tell whether entries are followed.

    Args:
        estimator: The recipe.

    Returns:
        Whether it is a diagonal Fisher, with its own sums: one for each coordinate, which become Statistics.
    """
    kind = type(estimator)
    own = kind.init is Estimator.init and kind.collect is Estimator.collect
    return isinstance(estimator, DiagonalFisher) and own


def followed_bytes(total: int) -> int:
    """Count the bytes that following takes during a pass.

    Args:
        total: Number of entries of the pool.

    Returns:
        Bytes of the places of the followed entries, two float64 for each, and its sum in each part of the data.
    """
    return min(total, MOST) * (8 + 2 * 8 + 4 * _PARTS)


class Following:
    """Follow entries of the states of a pass: their sums in parts of the data, and what batches add to them, squared.

    The entries are drawn from all, uniformly and without replacement, by a fixed seed; all of them where there are no
    more than :data:`MOST`. The states are read after each batch, and nothing is changed in them.

    Args:
        states: Those of a diagonal Fisher, with its first batch still to come.
        until: When the pass may stop; ``None`` for the end of the data.
        watching: Whether :attr:`overlap` is wanted in any case.

    Attributes:
        overlap: The expected overlap that ``until`` speaks of, when it was last looked at; ``None`` before.

    Raises:
        ValueError: The pool is too small for ``until``.
    """

    def __init__(self, states: States, until: Until | None = None, *, watching: bool = False) -> None:
        self._states = states
        self._until = until
        self._watches = watching or until is not None
        names = states.names
        self._total = sum(states[name].numel() for name in names)
        places = _drawn(self._total, min(self._total, MOST))
        self._indices = _by_name(states, places)
        self._density = Until.density if until is None else until.density
        self._top = round(self._density * len(places))
        if until is not None and self._top < LEAST:
            raise ValueError(
                f"until= tells the overlap from at least {LEAST} entries, and the top {until.density:.2%} of the pool "
                f"of {self._total:,} has {self._top} that are followed: give a larger density, until=({until.overlap}, "
                "density), or the number of examples, max_examples=."
            )
        device = states[names[0]].device if names else torch.device("cpu")
        self._before = torch.zeros(len(places), dtype=torch.float64, device=device)
        self._squares = torch.zeros_like(self._before)
        self._parts = torch.zeros(_PARTS, len(places), dtype=torch.float32, device=device)
        self._units = torch.zeros(_PARTS, dtype=torch.int64)
        self._batches = torch.zeros((), dtype=torch.int64)
        self.overlap: float | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of it, by name."""
        kept = {"squares": self._squares, "parts": self._parts, "units": self._units, "batches": self._batches}
        return {f"followed {name}": tensor for name, tensor in kept.items()}

    @property
    def reached(self) -> bool:
        """Whether the pass may stop."""
        return (
            self._until is not None
            and self.overlap is not None
            and int(self._batches) >= _FEWEST
            and self.overlap >= self._until.overlap
        )

    def go_on(self) -> None:
        """Go on after the states, and :attr:`tensors`, have been replaced by those of a checkpoint."""
        self._before = self._now()

    @torch.no_grad()
    def add(self, units: int, part: int) -> None:
        """Read what a batch has added.

        Args:
            units: Number of its units.
            part: Its number among all batches, by which it comes to a part of the data.
        """
        if not units:  # such as a batch without a label where positions are the units: it tells nothing
            return
        now = self._now()
        added = now - self._before
        self._before = now
        self._parts[part % _PARTS] += added
        self._squares += added.square_().div_(units)
        before = int(self._units.sum())
        self._units[part % _PARTS] += units
        self._batches += 1
        # a pass stops by what it sees at that moment, so it looks anew where it may stop for the first time
        due = _rung(before) != _rung(before + units) or int(self._batches) == _FEWEST
        if self._watches and self._top >= LEAST and due and self._divided:
            (noise,) = self._noise([self._top])
            self.overlap = expected_overlap(noise, 1 / (before + units))

    @torch.no_grad()
    def precision(self, ranks: Ranks) -> Precision | None:
        """Say how precise the sums of all ranks are. A collective operation.

        Args:
            ranks: All ranks.

        Returns:
            The precision; ``None`` if there was a single batch, which has nothing to be compared with.
        """
        for tensor in self.tensors.values():
            ranks.sum_(tensor)
        count, batches = int(self._units.sum()), int(self._batches)
        if not self._divided:
            return None
        followed = len(self._before)
        sizes = {density: round(density * followed) for density in sorted({*DENSITIES, self._density})}
        sizes = {density: size for density, size in sizes.items() if size >= LEAST}
        noise = self._noise(list(sizes.values())) if sizes else []
        sums = self._parts.double().sum(0)
        # what is zero but for rounding may come out just below it
        variances = ((self._squares - sums.square() / count) / (batches - 1)).clamp_(min=0)
        means = sums / count
        size = means.square().sum().sqrt()
        deviation = float(variances.sum().sqrt() / size) if size else 0.0
        numels = [len(indices) for indices in self._indices.values()]
        each = (one.cpu().split(numels) for one in (means, (variances / count).sqrt_()))
        entries = {
            name: Entries(indices.cpu(), *values)
            for (name, indices), *values in zip(self._indices.items(), *each, strict=True)
        }
        return Precision(
            count, batches, self._total, followed, deviation, dict(zip(sizes, noise, strict=True)), entries
        )

    def _now(self) -> Tensor:
        """Read the followed entries of the states."""
        values = [self._states[name].reshape(-1)[indices] for name, indices in self._indices.items()]
        device = self._parts.device
        return torch.cat([one.to(device, torch.float64) for one in values]) if values else torch.zeros(0)

    @property
    def _divided(self) -> bool:
        """Whether there are two parts of the data, which can be compared."""
        return int(self._units.count_nonzero()) > 1

    def _noise(self, counts: Sequence[int]) -> list[float]:
        """Compute the noise of a unit for tops of several sizes, from halves, and from how it has grown to them."""
        halves = self._compared((first, [not one for one in first]) for first in _WAYS)
        noise = noise_of_unit(*halves, counts)
        if not all(self._units):
            return noise
        quarters = [[part % 4 == quarter for part in range(_PARTS)] for quarter in range(4)]
        lesser = noise_of_unit(*self._compared(combinations(quarters, 2)), counts)
        return [
            one + max(0.0, one * (one / less - 1) / math.sqrt(2)) if less else one
            for one, less in zip(noise, lesser, strict=True)
        ]

    def _compared(
        self, pairs: Iterable[tuple[list[bool], list[bool]]]
    ) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[int, int]]]:
        """Sum parts of the data, for pairs of sets of them that both hold something."""
        sums, units = [], []
        for pair in pairs:
            chosen = [torch.tensor(parts) for parts in pair]
            sizes = tuple(int(self._units[parts].sum()) for parts in chosen)
            if all(sizes):
                sums.append(tuple(parts.to(self._parts) @ self._parts for parts in chosen))
                units.append(sizes)
        return sums, units


def _rung(units: int) -> int:
    return int(math.log(units) / _STEP) if units else -1


def _drawn(total: int, count: int) -> Tensor:
    """Draw numbers below ``total``, each set of them as likely as any other, in the memory of ``count``."""
    if count == total:
        return torch.arange(total)
    generator = torch.Generator().manual_seed(_SEED)
    if total < 4 * count:
        return torch.randperm(total, generator=generator)[:count].sort().values
    drawn = torch.empty(0, dtype=torch.int64)
    while len(drawn) < count:  # all numbers are treated alike, so those that differ are a uniform draw
        more = torch.randint(total, (count - len(drawn),), generator=generator)
        drawn = torch.cat([drawn, more]).unique()
    return drawn


def _by_name(states: States, places: Tensor) -> dict[str, Tensor]:
    """Split places in the pool by parameter, each on the device of its state."""
    indices, start = {}, 0
    for name in states.names:
        numel = states[name].numel()
        low, high = torch.searchsorted(places, torch.tensor([start, start + numel])).tolist()
        indices[name] = (places[low:high] - start).to(states[name].device)
        start += numel
    return indices
