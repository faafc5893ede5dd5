"""What a freezer saves: masks, tracks, counts and the history of the readings, as plain values and as a file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fishkern.files import Format, StoredTensor, in_brief, open_tensors, parsing, read_json, save_tensors
from fishkern.freezing.drift import Track
from fishkern.freezing.slices import Key
from fishkern.selection import Entries, Selection
from fishkern.selection.format import checked_entry, form_of, has_tensor, read_entries, read_provenance

FORMAT = Format("fishkern.freezer", version=1, saved_by="Freezer.save")

MASKS = ("initial", "selection")  # prefixes of the tensors of both selections


class Read(NamedTuple):
    """One reading, as the history keeps it.

    Attributes:
        step: Steps of the optimizer that were done before it.
        kept: How many entries were in training.
        scores: The score of each slice in training that had been read before, by ``(parameter name, slice number)``.
    """

    step: int
    kept: int
    scores: dict[Key, float]


@dataclass(frozen=True)
class FreezerState:
    """Everything that the rest of a training depends on.

    Attributes:
        count: Steps that were counted.
        number: Events that have happened.
        read_before: Readings up to the last event, or the first one.
        digest: Of the probe, ``None`` where there is none.
        settings: Slices, drift and statistic in words, which must be the same when training goes on.
        initial: What was trained before the first event.
        selection: What is in training.
        tracks: By slice in training that has been read.
        history: Every reading.
    """

    count: int
    number: int
    read_before: int
    digest: str | None
    settings: dict[str, str]
    initial: Selection
    selection: Selection
    tracks: dict[Key, Track]
    history: list[Read] = field(default_factory=list)

    def to_plain(self) -> dict[str, Any]:
        """Write it as plain values and tensors, which ``torch.load(weights_only=True)`` reads.

        Returns:
            ``"header"``, of JSON's types, and ``"tensors"`` by name; they share memory with this state.
        """
        tensors: dict[str, Tensor] = {}
        pool = {}
        for name in self.initial.names:
            forms = []
            for mask, selection in zip(MASKS, (self.initial, self.selection), strict=True):
                form, tensor = form_of(selection.entries(name))
                forms.append(form)
                if tensor is not None:
                    tensors[f"{mask}:{name}"] = tensor
            pool[name] = [list(self.initial.shapes[name]), *forms]
        tracks = []
        for (name, number), track in self.tracks.items():
            numbers = [track.smoothed, track.variation, track.total, track.readings]
            tracks.append([name, number, *numbers, len(track.reference)])
            tensors |= {_reference(name, number, i): part.cpu() for i, part in enumerate(track.reference)}
        slices = sorted({key for read in self.history for key in read.scores})
        tensors |= _history_tensors(self.history, slices)
        header = {
            "count": self.count,
            "number": self.number,
            "read_before": self.read_before,
            "digest": self.digest,
            "settings": self.settings,
            "pool": pool,
            "provenance": [self.initial.provenance, self.selection.provenance],
            "tracks": tracks,
            "slices": [list(key) for key in slices],
        }
        return {"header": header, "tensors": tensors}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> FreezerState:
        """Read what :meth:`to_plain` gave.

        Args:
            plain: ``"header"`` and ``"tensors"``.

        Returns:
            The state.

        Raises:
            ValueError: It is not the state of a freezer, or is damaged.
        """
        with parsing("this is no state of a freezer"):
            return cls._parsed(plain)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Save as one ``.safetensors`` file, whole or not at all.

        Args:
            path: ``name.safetensors`` (or ``name``; the suffix is added). Its folder must exist.

        Returns:
            The file to give to :meth:`load`.

        Raises:
            FileExistsError: A file of that name holds something else, such as a model.
            OSError: The folder is missing or read-only, or the disk is full.
        """
        plain = self.to_plain()
        metadata = {"freezer": json.dumps(plain["header"], allow_nan=False)}
        return save_tensors(path, plain["tensors"], format=FORMAT, metadata=metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FreezerState:
        """Load what :meth:`save` wrote.

        Args:
            path: The file, or its name without suffix.

        Returns:
            The state, on the CPU.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is truncated or damaged, holds something else, or was written in a newer format.
        """
        header, stored = _opened(path)
        tensors = {name: tensor.read() for name, tensor in stored.items()}
        with parsing(f"{path} holds no valid freezer"):
            return cls._parsed({"header": header, "tensors": tensors})

    @staticmethod
    def selection_in(path: str | os.PathLike[str]) -> Selection:
        """Read what was in training, and leave the references, which are as large as the model, on the disk.

        Args:
            path: As for :meth:`load`.

        Returns:
            The selection.

        Raises:
            FileNotFoundError: As for :meth:`load`.
            ValueError: As for :meth:`load`.
        """
        header, stored = _opened(path)
        place = MASKS.index("selection")
        with parsing(f"{path} holds no valid freezer"):
            own = {name: tensor.read() for name, tensor in stored.items() if name.startswith(f"{MASKS[place]}:")}
            return _selection(header["pool"], place, own, header["provenance"][place])

    @staticmethod
    def count_in(path: str | os.PathLike[str]) -> int:
        """Read how many steps had been counted, and nothing else.

        Args:
            path: As for :meth:`load`.

        Returns:
            The count.

        Raises:
            FileNotFoundError: As for :meth:`load`.
            ValueError: As for :meth:`load`.
        """
        header, _ = _opened(path)
        with parsing(f"{path} holds no valid freezer"):
            return _count(header["count"])

    @classmethod
    def _parsed(cls, plain: Mapping[str, Any]) -> FreezerState:
        header, tensors = plain["header"], dict(plain["tensors"])
        if not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
            raise ValueError("one of its tensors is none")
        selections = [
            _selection(header["pool"], place, tensors, provenance)
            for place, provenance in enumerate(header["provenance"])
        ]
        tracks = dict(_track(entry, tensors) for entry in header["tracks"])
        history = _history(header["slices"], tensors)
        if tensors:
            raise ValueError(f"nothing refers to {in_brief(min(tensors), 80)}")
        digest, settings = header["digest"], dict(header["settings"])
        if not isinstance(digest, str | None) or not all(isinstance(said, str) for said in settings.values()):
            raise ValueError("its digest and its settings are words")
        counts = [_count(header[key]) for key in ("count", "number", "read_before")]
        initial, selection = selections
        return cls(*counts, digest, settings, initial, selection, tracks, history)


class _InMemory(NamedTuple):
    """A tensor in memory that is read as one on disk is."""

    tensor: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    def numel(self) -> int:
        return self.tensor.numel()

    def read(self) -> Tensor:
        return self.tensor


def _opened(path: str | os.PathLike[str]) -> tuple[dict[str, Any], Mapping[str, StoredTensor]]:
    """Read the header of a file, and find its tensors."""
    metadata, stored = open_tensors(path, format=FORMAT)
    with parsing(f"{path} has a damaged header"):
        return read_json(metadata["freezer"]), stored


def _reference(name: str, number: int, place: int) -> str:
    return f"reference:{name}:{number}:{place}"


def _selection(pool: Any, place: int, tensors: dict[str, Tensor], provenance: Any) -> Selection:
    """Read one of the two selections, and take its tensors away."""
    entries: dict[str, Entries] = {}
    for name, (shape, *forms) in pool.items():
        size, form = checked_entry(name, shape, forms[place])
        tensor = tensors.pop(f"{MASKS[place]}:{name}") if has_tensor(form) else None
        entries[name] = read_entries(name, size, form, None if tensor is None else _InMemory(tensor))
    return Selection.from_entries(entries, provenance=read_provenance(json.dumps(provenance)))


def _track(entry: Any, tensors: dict[str, Tensor]) -> tuple[Key, Track]:
    name, number, smoothed, variation, total, readings, parts = entry
    if not isinstance(name, str):
        raise ValueError(f"{in_brief(repr(name), 40)} is no name of a parameter")
    key = name, _count(number)
    for value in (smoothed, variation, total):
        if type(value) is not float or not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{in_brief(repr(value), 40)} is no drift")
    if not 1 <= _count(parts) <= len(tensors):
        raise ValueError(f"a track has no {parts} references")
    reference = tuple(tensors.pop(_reference(*key, place)) for place in range(parts))
    return key, Track(reference, smoothed, variation, total, _count(readings))


def _history_tensors(history: Iterable[Read], slices: list[Key]) -> dict[str, Tensor]:
    """Write the history as one row for each reading; -1 where a slice had no score."""
    history = list(history)
    rows = [[read.scores.get(key, -1.0) for key in slices] for read in history]  # not NaN, which no == finds equal
    scores = torch.tensor(rows, dtype=torch.float64).view(len(history), len(slices))
    return {
        "history:steps": torch.tensor([read.step for read in history], dtype=torch.int64),
        "history:kept": torch.tensor([read.kept for read in history], dtype=torch.int64),
        "history:scores": scores,
    }


def _history(slices: Any, tensors: dict[str, Tensor]) -> list[Read]:
    keys: list[Key] = []
    for name, number in slices:
        if not isinstance(name, str):
            raise ValueError(f"{in_brief(repr(name), 40)} is no name of a parameter")
        keys.append((name, _count(number)))
    steps, kept, scores = (tensors.pop(f"history:{part}") for part in ("steps", "kept", "scores"))
    whole = steps.dtype == kept.dtype == torch.int64 and scores.dtype == torch.float64
    if not whole or steps.ndim != 1 or kept.shape != steps.shape or scores.shape != (len(steps), len(keys)):
        raise ValueError("its history is not a row for each reading")
    return [
        Read(step, count, {key: score for key, score in zip(keys, row, strict=True) if score >= 0})
        for step, count, row in zip(steps.tolist(), kept.tolist(), scores.tolist(), strict=True)
    ]


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{in_brief(repr(value), 40)} is not a count")
    return value
