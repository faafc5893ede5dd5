"""The result of a rule: which coordinates of which parameters, and out of which pool."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from fishkern import hosts
from fishkern.arguments import json_of
from fishkern.files import parsing
from fishkern.names import fitted, listed, renamed, without_wrappers
from fishkern.selection.base import Patterns, matching
from fishkern.selection.entries import Entries
from fishkern.selection.format import load_entries, save_entries
from fishkern.selection.frozen import Frozen
from fishkern.selection.ranges import Columns, Ranges, Rows


class Selection(Frozen):
    """Which coordinates are selected, out of a pool of parameters.

    The pool is every name that was scored, with its shape, also where nothing was selected. Parameters that are
    selected whole, and ranges of rows or columns, need no list of indices. ``a | b``, ``a & b`` and ``a - b`` combine
    what is selected; the pool of the result is that of both. ``==`` compares the pools and what is selected, not the
    provenance, nor whether entries are listed or in ranges. Frozen.

    Args:
        shapes: The pool: the shape of each parameter by name, in the model's order. Wrappers are taken out of names.
        indices: Flat (row-major) indices by name, ``[K]``, distinct integers in any order, copied; names may be
            missing.
        whole: Names that are selected whole.
        ranges: :class:`Rows` or :class:`Columns` by name, of parameters that are not in ``indices`` or ``whole``.
        provenance: Where it comes from, JSON: ``"rule"``, ``"k"``, ``"statistics"``.

    Raises:
        TypeError: Indices are not integer tensors, ranges are neither rows nor columns, or ``provenance`` is not JSON.
        ValueError: A name is not in the pool, or in ``ranges`` and elsewhere; two names become one without wrappers; a
            size is below zero; or indices repeat, or something is outside its parameter.
    """

    _entries: dict[str, Entries]
    _pool: dict[str, torch.Size]
    _provenance: str  # JSON, so that nobody changes it

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        indices: Mapping[str, Tensor],
        *,
        whole: Iterable[str] = (),
        ranges: Mapping[str, Rows | Columns] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        pool = {name: _checked_shape(name, shape) for name, shape in renamed(shapes, without_wrappers).items()}
        by_list = renamed(indices, without_wrappers)
        by_range = renamed(ranges or {}, without_wrappers)
        all_of = {without_wrappers(name) for name in whole}
        for name in [*by_list, *by_range, *all_of]:
            if name not in pool:
                raise ValueError(f"{name} is not in the pool of {len(pool)} names: give its shape.")
        for name, given in by_range.items():
            if name in by_list or name in all_of:
                raise ValueError(f"{name} is in ranges= and in {'indices' if name in by_list else 'whole='}: give one.")
            if not isinstance(given, Ranges):
                raise TypeError(f"ranges are Rows or Columns; those of {name} are {type(given).__name__}.")
        entries = {name: Entries.all(shape) if name in all_of else Entries.none(shape) for name, shape in pool.items()}
        for name, selected in {**by_list, **by_range}.items():
            if name not in all_of:
                entries[name] = Entries.of(pool[name], selected, name)
        self._hold(entries, provenance or {})

    @classmethod
    def from_entries(cls, entries: Mapping[str, Entries], *, provenance: Mapping[str, Any] | None = None) -> Selection:
        """Make a selection from the selected entries of each parameter.

        Args:
            entries: For each name of the pool, in the model's order.
            provenance: Where it comes from, JSON.

        Returns:
            The selection.

        Raises:
            TypeError: ``provenance`` is not JSON.
            ValueError: Two names become one without wrappers.
        """
        selection = Selection.__new__(Selection)  # also for a subclass, which has more to hold
        selection._hold(renamed(entries, without_wrappers), provenance or {})
        return selection

    def _hold(self, entries: dict[str, Entries], provenance: Mapping[str, Any]) -> None:
        pool = {name: selected.shape for name, selected in entries.items()}
        vars(self).update(_entries=entries, _pool=pool, _provenance=json_of(provenance, "provenance"))

    def __setstate__(self, state: dict[str, Any]) -> None:
        if (shapes := state.get("_shapes")) is None:
            vars(self).update(state)
            return
        # An older pickle: for each name a list of indices, or None for all.
        entries = {
            name: Entries.all(shapes[name]) if indices is None else Entries.of(shapes[name], indices, name)
            for name, indices in state["_entries"].items()
        }
        self._hold(entries, json.loads(state["_provenance"]))

    @property
    def names(self) -> tuple[str, ...]:
        """The pool: every scored name, in the model's order."""
        return tuple(self._entries)

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        """The shape of each parameter of the pool."""
        return MappingProxyType(self._pool)

    @property
    def counts(self) -> Mapping[str, int]:
        """How many coordinates of each parameter of the pool are selected."""
        return {name: entries.count for name, entries in self._entries.items()}

    @property
    def whole(self) -> tuple[str, ...]:
        """The parameters of which every coordinate is selected."""
        return tuple(name for name, entries in self._entries.items() if entries.is_all)

    @property
    def count(self) -> int:
        """Number of selected coordinates."""
        return sum(self.counts.values())

    @property
    def total(self) -> int:
        """Number of coordinates in the pool."""
        return sum(entries.shape.numel() for entries in self._entries.values())

    @property
    def density(self) -> float:
        """Selected fraction of the pool; 0 for an empty pool."""
        return self.count / self.total if self.total else 0.0

    @property
    def k(self) -> int | None:
        """How many the rule chose, without those of ``always``; ``None`` where it was not a single rule."""
        return self.provenance.get("k")

    @property
    def is_sharded(self) -> bool:
        """Whether this rank has the entries of its own parts alone, as a :class:`fishkern.ShardedSelection` does."""
        return False

    @property
    def provenance(self) -> dict[str, Any]:
        """Where the selection comes from (``"rule"``, ``"k"``, ``"statistics"``), as a fresh copy."""
        return json.loads(self._provenance)

    def entries(self, name: str) -> Entries:
        """Return the selected entries of one parameter: all, a list, or ranges of rows or columns.

        Args:
            name: A name of the pool.

        Returns:
            The entries; ``.ranges`` are their :class:`Rows` or :class:`Columns`, ``None`` where they are listed.

        Raises:
            KeyError: The name is not in the pool.
        """
        try:
            return self._entries[name]
        except KeyError:
            raise KeyError(f"{name} is not in the pool of {len(self._entries)} names") from None

    def indices(self, name: str) -> Tensor:
        """List the selected coordinates of one parameter.

        Args:
            name: A name of the pool.

        Returns:
            Flat (row-major) indices ``[K]``, ascending, on the CPU; int32, or int64 for a parameter of more than 2^31
            coordinates. Not to be changed.
        """
        return self.entries(name).indices()

    def mask(self, name: str) -> Tensor:
        """Give one parameter's mask.

        Args:
            name: A name of the pool.

        Returns:
            Of the parameter's shape, bool on the CPU; True = selected, all False where nothing is.
        """
        return self.entries(name).mask()

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __eq__(self, other: object) -> bool:
        return self._entries == other._entries if isinstance(other, Selection) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __or__(self, other: Selection) -> Selection:
        return self.union(other)

    def __and__(self, other: Selection) -> Selection:
        return self.intersection(other)

    def __sub__(self, other: Selection) -> Selection:
        return self.difference(other)

    def __repr__(self) -> str:
        touched = sum(map(bool, self.counts.values()))
        rule = self.provenance.get("rule")
        parts = [
            rule["name"] if isinstance(rule, dict) and "name" in rule else "",
            f"{self.count:,} of {self.total:,} coordinates",
            f"density {self.density:.3g}",
            f"in {touched} of {len(self._entries)} parameters",
            f"{len(self.whole)} whole" if self.whole else "",
        ]
        return f"Selection({', '.join(filter(None, parts))})"

    def union(self, other: Selection) -> Selection:
        """Select what either selects.

        Args:
            other: Another selection; parameters in both pools must have one shape.

        Returns:
            A new selection, out of both pools.

        Raises:
            ValueError: A parameter has different shapes.
        """
        return self._combined(other, "union", Entries.__or__)

    def intersection(self, other: Selection) -> Selection:
        """Select what both select.

        Args:
            other: Another selection; parameters in both pools must have one shape.

        Returns:
            A new selection, out of both pools.

        Raises:
            ValueError: A parameter has different shapes.
        """
        return self._combined(other, "intersection", Entries.__and__)

    def difference(self, other: Selection) -> Selection:
        """Select what this one selects and the other does not.

        Args:
            other: Another selection; parameters in both pools must have one shape.

        Returns:
            A new selection, out of both pools.

        Raises:
            ValueError: A parameter has different shapes.
        """
        return self._combined(other, "difference", Entries.__sub__)

    def overlap(self, other: Selection) -> float:
        """Compare two selections by the Jaccard index: selected by both / selected by either.

        Args:
            other: Another selection. A parameter outside a pool counts as one of which nothing is selected.

        Returns:
            From 0 to 1; 1 where neither selects anything.

        Raises:
            ValueError: A parameter has different shapes.
        """
        return _jaccard(sum(self._shared(other).values()), self.count, other.count)

    def overlap_by_parameter(self, other: Selection) -> dict[str, float]:
        """Compare two selections parameter by parameter, as :meth:`overlap` does on the whole.

        Args:
            other: Another selection.

        Returns:
            The Jaccard index for each name of either pool.

        Raises:
            ValueError: A parameter has different shapes.
        """
        shared = self._shared(other)
        ours, theirs = self.counts, other.counts
        names = dict.fromkeys([*self.names, *other.names])
        return {name: _jaccard(shared.get(name, 0), ours.get(name, 0), theirs.get(name, 0)) for name in names}

    def restrict(self, keep: Patterns | Callable[[str], bool]) -> Selection:
        """Narrow the pool.

        Args:
            keep: Patterns of names as in a rule's ``always``, or a predicate of the name.

        Returns:
            A new selection out of these parameters only.

        Raises:
            ValueError: A pattern matches no name.
        """
        if callable(keep):
            names = [name for name in self.names if keep(name)]
        else:
            names = matching((keep,) if isinstance(keep, str) else keep, self.names, "keep")
        entries = {name: self._entries[name] for name in names}
        return Selection.from_entries(entries, provenance=self.provenance)

    def rename(self, fn: Callable[[str], str]) -> Selection:
        """Give every parameter another name, for example that of the same parameter inside a PEFT model.

        Args:
            fn: From the old name to the new one.

        Returns:
            A new selection of the same coordinates.

        Raises:
            ValueError: Two names become one.
        """
        names = {name: without_wrappers(fn(name)) for name in self.names}
        provenance = self.provenance
        for key in ("start", "start_unselected"):  # the digests of bound_to_start are of these very parameters
            if key in provenance:
                provenance[key] = {names.get(name, name): digest for name, digest in provenance[key].items()}
        return Selection.from_entries(renamed(self._entries, names.__getitem__), provenance=provenance)

    def check(self, model: nn.Module | Iterable[tuple[str, Tensor]]) -> None:
        """Check that the selection fits a model: each name of the pool is a parameter of the scored shape.

        Args:
            model: The model, or its named parameters. It may have others as well.

        Raises:
            ValueError: It does not fit; the message says which names and shapes differ.
        """
        if isinstance(model, nn.Module):
            shapes = {n: p.shape for n, p in hosts.named_parameters(model, remove_duplicate=False).items()}
        else:
            given = [(name, parameter.shape) for name, parameter in model]
            names = fitted([name for name, _ in given], self._entries)
            shapes = {name: shape for name, (_, shape) in zip(names, given, strict=True)}
        faults = []
        if missing := [name for name in self._entries if name not in shapes]:
            faults.append(f"{len(missing)} of {len(self._entries)} names are not in the model ({listed(missing)})")
        differing = [
            f"{name} is {tuple(shape)} here and {tuple(shapes[name])} there"
            for name, shape in self.shapes.items()
            if name in shapes and shapes[name] != shape
        ]
        if differing:
            faults.append(f"{len(differing)} shapes differ ({listed(differing)})")
        if faults:
            raise ValueError(
                f"the selection does not fit the model: {'; '.join(faults)}. Select on statistics of this model, or "
                "adapt the selection with rename() or restrict()."
            )

    def with_provenance(self, **entries: Any) -> Selection:
        """Say more of where the selection comes from.

        Args:
            entries: Entries of the provenance, JSON; they replace those of the same name.

        Returns:
            A selection of the same coordinates.

        Raises:
            TypeError: They are not JSON.
        """
        return Selection.from_entries(self._entries, provenance={**self.provenance, **entries})

    def gathered(self) -> Selection:
        """Give the selection of all ranks together.

        Returns:
            This one; of a :class:`fishkern.ShardedSelection` an ordinary one, on every rank.
        """
        return self

    def save(self, path: str | os.PathLike[str], *, max_shard_size: str | int | None = "5GB") -> Path:
        """Save as ``.safetensors``, whose header says what it is (pool, rule, k, digest of the statistics).

        Of each parameter it holds the indices, or one bit for each coordinate where that is smaller. Parameters that
        are selected whole or not at all, and ranges, are in the header alone; a file with ranges is of format 2. It
        appears whole or not at all, as that of :meth:`Statistics.save` does.

        Args:
            path: ``name.safetensors`` (or ``name``; the suffix is added). Its folder must exist.
            max_shard_size: Largest file in bytes, or as ``"5GB"``; ``None`` for one file.

        Returns:
            The file to give to :meth:`load`.

        Raises:
            FileExistsError: A file of that name holds something else, such as a model.
            OSError: The folder is missing or read-only, or the disk is full.
        """
        return save_entries(path, self._entries, self._provenance, max_shard_size=max_shard_size)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Selection:
        """Load what :meth:`save` wrote.

        Args:
            path: The file, the index of its shards, or the name without suffix.

        Returns:
            The selection.

        Raises:
            FileNotFoundError: There is no such file, or a shard is missing.
            ValueError: The file is truncated or damaged, holds no selection, or was written in a newer format.
        """
        entries, provenance = load_entries(path)
        with parsing(f"{path} holds no valid selection"):
            return cls.from_entries(entries, provenance=provenance)

    def _combined(self, other: Selection, name: str, combine: Callable[[Entries, Entries], Entries]) -> Selection:
        """Combine two selections parameter by parameter; outside a pool nothing of a parameter is selected."""
        self._check_shapes(other)
        entries = {}
        for parameter, shape in {**self.shapes, **other.shapes}.items():
            nothing = Entries.none(shape)
            ours, theirs = (one._entries.get(parameter, nothing) for one in (self, other))
            entries[parameter] = combine(ours, theirs)
        return Selection.from_entries(entries, provenance={name: [self.provenance, other.provenance]})

    def _shared(self, other: Selection) -> dict[str, int]:
        """Count for each parameter of both pools the coordinates that both select."""
        self._check_shapes(other)
        return {name: ours.shared(other._entries[name]) for name, ours in self._entries.items() if name in other}

    def _check_shapes(self, other: Selection) -> None:
        check_selection(other)
        if self.is_sharded != other.is_sharded:
            raise ValueError(
                "one selection has this rank's entries alone, and the other one those of all ranks: give "
                "selection.gathered() for the former, on all ranks."
            )
        for name, shape in self.shapes.items():
            if name in other and (theirs := other._entries[name].shape) != shape:
                raise ValueError(
                    f"{name} is {tuple(shape)} in one selection and {tuple(theirs)} in the other: they are not of one "
                    "model."
                )


def check_selection(value: Any) -> None:
    """Refuse what is no selection, where one is expected.

    Args:
        value: What was given.

    Raises:
        TypeError: It is something else.
    """
    if not isinstance(value, Selection):
        raise TypeError(
            f"expected a fishkern.Selection, got {type(value).__name__}: scores become one by fishkern.select(scores, "
            "rule), with a rule such as fishkern.GlobalTopK(density=0.005)."
        )


def _jaccard(shared: int, ours: int, theirs: int) -> float:
    """Divide how many are in both by how many are in either; 1 where neither has any."""
    return shared / (ours + theirs - shared) if ours or theirs else 1.0


def _checked_shape(name: str, shape: Sequence[int]) -> torch.Size:
    shape = torch.Size(shape)
    if min(shape, default=0) < 0:
        raise ValueError(f"{name} has the shape {tuple(shape)}, and no size is below zero.")
    return shape
