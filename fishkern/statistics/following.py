"""Entries that are followed through a pass: after each batch, what it has added to them is read from the sums."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fishkern.arguments import fraction_of
from fishkern.ops.streaming_topk import index_dtype
from fishkern.statistics.base import Estimator
from fishkern.statistics.diagonal_fisher import DiagonalFisher
from fishkern.statistics.halving import PARTS, Halves
from fishkern.statistics.precision import DENSITIES, LEAST, Entries, Precision, expected_overlap
from fishkern.statistics.shards import Ranks
from fishkern.statistics.states import States

MOST = 2**18  # entries that are followed, of 52 bytes each with their indices
_SEED = 0
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
        said = "until must be a number such as 0.9, the overlap, or a tuple of two, (overlap, density): (0.9, 0.01)"
        if len(values) != 2:
            raise TypeError(f"{said}, got {argument!r:.80}.")
        try:
            overlap, density = fraction_of(values[0], "until"), fraction_of(values[1], "the density of until")
        except TypeError:
            raise TypeError(f"{said}, got {argument!r:.80}.") from None
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
        Bytes of the places of the followed entries, of their values before and after a batch, of a sum of squares, and
        of a sum in each part of the data.
    """
    return min(total, MOST) * (4 + 2 * 4 + 8 + 4 * PARTS)


class Following:
    """Follow entries of the states of a pass: their sums in parts of the data, and what batches add to them, squared.

    The entries are drawn from all, uniformly and without replacement, by a fixed seed; all of them where there are no
    more than :data:`MOST`. The states are read after each batch, and nothing is changed in them.

    Args:
        states: Those of a diagonal Fisher, with its first batch still to come.
        until: When the pass may stop; ``None`` for the end of the data.
        watching: Whether :attr:`overlap` is wanted in any case.
        ranks: All ranks, whose batches come to parts of the data in turn; ``None`` for this process alone.
        in_step: Those that look at the overlap together; ``None`` for this process alone.

    Attributes:
        overlap: The expected overlap that ``until`` speaks of, when it was last looked at; ``None`` before.

    Raises:
        ValueError: The pool is too small for ``until``.
    """

    def __init__(
        self,
        states: States,
        until: Until | None = None,
        *,
        watching: bool = False,
        ranks: Ranks | None = None,
        in_step: Ranks | None = None,
    ) -> None:
        self._states = states
        self._until = until
        self._watches = watching or until is not None
        self._ranks = Ranks.alone() if ranks is None else ranks
        self._in_step = Ranks.alone() if in_step is None else in_step
        numels = {name: states.numel(name) for name in states.names}
        self._total = sum(numels.values())
        places = _drawn(self._total, min(self._total, MOST))
        self._density = Until.density if until is None else until.density
        self._top = round(self._density * len(places))
        if until is not None and self._top < LEAST:
            raise ValueError(
                f"until= tells the overlap from at least {LEAST} entries, and the top {until.density:.2%} of the pool "
                f"of {self._total:,} has {self._top} that are followed: give a larger density, until=({until.overlap}, "
                "density), or the number of examples, max_examples=."
            )
        self._indices = _by_name(numels, places)
        self._held = dict(self._held_by(states))
        own = [states[name] for name in states.names]
        device = own[0].device if own else torch.device("cpu")
        dtype = torch.float64 if any(one.dtype == torch.float64 for one in own) else torch.float32
        self._now = torch.zeros(len(places), dtype=dtype, device=device)
        self._before = torch.zeros_like(self._now)
        self._squares = torch.zeros(len(places), dtype=torch.float64, device=device)
        self._parts = torch.zeros(PARTS, len(places), dtype=torch.float32, device=device)
        self._units = torch.zeros(PARTS, dtype=torch.int64)
        self._batches = torch.zeros((), dtype=torch.int64)
        self._counted = self._taken = 0  # units and batches of all ranks in step
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
            and self._taken >= _FEWEST
            and self.overlap >= self._until.overlap
        )

    def go_on(self) -> None:
        """Go on after the states, and :attr:`tensors`, have been replaced by those of a checkpoint."""
        self._read()
        counts = torch.stack([self._units.sum(), self._batches])
        self._in_step.sum_(counts)
        self._counted, self._taken = counts.tolist()

    @torch.no_grad()
    def add(self, units: Sequence[int], turn: int) -> None:
        """Read what a turn has added.

        Args:
            units: Number of units of the batch of each rank in step; 0 where it had none.
            turn: Its number, by which its batches come to parts of the data.
        """
        every = sum(units)
        if not every:  # such as a batch without a label where positions are the units: it tells nothing
            return
        before, taken = self._counted, self._taken
        self._taken += self._add(units, turn)
        self._counted += every
        # a pass stops by what it sees at that moment, so it looks anew where it may stop for the first time
        due = _rung(before) != _rung(self._counted) or taken < _FEWEST <= self._taken
        if self._watches and self._top >= LEAST and due:
            self._look()

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
        halves = Halves(self._parts, self._units)
        if not halves.divided:
            return None
        followed = len(self._now)
        sizes = {density: round(density * followed) for density in sorted({*DENSITIES, self._density})}
        sizes = {density: size for density, size in sizes.items() if size >= LEAST}
        noise = halves.noise(list(sizes.values())) if sizes else []
        sums = self._parts.double().sum(0)
        # what is zero but for rounding may come out just below it
        variances = ((self._squares - sums.square() / count) / (batches - 1)).clamp_(min=0)
        means = sums / count
        size = means.square().sum().sqrt()
        deviation = float(variances.sum().sqrt() / size) if size else 0.0
        numels = [len(indices) for indices in self._indices.values()]
        each = (one.cpu().split(numels) for one in (means, (variances / count).sqrt_()))
        entries = {
            name: Entries(indices.long(), *values)
            for (name, indices), *values in zip(self._indices.items(), *each, strict=True)
        }
        return Precision(
            count, batches, self._total, followed, deviation, dict(zip(sizes, noise, strict=True)), entries
        )

    def _held_by(self, states: States) -> Iterator[tuple[str, tuple[slice | Tensor, Tensor]]]:
        """Say which of the followed entries this process has, and where they are in its states."""
        start = 0
        for name, indices in self._indices.items():
            which, places = states.held(name, indices)
            moved = slice(which.start + start, which.stop + start) if isinstance(which, slice) else which + start
            yield name, (moved, places)
            start += len(indices)

    def _add(self, units: Sequence[int], turn: int) -> int:
        """Read what a turn has added; return the number of its batches."""
        if own := units[self._in_step.rank]:
            number = turn * self._ranks.count + self._ranks.rank
            self._put(self._added(), own, number)
            self._count(own, number)
        return sum(map(bool, units))

    def _put(self, added: Tensor, units: int, number: int) -> None:
        """Add what a batch of so many units has added."""
        self._parts[number % PARTS] += added
        added = added.double()
        self._squares.addcmul_(added, added, value=1 / units)

    def _count(self, units: int, number: int) -> None:
        self._units[number % PARTS] += units
        self._batches += 1

    def _added(self) -> Tensor:
        """Read the followed entries, and say how they have grown."""
        self._read()
        return self._now - self._before

    def _read(self) -> None:
        """Read those of the followed entries that this process has."""
        self._now, self._before = self._before, self._now
        for name, (at, places) in self._held.items():
            state, now = self._states[name].reshape(-1), self._now[at]
            if isinstance(at, slice) and (state.dtype, state.device) == (now.dtype, now.device):
                torch.index_select(state, 0, places, out=now)
            else:
                self._now[at] = state.index_select(0, places).to(now)

    def _look(self) -> None:
        """Expect an overlap from what has been added until now, on all ranks in step."""
        parts, units = self._parts, self._units
        if self._in_step.count > 1:
            parts, units = parts.clone(), units.clone()
            self._in_step.sum_(parts)
            self._in_step.sum_(units)
        halves = Halves(parts, units)
        if halves.divided:
            (noise,) = halves.noise([self._top])
            # devices may round otherwise, and all stop together
            self.overlap = self._in_step.gathered(expected_overlap(noise, 1 / self._counted))[0]


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


def _by_name(numels: Mapping[str, int], places: Tensor) -> dict[str, Tensor]:
    """Split places in the pool by parameter."""
    indices, start = {}, 0
    for name, numel in numels.items():
        low, high = torch.searchsorted(places, torch.tensor([start, start + numel])).tolist()
        indices[name] = (places[low:high] - start).to(index_dtype(numel))
        start += numel
    return indices
