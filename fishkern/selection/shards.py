"""Scores of which each rank holds a part: read where they lie, counted over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from fishkern import hosts
from fishkern.files import PIECE, AnyTensor, Region, StoredTensor, pieces, region_of
from fishkern.statistics.shards import Ranks

_PIECE_ON_GPU = 2**26


class Shards(Mapping[str, AnyTensor]):
    """Scores by name of which each rank holds a part (``DTensor``), some perhaps whole and alike on every rank.

    A mapping to the scores themselves, whose shapes and sizes are those of the whole. Methods that add up over the
    ranks are collective operations: every rank calls them.

    Args:
        scores: By name, the same names and shapes on every rank.

    Attributes:
        regions: The part of each that this rank holds.
        dtype: float32, or float64 where any score has it: each score fits exactly.

    Raises:
        ValueError: A score is distributed in a way that is not served.
    """

    def __init__(self, scores: Mapping[str, AnyTensor]) -> None:
        self._scores = dict(scores)
        self.regions: dict[str, Region] = {name: region_of(name, score) for name, score in scores.items()}
        self.dtype = torch.float64 if any(one.dtype == torch.float64 for one in scores.values()) else torch.float32
        self._ranks = Ranks()

    def __getitem__(self, name: str) -> AnyTensor:
        return self._scores[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._scores)

    def __len__(self) -> int:
        return len(self._scores)

    def only(self, names: Iterable[str]) -> Shards:
        """Give the shards of some names.

        Args:
            names: Some of the names.

        Returns:
            Shards of these alone.
        """
        return Shards({name: self[name] for name in names})

    def part(self, name: str) -> AnyTensor:
        """Give the part of a score that this rank holds.

        Args:
            name: A name.

        Returns:
            An ordinary tensor of the shape ``regions[name].sizes``, or one on disk.
        """
        return hosts.local_part(self[name])

    def pieces(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """Go through this rank's part of a score.

        Args:
            name: A name.

        Yields:
            The flat index in the part of the first score of a piece, and the piece ``[n]``, of :attr:`dtype`.
        """
        first, part = 0, self.part(name)
        for piece in pieces(part, PIECE if part.device.type == "cpu" else _PIECE_ON_GPU):
            yield first, piece.to(self.dtype)
            first += len(piece)

    def counted(self) -> list[str]:
        """List the scores whose part this rank counts, so that each entry is counted by one rank."""
        return [name for name, region in self.regions.items() if region.counted]

    def own(self, name: str, indices: Tensor) -> Tensor:
        """Leave the entries that this rank holds.

        Args:
            name: A name.
            indices: Flat indices into the whole, ``[K]``, int64.

        Returns:
            Those inside this rank's part, in the same order.
        """
        return indices[self.regions[name].holds(indices)]

    def together(self) -> AbstractContextManager[None]:
        """Let an error of one rank inside the ``with`` block end the work on all."""
        return self._ranks.failing_together()

    def gathered(self, value: Any) -> list[Any]:
        """Collect a small value from every rank. A collective operation.

        Args:
            value: Anything that pickles.

        Returns:
            The values, by rank.
        """
        return self._ranks.gathered(value)

    def summed(self, count: Callable[[], Tensor]) -> Tensor:
        """Add up what the ranks count. A collective operation; an error of one rank ends the work on all.

        Args:
            count: Counts on this rank; of the same shape and dtype on all.

        Returns:
            The sum.
        """
        with self.together():
            counts = count()
        self._ranks.sum_(counts)
        return counts

    def counts(self, indices: Mapping[str, Tensor]) -> dict[str, int]:
        """Count how many entries the ranks have listed. A collective operation.

        Args:
            indices: This rank's, by name; names may be missing.

        Returns:
            For each name the number over all ranks.
        """
        return counts_over_ranks({name: len(indices.get(name, ())) for name in self}, self.regions)

    def first_nan(self) -> tuple[str, int] | None:
        """Find the first score that is NaN. A collective operation.

        Returns:
            Its name and flat index, on all ranks alike; ``None`` if there is none.
        """
        with self.together():
            first = next(((n, at) for n, name in enumerate(self) if (at := self._first_nan(name)) is not None), None)
        found = min((one for one in self.gathered(first) if one is not None), default=None)
        return found and (list(self)[found[0]], found[1])

    def read(self, places: Mapping[str, range]) -> dict[str, Tensor]:
        """Read some neighbouring scores. A collective operation.

        Args:
            places: Flat indices into the whole, by name.

        Returns:
            The scores at each, float32 on the CPU, on all ranks.
        """
        ends = list(accumulate(map(len, places.values()), initial=0))

        def own() -> Tensor:
            values = torch.zeros(ends[-1])
            for start, (name, place) in zip(ends, places.items(), strict=False):
                if (region := self.regions[name]).counted:
                    indices = torch.arange(place.start, place.stop)
                    inside = region.holds(indices)
                    own = region.in_part(indices[inside])
                    if len(own):  # neighbours in the whole are neighbours in the part
                        read = read_at(self.part(name), range(int(own[0]), int(own[-1]) + 1))
                        values[start : start + len(place)][inside] = read
            return values.view(torch.int32)  # which adds up to the same bits, since all others have zeros there

        values = self.summed(own).view(torch.float32)
        return dict(zip(places, values.split([len(place) for place in places.values()]), strict=True))

    def _first_nan(self, name: str) -> int | None:
        for first, piece in self.pieces(name):
            if piece.sum().isnan() and (nan := piece.isnan()).any():  # the sum is the quicker look
                place = nan.nonzero()[:1, 0].cpu() + first
                return int(self.regions[name].in_whole(place))
        return None


def read_at(score: AnyTensor, place: range) -> Tensor:
    """Read neighbouring scores.

    Args:
        score: In memory or on disk.
        place: Their flat indices.

    Returns:
        The scores, float32 on the CPU.
    """
    if isinstance(score, StoredTensor):
        return next(score.pieces(len(place), start=place.start)).float() if place else torch.empty(0)
    return score.reshape(-1)[place.start : place.stop].float().cpu()


def counts_over_ranks(counts: Mapping[str, int], regions: Mapping[str, Region]) -> dict[str, int]:
    """Add up counts over the ranks, what several hold once. A collective operation.

    Args:
        counts: This rank's, by name.
        regions: What this rank holds, by name.

    Returns:
        The sums.
    """
    own = [count if regions[name].counted else 0 for name, count in counts.items()]
    total = torch.tensor(own, dtype=torch.int64)
    Ranks().sum_(total)
    return dict(zip(counts, total.tolist(), strict=True))
