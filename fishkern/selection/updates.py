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
VALUES = {"entries": "values", "changed": "values", "ended": "last"}  # what a file calls the values of entries


class DeltaUpdate(Frozen):
    """One message of a :class:`DeltaStream`. Made by :meth:`DeltaStream.update`, read by :class:`DeltaReader`. Frozen.

    Args:
        number: 0 for the first of a stream, then one more each time.
        values: New values ``[K]`` by name, one for each of ``entries`` or of ``changed``.
        entries: The selected entries by name, where they are other ones than in the update before; else ``None``.
        changed: Without ``entries``: which of the selected entries the values are of, by their place among them
            (entries of ``[K]``).
        ended: Entries that are selected no more and have moved since the reader last had them, by name.
        last: The values of ``ended`` ``[K]``.
        digests: For each name of the pool the digest of its entries that have never been selected; of number 0 alone.

    Raises:
        ValueError: Values and entries do not fit each other, or number 0 has no entries.
    """

    number: int
    values: Mapping[str, Tensor]
    entries: Mapping[str, Entries] | None
    changed: Mapping[str, Entries]
    ended: Mapping[str, Entries]
    last: Mapping[str, Tensor]
    digests: Mapping[str, str]

    def __init__(
        self,
        number: int,
        values: Mapping[str, Tensor],
        entries: Mapping[str, Entries] | None = None,
        *,
        changed: Mapping[str, Entries] | None = None,
        ended: Mapping[str, Entries] | None = None,
        last: Mapping[str, Tensor] | None = None,
        digests: Mapping[str, str] | None = None,
    ) -> None:
        if number == 0 and entries is None:
            raise ValueError("update 0 of a stream has entries: it is what a reader begins with.")
        if entries is not None and changed is not None:
            raise ValueError("an update has entries, or says which of those before have changed.")
        held = None if entries is None else dict(entries)
        changed, ended, last = dict(changed or {}), dict(ended or {}), dict(last or {})
        for those, of in ((values, changed if held is None else held), (last, ended)):
            sizes = {name: tuple(tensor.shape) for name, tensor in those.items()}
            if sizes != {name: (one.count,) for name, one in of.items()}:
                raise ValueError("values are [K] of the same names as the entries.")
        vars(self).update(number=number, values=dict(values), entries=held, changed=changed)
        vars(self).update(ended=ended, last=last, digests=dict(digests or {}))

    @property
    def nbytes(self) -> int:
        """Bytes of its values, and of its entries as a file has them."""
        tensors = [*self.values.values(), *self.last.values()]
        for entries in (self.entries or self.changed, self.ended):
            tensors += [tensor for one in entries.values() if (tensor := form_of(one, code=True)[1]) is not None]
        return sum(tensor.nbytes for tensor in tensors)

    def __repr__(self) -> str:
        count = sum(len(values) for values in (*self.values.values(), *self.last.values()))
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
        present = ("changed", self.changed) if self.entries is None else ("entries", self.entries)
        for kind, entries, values in ((*present, self.values), ("ended", self.ended, self.last)):
            pool = {}
            for name, selected in entries.items():
                form, tensor = form_of(selected, code=True)
                pool[name] = [list(selected.shape), form]
                if tensor is not None:
                    tensors[f"{kind}:{name}"] = tensor
                tensors[f"{VALUES[kind]}:{name}"] = values[name]
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
            kind = "entries" if "entries" in metadata else "changed"
            present, values = _read_kind(kind, metadata[kind], stored)
            ended, last = _read_kind("ended", metadata["ended"], stored)
            if stored:
                raise ValueError(f"its header does not know {in_brief(min(stored), 80)}")
            return cls(number, values, **{kind: present}, ended=ended, last=last, digests=digests)


def _read_kind(kind: str, text: str, stored: dict[str, StoredTensor]) -> tuple[dict[str, Entries], dict[str, Tensor]]:
    """Read the entries and values of one kind, and take their tensors out of what is stored."""
    pool = read_json(text)
    if not isinstance(pool, dict):
        raise ValueError(f"{kind} are a shape and a form for each name")
    entries, values = {}, {}
    for name, pair in pool.items():
        if not (isinstance(pair, list) and len(pair) == 2):
            raise ValueError(f"{in_brief(name, 80)} has a shape and a form")
        shape, form = checked_entry(name, *pair)
        tensors = {f"{kind}:{name}"} if has_tensor(form) else set()
        if missing := (tensors | {f"{VALUES[kind]}:{name}"}) - stored.keys():
            raise ValueError(f"{in_brief(min(missing), 80)} is missing")
        tensor = stored.pop(f"{kind}:{name}") if tensors else None
        entries[name] = read_entries(name, shape, form, tensor)
        values[name] = _read_values(name, stored.pop(f"{VALUES[kind]}:{name}"))
    return entries, values


def _read_values(name: str, stored: StoredTensor) -> Tensor:
    if not stored.dtype.is_floating_point or len(stored.shape) != 1:
        raise ValueError(
            f"{in_brief(name, 80)} holds {tuple(stored.shape)} {stored.dtype}, and values are [K], floating"
        )
    return stored.read()
