"""What a stream of trained values sends after a step: the values, and their entries where these are new."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from fishkern.files import (
    AnyTensor,
    Format,
    StoredTensor,
    checked_shape,
    in_brief,
    open_tensors,
    parsing,
    read_count,
    read_json,
    save_tensors,
)
from fishkern.selection.entries import Entries
from fishkern.selection.format import checked_entry, form_of, has_tensor, read_entries
from fishkern.selection.frozen import Frozen

FORMAT = Format("fishkern.delta-update", version=1, saved_by="DeltaUpdate.save")


class DeltaUpdate(Frozen):
    """One message of a :class:`DeltaStream`. Made by :meth:`DeltaStream.update`, read by :class:`DeltaReader`. Frozen.

    Args:
        number: 0 for the first of a stream, then one more each time.
        values: For each name with selected entries their values ``[K]``, ascending.
        entries: The selected entries by name, where they are other ones than in the update before; else ``None``.
        ended: Entries that are selected no more and have moved since the reader last had them, by name.
        last: The values of ``ended`` ``[K]``.
        digests: For each name of the pool the digest of its entries that have never moved; of number 0 alone.

    Raises:
        ValueError: Values and entries do not fit each other, or number 0 has no entries.
    """

    number: int
    values: Mapping[str, Tensor]
    entries: Mapping[str, Entries] | None
    ended: Mapping[str, Entries]
    last: Mapping[str, Tensor]
    digests: Mapping[str, str]

    def __init__(
        self,
        number: int,
        values: Mapping[str, Tensor],
        entries: Mapping[str, Entries] | None = None,
        ended: Mapping[str, Entries] | None = None,
        last: Mapping[str, Tensor] | None = None,
        digests: Mapping[str, str] | None = None,
    ) -> None:
        ended, last, digests = dict(ended or {}), dict(last or {}), dict(digests or {})
        if number == 0 and entries is None:
            raise ValueError("update 0 of a stream has entries: it is what a reader begins with.")
        for those, of in ((values, entries), (last, ended)):
            if of is not None and _sizes(those) != {name: (one.count,) for name, one in of.items()}:
                raise ValueError("values are [K] of the same names as the entries.")
        held = None if entries is None else dict(entries)
        vars(self).update(number=number, values=dict(values), entries=held, ended=ended, last=last, digests=digests)

    @property
    def nbytes(self) -> int:
        """Bytes of its values, and of its entries as a file has them."""
        count = sum(values.nbytes for values in (*self.values.values(), *self.last.values()))
        for entries in (*(self.entries or {}).values(), *self.ended.values()):
            _, tensor = form_of(entries, code=True)
            count += 0 if tensor is None else tensor.nbytes
        return count

    def __repr__(self) -> str:
        count = sum(len(values) for values in self.values.values())
        what = "values" if self.entries is None else "entries and values"
        return f"DeltaUpdate(number {self.number}: {count:,} {what}, {self.nbytes / 2**20:.3g} MiB)"

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Save as one ``.safetensors`` file; it appears whole or not at all.

        Args:
            path: ``name.safetensors`` (or ``name``; the suffix is added). Its folder must exist.

        Returns:
            The file to give to :meth:`load`.

        Raises:
            FileExistsError: A file of that name holds something else, such as a model.
            OSError: The folder is missing or read-only, or the disk is full.
        """
        tensors: dict[str, AnyTensor] = {}
        metadata = {"number": str(self.number), "digests": json.dumps(self.digests)}
        kinds = (("entries", self.entries, "values", self.values), ("ended", self.ended, "last", self.last))
        for kind, entries, kind_of_values, values in kinds:
            pool = {}
            for name, selected in (entries or {}).items():
                form, tensor = form_of(selected, code=True)
                pool[name] = [list(selected.shape), form]
                if tensor is not None:
                    tensors[f"{kind}:{name}"] = tensor
            tensors |= {f"{kind_of_values}:{name}": tensor for name, tensor in values.items()}
            if entries is not None:
                metadata[kind] = json.dumps(pool)
        return save_tensors(path, tensors, format=FORMAT, metadata=metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> DeltaUpdate:
        """Load what :meth:`save` wrote.

        Args:
            path: The file, or its name without suffix.

        Returns:
            The update.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is truncated or damaged, holds no update, or was written in a newer format.
        """
        metadata, stored = open_tensors(path, format=FORMAT)
        with parsing(f"{path} holds no valid delta update"):
            number, digests = read_count(metadata["number"]), read_json(metadata["digests"])
            if not isinstance(digests, dict) or not all(isinstance(digest, str) for digest in digests.values()):
                raise ValueError("the digests are a text for each name")
            entries, values = _read_kind("entries", metadata.get("entries"), "values", stored)
            ended, last = _read_kind("ended", metadata["ended"], "last", stored)
            if stored:
                raise ValueError(f"its header does not know {in_brief(min(stored), 80)}")
            return cls(number, values, entries, ended, last, digests)


def _read_kind(
    kind: str, text: str | None, kind_of_values: str, stored: dict[str, StoredTensor]
) -> tuple[dict[str, Entries] | None, dict[str, Tensor]]:
    """Read the entries and values of one kind, and take their tensors out of what is stored."""
    if text is None:
        named = [name for name in stored if name.startswith(f"{kind_of_values}:")]
        return None, {name.partition(":")[2]: _read_values(name, stored.pop(name)) for name in named}
    pool = read_json(text)
    if not isinstance(pool, dict):
        raise ValueError(f"{kind} are a shape and a form for each name")
    entries, values = {}, {}
    for name, pair in pool.items():
        if not (isinstance(pair, list) and len(pair) == 2):
            raise ValueError(f"{in_brief(name, 80)} has a shape and a form")
        shape, form = checked_entry(name, *pair)
        tensors = {f"{kind}:{name}"} if has_tensor(form) else set()
        if missing := (tensors | {f"{kind_of_values}:{name}"}) - stored.keys():
            raise ValueError(f"{in_brief(min(missing), 80)} is missing")
        tensor = stored.pop(f"{kind}:{name}") if tensors else None
        entries[name] = read_entries(name, checked_shape(list(shape)), form, tensor)
        values[name] = _read_values(name, stored.pop(f"{kind_of_values}:{name}"))
    return entries, values


def _read_values(name: str, stored: StoredTensor) -> Tensor:
    if not stored.dtype.is_floating_point or len(stored.shape) != 1:
        raise ValueError(
            f"{in_brief(name, 80)} holds {tuple(stored.shape)} {stored.dtype}, and values are [K], floating"
        )
    return stored.read()


def _sizes(values: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in values.items()}
