"""What a rule hands back: which coordinates of which parameters, and out of which pool."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fishkern import hosts
from fishkern.files import parsing
from fishkern.names import fitted, listed, renamed, without_wrappers
from fishkern.ops.streaming_topk import index_dtype
from fishkern.selection import algebra, stored
from fishkern.selection.base import Patterns, matching


class Selection:
    """Which coordinates are selected, out of a pool of parameters.

    The pool is every name that was scored, with its shape, also where nothing was selected. Of a parameter that is
    selected whole no list of indices is kept. ``a | b``, ``a & b`` and ``a - b`` combine what is selected; the pool of
    the result is that of both. ``==`` compares the pools and what is selected, not the provenance. Frozen.

    Args:
        shapes: The pool: the shape of each parameter by name, in the model's order. Wrappers are taken out of names.
        indices: Flat (row-major) indices by name, ``[K]``, distinct integers in any order, copied; names may be
            missing.
        whole: Names that are selected whole.
        provenance: Where it comes from, JSON: ``"rule"``, ``"k"``, ``"statistics"``.

    Raises:
        TypeError: Indices are not integer tensors, or ``provenance`` is not JSON.
        ValueError: A name is not in the pool, two names become one without wrappers, a shape is none, or indices repeat
            or lie outside their parameter.
    """

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        indices: Mapping[str, Tensor],
        *,
        whole: Iterable[str] = (),
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        pool = renamed(shapes, without_wrappers)
        pool = {name: torch.Size(shape) for name, shape in pool.items()}
        for name, shape in pool.items():
            if min(shape, default=0) < 0:
                raise ValueError(f"{name} has the shape {tuple(shape)}, and no size is below zero.")
        given = renamed(indices, without_wrappers)
        all_of = {without_wrappers(name) for name in whole}
        for name in [*given, *all_of]:
            if name not in pool:
                raise ValueError(f"{name} is not in the pool of {len(pool)} names: give its shape.")
        entries: dict[str, Tensor | None] = {}
        for name, shape in pool.items():
            entry = given.get(name, torch.empty(0, dtype=torch.int32))
            entries[name] = None if name in all_of and shape.numel() else _checked(name, entry, shape.numel())
        try:
            text = json.dumps(dict(provenance or {}), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise TypeError(f"provenance must be JSON: {error}.") from None
        vars(self).update(_shapes=pool, _entries=entries, _provenance=text)

    @property
    def names(self) -> tuple[str, ...]:
        """The pool: every scored name, in the model's order."""
        return tuple(self._shapes)

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        """The shape of each parameter of the pool."""
        return MappingProxyType(self._shapes)

    @property
    def counts(self) -> Mapping[str, int]:
        """How many coordinates of each parameter of the pool are selected."""
        return {name: self._count(name) for name in self._shapes}

    @property
    def whole(self) -> tuple[str, ...]:
        """The parameters of which every coordinate is selected, kept without a list of indices."""
        return tuple(name for name, entry in self._entries.items() if entry is None)

    @property
    def count(self) -> int:
        """Number of selected coordinates."""
        return sum(self.counts.values())

    @property
    def total(self) -> int:
        """Number of coordinates in the pool."""
        return sum(shape.numel() for shape in self._shapes.values())

    @property
    def density(self) -> float:
        """Selected fraction of the pool; 0 for an empty pool."""
        return self.count / self.total if self.total else 0.0

    @property
    def k(self) -> int | None:
        """How many the rule chose, without what was selected always; ``None`` where no single rule did."""
        return self.provenance.get("k")

    @property
    def provenance(self) -> dict[str, Any]:
        """Where the selection comes from (``"rule"``, ``"k"``, ``"statistics"``), as a fresh copy."""
        return json.loads(self._provenance)

    def indices(self, name: str) -> Tensor:
        """Give the selected coordinates of one parameter.

        Args:
            name: A name of the pool.

        Returns:
            Flat (row-major) indices ``[K]``, ascending, on the CPU; int32, or int64 for a parameter of more than 2^31
            coordinates. Not to be changed.
        """
        entry = self._entry(name)
        if entry is None:
            numel = self._shapes[name].numel()
            return torch.arange(numel, dtype=index_dtype(numel))
        return entry

    def mask(self, name: str) -> Tensor:
        """Give one parameter's mask.

        Args:
            name: A name of the pool.

        Returns:
            Of the parameter's shape, bool on the CPU; True = selected, all False where nothing is.
        """
        entry = self._entry(name)
        if entry is None:
            return torch.ones(self._shapes[name], dtype=torch.bool)
        mask = torch.zeros(self._shapes[name], dtype=torch.bool)
        mask.view(-1)[entry.long()] = True
        return mask

    def __contains__(self, name: object) -> bool:
        return name in self._shapes

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Selection):
            return NotImplemented
        return self._shapes == other._shapes and all(
            ours is theirs is None or (ours is not None and theirs is not None and torch.equal(ours, theirs))
            for ours, theirs in ((entry, other._entries[name]) for name, entry in self._entries.items())
        )

    __hash__ = None  # type: ignore[assignment]

    def __or__(self, other: Selection) -> Selection:
        return self.union(other)

    def __and__(self, other: Selection) -> Selection:
        return self.intersection(other)

    def __sub__(self, other: Selection) -> Selection:
        return self.difference(other)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"a Selection is frozen: {name} cannot be set.")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"a Selection is frozen: {name} cannot be deleted.")

    def __repr__(self) -> str:
        touched = sum(map(bool, self.counts.values()))
        rule = self.provenance.get("rule")
        parts = [
            rule["name"] if isinstance(rule, dict) and "name" in rule else "",
            f"{self.count:,} of {self.total:,} coordinates",
            f"density {self.density:.3g}",
            f"in {touched} of {len(self._shapes)} parameters",
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
        return self._combined(other, algebra.union)

    def intersection(self, other: Selection) -> Selection:
        """Select what both select.

        Args:
            other: Another selection; parameters in both pools must have one shape.

        Returns:
            A new selection, out of both pools.

        Raises:
            ValueError: A parameter has different shapes.
        """
        return self._combined(other, algebra.intersection)

    def difference(self, other: Selection) -> Selection:
        """Select what this one selects and the other does not.

        Args:
            other: Another selection; parameters in both pools must have one shape.

        Returns:
            A new selection, out of both pools.

        Raises:
            ValueError: A parameter has different shapes.
        """
        return self._combined(other, algebra.difference)

    def overlap(self, other: Selection) -> float:
        """Compare two selections by the Jaccard index: selected by both / selected by either.

        Args:
            other: Another selection. A parameter outside a pool counts as one of which nothing is selected.

        Returns:
            From 0 to 1; 1 where neither selects anything.

        Raises:
            ValueError: A parameter has different shapes.
        """
        shared = sum(algebra.shared(self, other).values())
        return algebra.jaccard(shared, self.count, other.count)

    def overlap_by_parameter(self, other: Selection) -> dict[str, float]:
        """Compare two selections parameter by parameter, as :meth:`overlap` does on the whole.

        Args:
            other: Another selection.

        Returns:
            The Jaccard index for each name of either pool.

        Raises:
            ValueError: A parameter has different shapes.
        """
        shared = algebra.shared(self, other)
        ours, theirs = self.counts, other.counts
        names = dict.fromkeys([*self.names, *other.names])
        return {name: algebra.jaccard(shared.get(name, 0), ours.get(name, 0), theirs.get(name, 0)) for name in names}

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
        return self._rebuilt({name: name for name in names})

    def rename(self, fn: Callable[[str], str]) -> Selection:
        """Give every parameter another name, for example that of the same parameter inside a PEFT model.

        Args:
            fn: From the old name to the new one.

        Returns:
            A new selection of the same coordinates.

        Raises:
            ValueError: Two names become one.
        """
        renamed(self._shapes, lambda name: without_wrappers(fn(name)))
        names = {name: without_wrappers(fn(name)) for name in self.names}
        provenance = self.provenance
        for key in ("start", "start_unselected"):  # the digests of bound_to_start are of these very parameters
            if key in provenance:
                provenance[key] = {names.get(name, name): digest for name, digest in provenance[key].items()}
        return self._rebuilt(names, provenance)

    def check(self, model: nn.Module | Iterable[tuple[str, Tensor]]) -> None:
        """Make sure that the selection fits a model: each name of the pool is a parameter of the shape scored.

        Args:
            model: The model, or its named parameters. It may have others besides.

        Raises:
            ValueError: It does not fit; the message says which names and shapes differ.
        """
        if isinstance(model, nn.Module):
            shapes = {n: p.shape for n, p in hosts.named_parameters(model, remove_duplicate=False).items()}
        else:
            given = [(name, parameter.shape) for name, parameter in model]
            names = fitted([name for name, _ in given], self._shapes)
            shapes = {name: shape for name, (_, shape) in zip(names, given, strict=True)}
        faults = []
        if missing := [name for name in self._shapes if name not in shapes]:
            faults.append(f"{len(missing)} of {len(self._shapes)} names are not in the model ({listed(missing)})")
        differing = [
            f"{name} is {tuple(shape)} here and {tuple(shapes[name])} there"
            for name, shape in self._shapes.items()
            if name in shapes and shapes[name] != shape
        ]
        if differing:
            faults.append(f"{len(differing)} shapes differ ({listed(differing)})")
        if faults:
            raise ValueError(
                f"the selection does not fit the model: {'; '.join(faults)}. Select on statistics of this model, or "
                "adapt the selection with rename() or restrict()."
            )

    def save(self, path: str | os.PathLike[str], *, max_shard_size: str | int | None = "5GB") -> Path:
        """Save as ``.safetensors``, whose header says what it is (pool, rule, k, digest of the statistics).

        Of each parameter it holds the indices, or one bit for each coordinate where that is smaller, or nothing where
        it is selected whole or not at all. It appears whole or not at all, as :meth:`Statistics.save` does.

        Args:
            path: ``name.safetensors`` (or ``name``; the suffix is added). Its folder must exist.
            max_shard_size: Largest file in bytes, or as ``"5GB"``; ``None`` for one file.

        Returns:
            The file to give to :meth:`load`.

        Raises:
            FileExistsError: A file of that name holds something else, such as a model.
            OSError: The folder is missing or read-only, or the disk is full.
        """
        return stored.save(path, self._shapes, self._entries, self._provenance, max_shard_size=max_shard_size)

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
        held = stored.load(path)
        with parsing(f"{path} holds no valid selection"):
            return cls(**held)

    def _entry(self, name: str) -> Tensor | None:
        try:
            return self._entries[name]
        except KeyError:
            raise KeyError(f"{name} is not in the pool of {len(self._shapes)} names") from None

    def _count(self, name: str) -> int:
        entry = self._entries[name]
        return self._shapes[name].numel() if entry is None else len(entry)

    def _rebuilt(self, names: Mapping[str, str], provenance: Mapping[str, Any] | None = None) -> Selection:
        return Selection(
            {new: self._shapes[old] for old, new in names.items()},
            {new: entry for old, new in names.items() if (entry := self._entries[old]) is not None},
            whole=[new for old, new in names.items() if self._entries[old] is None],
            provenance=self.provenance if provenance is None else provenance,
        )

    def _combined(self, other: Selection, combine: Callable[[Tensor, Tensor], Tensor]) -> Selection:
        pool, indices = algebra.combined(self, other, combine)
        return Selection(pool, indices, provenance={combine.__name__: [self.provenance, other.provenance]})


def _checked(name: str, indices: Tensor, numel: int) -> Tensor | None:
    """Return a copy of them, ascending, on the CPU, in the smallest dtype, or ``None`` where they are all."""
    if not isinstance(indices, Tensor) or indices.dtype not in (torch.int64, torch.int32) or indices.ndim != 1:
        what = f"{indices.dtype} {tuple(indices.shape)}" if isinstance(indices, Tensor) else type(indices).__name__
        raise TypeError(f"indices are [K], int64 or int32; those of {name} are {what}.")
    indices = indices.detach().cpu()
    if len(indices) == 0:
        return torch.empty(0, dtype=index_dtype(numel))
    if not bool((indices[1:] > indices[:-1]).all()):
        indices = indices.sort().values
    for end in (int(indices[0]), int(indices[-1])):
        if not 0 <= end < numel:
            raise ValueError(f"{name} has {numel} coordinates, but an index is {end}.")
    if not bool((indices[1:] > indices[:-1]).all()):
        raise ValueError(f"the indices of {name} repeat: each coordinate is selected once.")
    return None if len(indices) == numel else indices.to(index_dtype(numel), copy=True)
