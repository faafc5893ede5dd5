"""A selection of parameters that are sharded over processes: each rank has the entries that it holds."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fishkern.files import Region, region_of
from fishkern.ops.streaming_topk import index_dtype
from fishkern.selection.agreement import check_replicas
from fishkern.selection.base import Patterns
from fishkern.selection.entries import Entries
from fishkern.selection.format import save_entries
from fishkern.selection.ranges import Columns, Rows
from fishkern.selection.result import Selection
from fishkern.selection.shards import counts_over_ranks
from fishkern.selection.start import named_tensors
from fishkern.statistics.shards import Ranks


class ShardedSelection(Selection):
    """What :func:`fishkern.select` gives of sharded scores: a selection of which each rank has its own entries.

    :meth:`entries` and :meth:`indices` are those that this rank holds, in the flat numbering of the whole parameter.
    Names, shapes, :attr:`counts`, :attr:`count`, :attr:`density` and :attr:`whole` are those of all ranks together.
    Combining, comparing and saving it are collective operations: every rank calls them. It combines with selections of
    the same parts; :meth:`gathered` makes an ordinary selection of it. Frozen.

    Args:
        entries: For each name of the pool the selected entries that this rank holds.
        regions: For each name the part of the parameter that this rank holds.
        counts: For each name the number of selected entries over all ranks.
        provenance: As for :class:`fishkern.Selection`.

    Raises:
        TypeError: ``provenance`` is not JSON.
    """

    _regions: dict[str, Region]
    _counts: dict[str, int]

    def __init__(
        self,
        entries: Mapping[str, Entries],
        regions: Mapping[str, Region],
        counts: Mapping[str, int],
        *,
        provenance: Mapping[str, Any],
    ) -> None:
        self._hold(dict(entries), provenance)
        vars(self).update(_regions=dict(regions), _counts=dict(counts))

    @property
    def is_sharded(self) -> bool:
        return True

    @property
    def counts(self) -> Mapping[str, int]:
        return dict(self._counts)

    @property
    def whole(self) -> tuple[str, ...]:
        return tuple(name for name, count in self._counts.items() if count == self.shapes[name].numel() > 0)

    def region(self, name: str) -> Region:
        """Say which part of a parameter this rank holds.

        Args:
            name: A name of the pool.

        Returns:
            The part.

        Raises:
            KeyError: The name is not in the pool.
        """
        self.entries(name)
        return self._regions[name]

    def mask(self, name: str) -> Tensor:
        """Give the mask of this rank's part of a parameter.

        Args:
            name: A name of the pool.

        Returns:
            Of the part's shape, as that of ``parameter.to_local()``, bool on the CPU; True = selected.
        """
        region = self.region(name)
        mask = torch.zeros(region.sizes, dtype=torch.bool)
        mask.view(-1)[region.in_part(self.indices(name).long())] = True
        return mask

    def gathered(self) -> Selection:
        """Give every rank the entries of all. A collective operation.

        Returns:
            An ordinary selection, the same on every rank; with the provenance of this one.

        Raises:
            RuntimeError: Another rank has failed.
        """
        return Selection.from_entries(dict(self._gathered(Ranks(), keep=True)), provenance=self.provenance)

    def save(self, path: str | os.PathLike[str], *, max_shard_size: str | int | None = "5GB") -> Path:
        """Save as :meth:`fishkern.Selection.save` does. A collective operation.

        The first rank writes the file that one process would write, whatever the number of ranks. Loading it gives an
        ordinary selection.

        Args:
            path: As there.
            max_shard_size: As there.

        Returns:
            The file, on every rank.

        Raises:
            FileExistsError: As there.
            OSError: As there.
            RuntimeError: Another rank has failed.
        """
        ranks = Ranks()
        entries = dict(self._gathered(ranks, keep=ranks.rank == 0))
        saved = None
        with ranks.failing_together():
            if ranks.rank == 0:
                saved = save_entries(path, entries, self._provenance, max_shard_size=max_shard_size)
        return ranks.gathered(saved)[0]

    def check(self, model: nn.Module | Iterable[tuple[str, Tensor]]) -> None:
        """Check that the selection fits a model that is sharded as the scores were.

        Args:
            model: As for :meth:`fishkern.Selection.check`.

        Raises:
            ValueError: It does not fit, or this rank holds another part of a parameter than of its scores.
        """
        named = named_tensors(model, self._entries)
        super().check(named.items())
        for name, region in self._regions.items():
            if (held := region_of(name, named[name])).ranges != region.ranges:
                raise ValueError(
                    f"this rank holds {_shown(held)} of {name}, and the selection has what was selected of "
                    f"{_shown(region)}: shard the model as it was for the scores, or give selection.gathered()."
                )

    def restrict(self, keep: Patterns | Callable[[str], bool]) -> ShardedSelection:
        narrowed = super().restrict(keep)
        counts = {name: self._counts[name] for name in narrowed.names}
        return ShardedSelection(narrowed._entries, self._of(narrowed.names), counts, provenance=narrowed.provenance)

    def rename(self, fn: Callable[[str], str]) -> ShardedSelection:
        named = super().rename(fn)
        regions, counts = (dict(zip(named.names, of.values(), strict=True)) for of in (self._regions, self._counts))
        return ShardedSelection(named._entries, regions, counts, provenance=named.provenance)

    def with_provenance(self, **entries: Any) -> ShardedSelection:
        provenance = {**self.provenance, **entries}
        return ShardedSelection(self._entries, self._regions, self._counts, provenance=provenance)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Selection):
            return NotImplemented
        alike = other.is_sharded and self._regions == other._regions and self._entries == other._entries
        return all(Ranks().gathered(alike))

    __hash__ = None  # type: ignore[assignment]

    def _gathered(self, ranks: Ranks, *, keep: bool) -> Iterator[tuple[str, Entries]]:
        """Gather the entries of one name after the other; a rank that does not keep them yields none."""
        counts = torch.zeros(ranks.count, len(self._entries), dtype=torch.int64)
        counted = [self.entries(name).count if one.counted else 0 for name, one in self._regions.items()]
        counts[ranks.rank] = torch.tensor(counted, dtype=torch.int64)
        ranks.sum_(counts)
        starts = (counts.cumsum(0) - counts)[ranks.rank].tolist()
        for name, start, own in zip(self._entries, starts, counted, strict=True):
            shape, count = self.shapes[name], self._counts[name]
            if count in (0, shape.numel()):
                if keep:
                    yield name, Entries.all(shape) if count else Entries.none(shape)
                continue
            with ranks.failing_together():
                indices = torch.zeros(count, dtype=index_dtype(shape.numel()))
                if own:
                    indices[start : start + own] = self.indices(name)
            ranks.sum_(indices)  # of which all ranks but one have zeros at a place
            with ranks.failing_together():
                whole = Entries.of(shape, indices, name) if keep else None
            if keep:
                yield name, whole

    def _combined(self, other: Selection, name: str, combine: Callable[[Entries, Entries], Entries]) -> Selection:
        with Ranks().failing_together():
            combined = super()._combined(other, name, combine)
        regions = {**self._regions, **other._regions}
        return _of_own(combined._entries, regions, combined.provenance)

    def _shared(self, other: Selection) -> dict[str, int]:
        with Ranks().failing_together():
            shared = super()._shared(other)
        return counts_over_ranks(shared, self._regions)

    def _check_shapes(self, other: Selection) -> None:
        super()._check_shapes(other)
        for name, region in self._regions.items():
            if name in other and (held := other._regions[name]).ranges != region.ranges:
                raise ValueError(
                    f"one selection has what was selected of {_shown(region)} of {name}, and the other one of "
                    f"{_shown(held)}: they are sharded in two ways. Combine what gathered() gives."
                )

    def _of(self, names: Iterable[str]) -> dict[str, Region]:
        return {name: self._regions[name] for name in names}


def sharded_selection(
    regions: Mapping[str, Region],
    indices: Mapping[str, Tensor],
    *,
    whole: Iterable[str],
    provenance: Mapping[str, Any],
) -> ShardedSelection:
    """Make a selection of what the ranks have selected of their parts. A collective operation.

    Args:
        regions: The pool: the part of each parameter that this rank holds.
        indices: Flat indices into the whole by name, of this rank's part; names may be missing.
        whole: Names that are selected whole.
        provenance: As for :class:`fishkern.Selection`.

    Returns:
        The selection.

    Raises:
        RuntimeError: Ranks that hold the same parts have selected different entries of them, or another rank has
            failed.
    """
    whole = set(whole)
    with Ranks().failing_together():
        entries = {name: _all_of(one) if name in whole else Entries.none(one.shape) for name, one in regions.items()}
        for name, listed in indices.items():
            entries[name] = Entries.of(regions[name].shape, listed, name)
    check_replicas(entries, regions)
    return _of_own(entries, regions, provenance)


def _of_own(entries: Mapping[str, Entries], regions: Mapping[str, Region], provenance: Any) -> ShardedSelection:
    """Count over the ranks what each has, and make a selection of it."""
    counts = counts_over_ranks({name: selected.count for name, selected in entries.items()}, regions)
    return ShardedSelection(entries, regions, counts, provenance=provenance)


def _all_of(region: Region) -> Entries:
    """Select all that a rank holds of a parameter."""
    shape, cut = region.shape, [axis for axis, size in enumerate(region.shape) if region.sizes[axis] != size]
    if not cut:
        return Entries.all(shape)
    if cut == [0]:
        return Entries.of(shape, Rows(region.ranges[0]))
    if cut == [1]:
        return Entries.of(shape, Columns([end * shape[2:].numel() for end in region.ranges[1]]))
    return Entries.of(shape, region.in_whole(torch.arange(region.sizes.numel())))


def _shown(region: Region) -> str:
    return f"[{', '.join(f'{start}:{stop}' for start, stop in region.ranges)}]"
