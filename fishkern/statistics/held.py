"""The base of all results of a pass over data: their names, provenance, coverage and files."""

from __future__ import annotations

import json
import operator
import os
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NoReturn, Self, TypeVar

import torch
from torch import Tensor

from fishkern.files import (
    PIECE,
    AnyTensor,
    Format,
    StoredTensor,
    check_cast,
    in_brief,
    is_sharded,
    open_tensors,
    parsing,
    pieces,
    read_count,
    read_json,
    save_tensors,
    write_from_ranks,
)
from fishkern.names import renamed, without_wrappers
from fishkern.statistics.choosing import near
from fishkern.statistics.coverage import Covered, check_coverage, merged_coverage
from fishkern.statistics.precision import Precision, merged_precision

Part = TypeVar("Part")


class Held(Mapping[str, Part]):
    """A frozen, read-only mapping from names to what was estimated for them, with count, provenance and coverage.

    A subclass defines its :attr:`FORMAT`, and what it returns for a name: a tensor, or something made of several, whose
    entries :meth:`name_of` assigns to names. Names are those of parameters, or of groups of parameters that
    ``provenance["definition"]["groups"]`` lists.

    Args:
        tensors: The tensors by entry, float32 (or what :attr:`KEEPS` adds); others are converted. Wrappers are removed
            from the names.
        count: Number of units that the tensors are the mean of, at least 1.
        provenance: ``{"definition": {...}, "runs": [{...}, ...]}``, JSON.
        coverage: One :class:`Covered` for every parameter of the model; empty if unknown.
        precision: How precise the mean is; ``None`` if unknown.

    Attributes:
        KEEPS: Dtypes that tensors keep; all of one result have the widest of them. float32 and float64 are possible.

    Raises:
        TypeError: An entry is not a floating tensor, ``count`` is not an integer, or ``provenance`` is not JSON.
        ValueError: Two names become one without wrappers, ``count`` is below 1, a float64 value overflows float32,
            ``provenance`` has other keys, or ``coverage`` contradicts ``tensors``.
    """

    FORMAT: ClassVar[Format]
    KEEPS: ClassVar[tuple[torch.dtype, ...]] = (torch.float32,)

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        *,
        count: int,
        provenance: Mapping[str, Any] | None = None,
        coverage: Mapping[str, Covered] | None = None,
        precision: Precision | None = None,
    ) -> None:
        count = operator.index(count)
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}.")
        dtype = self._dtype_of(tensors)
        tensors = renamed(tensors, lambda entry: self._renamed_entry(entry, without_wrappers))
        entries = {entry: _floating(entry, tensor, dtype) for entry, tensor in tensors.items()}
        names: dict[str, list[str]] = {}
        for entry in entries:
            names.setdefault(self.name_of(entry), []).append(entry)
        coverage = renamed(coverage or {}, without_wrappers)
        text = _provenance_text(provenance or {})
        check_coverage(names, coverage, json.loads(text)["definition"].get("groups", {}))
        # vars() passes the lock of __setattr__. The provenance is kept as text: nobody can change it, and a file stores
        # exactly this.
        vars(self).update(
            _entries=entries, _names=names, _dtype=dtype, _count=count, _provenance=text, _coverage=coverage
        )
        vars(self).update(_precision=precision and precision.renamed(without_wrappers))

    @staticmethod
    def name_of(entry: str) -> str:
        """Say which name an entry belongs to.

        Args:
            entry: An entry of a file.

        Returns:
            By default the entry itself: one tensor for each name.
        """
        return entry

    @property
    def count(self) -> int:
        """Number of units that the tensors are the mean of."""
        return self._count

    @property
    def provenance(self) -> dict[str, Any]:
        """What was computed (``"definition"``) and by which passes (``"runs"``), as a copy."""
        return json.loads(self._provenance)

    @property
    def coverage(self) -> Mapping[str, Covered]:
        """How each parameter of the model was computed, or why it was left out; read-only, empty if unknown."""
        return MappingProxyType(self._coverage)

    @property
    def precision(self) -> Precision | None:
        """How precise the mean is, and how much of its top is right, from the examples themselves.

        :func:`fishkern.estimate` gives it with a :class:`DiagonalFisher` of two batches or more, :func:`fishkern.merge`
        without ``weights=`` that of all. Files keep the summary, without the followed entries. ``None`` for other
        recipes, for tensor parallel models, and after :func:`fishkern.union`, since each part knows only its own top.
        """
        return self._precision

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        """The shape of each tensor by entry, without reading it."""
        return MappingProxyType({entry: tensor.shape for entry, tensor in self._entries.items()})

    @property
    def blocks(self) -> Mapping[str, AnyTensor]:
        """The tensors by entry without reading them: in memory, or on disk, with the dtype there."""
        return MappingProxyType(self._entries)

    @abstractmethod
    def __getitem__(self, name: str) -> Part:
        """Return what was estimated for one name."""

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names  # Mapping's own would read the tensor

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, type(self)):
            return NotImplemented
        return (
            self.count == other.count
            and self.shapes == other.shapes
            and self.coverage == other.coverage
            and _unordered(self.provenance) == _unordered(other.provenance)
            and all(
                torch.equal(ours.cpu(), theirs.cpu())
                for name in self._entries
                for ours, theirs in zip(self.pieces(name), other.pieces(name), strict=True)
            )
        )

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"{type(self).__name__} are frozen: {name} cannot be set.")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"{type(self).__name__} are frozen: {name} cannot be deleted.")

    def pieces(self, entry: str, numel: int = PIECE) -> Iterator[Tensor]:
        """Iterate over one tensor in flat pieces; from disk, with one piece in memory at a time.

        Args:
            entry: Its entry, which is its name where names have one tensor each.
            numel: Coordinates per piece.

        Yields:
            ``[numel]`` (the last one shorter), float32 (or what :attr:`KEEPS` adds), in row-major order.
        """
        for piece in pieces(self._entries[entry], numel):
            yield piece.to(self._dtype)

    def _entries_of(self, name: str) -> list[str]:
        """List the entries of a name, or raise with the reason why there is none."""
        try:
            return self._names[name]
        except KeyError:
            covered = self._coverage.get(name)  # here it can only be left out
            left_out = f"{name} was left out: {covered.reason or 'no reason given'}" if covered else ""
            raise KeyError(left_out or f"{name}{near(name, self)}") from None

    def _read(self, entry: str) -> Tensor:
        """Return one tensor."""
        tensor = self._entries[entry]
        return tensor.read(self._dtype) if isinstance(tensor, StoredTensor) else tensor

    def rename(self, fn: Callable[[str], str]) -> Self:
        """Give every parameter another name, for example that of the same parameter inside a PEFT model.

        Args:
            fn: From the old name to the new one; called for the names left out, of groups and in groups as well.

        Returns:
            A new result with the same tensors, not copied.

        Raises:
            ValueError: Two names become one.
        """
        provenance = self.provenance
        if groups := provenance["definition"].get("groups"):  # these name the entries and the coverage
            provenance["definition"]["groups"] = {
                without_wrappers(fn(group)): [without_wrappers(fn(name)) for name in names]
                for group, names in groups.items()
            }
        return type(self)(
            renamed(self._entries, lambda entry: self._renamed_entry(entry, fn)),
            count=self.count,
            provenance=provenance,
            coverage=renamed(self._coverage, fn),
            precision=self._precision and self._precision.renamed(lambda name: without_wrappers(fn(name))),
        )

    def to(self, device: str | torch.device) -> Self:
        """Bring every tensor to a device, also those on disk.

        Args:
            device: Such as ``"cuda"`` or ``"cpu"``.

        Returns:
            A new result; tensors that are there already are not copied.
        """
        return type(self)(
            {entry: self._read(entry).to(device) for entry in self._entries},
            count=self.count,
            provenance=self.provenance,
            coverage=self._coverage,
            precision=self._precision,
        )

    @classmethod
    def mean(cls, parts: Sequence[Self], shares: Sequence[float], definition: Mapping[str, Any]) -> Self:
        """Take the weighted mean of results of different data, whose definitions, names and shapes are equal.

        Args:
            parts: The results.
            shares: The weight of each; not all of them 0.
            definition: That of the mean.

        Returns:
            mean[entry] = sum_s shares_s * s[entry] / sum_s shares_s, in float64, on the first one's device; ``count``
            is the sum, ``runs`` are concatenated.
        """
        by_counts = list(shares) == [part.count for part in parts]
        tensors = {}
        for name, shape in parts[0].shapes.items():
            tensors[name] = torch.empty(shape, dtype=parts[0]._dtype, device=parts[0].blocks[name].device)
            remaining = tensors[name].view(-1)
            # piece by piece, because float64 copies of whole tensors would take twice the memory of the result
            for aligned in zip(*(part.pieces(name) for part in parts), strict=True):
                doubles = (piece.to(remaining.device, torch.float64) for piece in aligned)
                weighted = (share * double for share, double in zip(shares, doubles, strict=True))
                remaining[: len(aligned[0])] = sum(weighted) / sum(shares)
                remaining = remaining[len(aligned[0]) :]
        return cls(
            tensors,
            count=sum(part.count for part in parts),
            provenance={"definition": definition, "runs": [run for part in parts for run in part.provenance["runs"]]},
            coverage=reduce(merged_coverage, (part.coverage for part in parts)),
            precision=merged_precision([part.precision for part in parts]) if by_counts else None,
        )

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        max_shard_size: str | int | None = "5GB",
    ) -> Path:
        """Save as ``.safetensors``, with count, provenance and coverage in the header.

        If larger than ``max_shard_size``, it is split into shards ``name-00001-of-0000N.safetensors`` with an index
        ``name.safetensors.index.json``, as transformers writes models. An older save of that name is replaced in one
        step: if saving is interrupted, either the old or the new one loads, complete. Results that were loaded lazily
        from the same name must be loaded again afterwards.

        Where the entries are sharded over ranks, all of them call it, and the first writes the same file that one
        process alone would.

        Args:
            path: ``name.safetensors`` (or ``name``; the suffix is added). Its folder must exist.
            dtype: ``None`` for that of the tensors, which is float32 (or what :attr:`KEEPS` adds). To halve the size
                ``torch.bfloat16`` (3 digits, full range) or ``torch.float16`` (4 digits from 6e-5 to 65504, zero below
                6e-8, where most entries of a Fisher are: it is refused if it would turn a non-zero entry into zero).
                Loading gives float32 again.
            max_shard_size: Largest file in bytes, or as ``"5GB"``, ``"500MiB"``; ``None`` for one file.

        Returns:
            The file to give to :meth:`load`: the ``.safetensors``, or the index of its shards.

        Raises:
            FileExistsError: A file of that name contains something else, such as a model.
            OSError: The folder is missing or read-only, or the disk is full.
            ValueError: ``dtype`` or ``max_shard_size`` is none of the above, or an entry overflows ``dtype`` or becomes
                zero in float16; the message names the entry.
            RuntimeError: The rank that writes has failed.
        """
        dtype = self._dtype if dtype is None else dtype
        if dtype not in (*self.KEEPS, torch.bfloat16, torch.float16):
            raise ValueError(f"dtype must be torch.float32, torch.bfloat16 or torch.float16, got {dtype}.")
        coverage = {name: [covered.path, covered.numel, covered.reason] for name, covered in self._coverage.items()}
        metadata = {
            "count": str(self.count),
            "dtype": str(dtype).removeprefix("torch."),
            "provenance": self._provenance,
            "coverage": json.dumps(coverage),
            **({} if self._precision is None else {"precision": json.dumps(self._precision.plain())}),
        }
        options = {"format": self.FORMAT, "metadata": metadata, "dtype": dtype, "max_shard_size": max_shard_size}
        if any(map(is_sharded, self._entries.values())):
            return write_from_ranks(self._entries, lambda tensors: save_tensors(path, tensors, **options))
        return save_tensors(path, self._entries, **options)

    @classmethod
    def _dtype_of(cls, tensors: Mapping[str, AnyTensor]) -> torch.dtype:
        """Choose the dtype of all tensors of a result: float64 if it keeps that and any has it, else float32."""
        doubles = any(isinstance(one, AnyTensor) and one.dtype == torch.float64 for one in tensors.values())
        return torch.float64 if doubles and torch.float64 in cls.KEEPS else torch.float32

    @classmethod
    def _renamed_entry(cls, entry: str, fn: Callable[[str], str]) -> str:
        """Give the name in an entry another name."""
        return fn(entry)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, lazy: bool = False) -> Self:
        """Load a result that :meth:`save` wrote.

        Args:
            path: The file, the index of its shards, or the name without suffix.
            lazy: Read each tensor from disk whenever it is accessed, and keep none in memory.

        Returns:
            The result, float32 (or what :attr:`KEEPS` adds) on the CPU, in the order of the save.

        Raises:
            FileNotFoundError: There is no such file, or a shard is missing.
            ValueError: The file is truncated or damaged, contains something else, or was written in a newer format.
        """
        metadata, stored = open_tensors(path, format=cls.FORMAT)
        with parsing(f"{path} has a damaged header"):
            count = read_count(metadata["count"])
            dtype = metadata["dtype"]
            provenance = read_json(metadata["provenance"])
            coverage = {name: _covered(*entry) for name, entry in read_json(metadata["coverage"]).items()}
            precision = Precision.of_plain(read_json(metadata["precision"])) if "precision" in metadata else None
        for name, tensor in stored.items():
            if (stored_as := str(tensor.dtype).removeprefix("torch.")) != dtype:
                shown, said = in_brief(name, 80), in_brief(dtype, 40)
                raise ValueError(f"{path} holds {shown} as {stored_as}, its header says {said}: save it again.")
        tensors: Mapping[str, AnyTensor] = stored
        if not lazy:
            kept = cls._dtype_of(stored)
            tensors = {name: tensor.read(kept) for name, tensor in stored.items()}
        with parsing(f"{path} holds no valid statistics"):
            return cls(tensors, count=count, provenance=provenance, coverage=coverage, precision=precision)


def _covered(path: object, numel: object, reason: object = "") -> Covered:
    if type(numel) is not int or numel < 0 or not isinstance(path, str) or not isinstance(reason, str):
        raise ValueError(f"coverage is a path, a number of coordinates and a reason, got {[path, numel, reason]}")
    return Covered(path, numel, reason)


def _floating(entry: str, tensor: AnyTensor, dtype: torch.dtype) -> AnyTensor:
    if isinstance(tensor, StoredTensor):
        return tensor
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        what = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"statistics are floating tensors, {entry} is {what}.")
    converted = tensor.detach().to(dtype)
    if tensor.dtype == torch.float64 and dtype != torch.float64:
        check_cast(entry, tensor, converted)
    return converted


def _provenance_text(provenance: Mapping[str, Any]) -> str:
    layout = 'provenance is {"definition": {...}, "runs": [{...}, ...]}'
    if not isinstance(provenance, Mapping):
        raise TypeError(f"{layout}, got {type(provenance).__name__}.")
    if unknown := provenance.keys() - {"definition", "runs"}:
        raise ValueError(f"{layout}, got the keys {sorted(unknown)}.")
    definition, runs = provenance.get("definition", {}), provenance.get("runs", [])
    if not isinstance(definition, Mapping) or not all(isinstance(run, Mapping) for run in runs):
        raise TypeError(f"{layout}, got {definition!r} and {runs!r}.")
    try:
        return json.dumps({"definition": dict(definition), "runs": [dict(run) for run in runs]}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TypeError(f"provenance must be JSON: {error}.") from None


def _unordered(provenance: Mapping[str, Any]) -> tuple[Any, list[str]]:
    return provenance["definition"], sorted(json.dumps(run, sort_keys=True) for run in provenance["runs"])
