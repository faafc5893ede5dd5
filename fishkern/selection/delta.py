"""The delta of trained values: what a selection holds after training, small enough to keep one for each task."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn

from fishkern.files import PIECE, AnyTensor, Format, in_brief, open_tensors, parsing, read_json, save_tensors
from fishkern.selection._packed import packed
from fishkern.selection.result import Selection
from fishkern.selection.start import named_tensors
from fishkern.selection.stored import checked_entry, read_indices, read_provenance

FORMAT = Format("fishkern.delta", version=1, saved_by="Delta.save")


class Delta:
    """The values that a model has at the selected entries, and a digest of all others in the pool.

    Training with a masked optimizer moves the selected entries only, so the others are the base model's, and their
    digest tells the base from any other model. Made by :func:`delta`, put back by :func:`apply_delta`. Frozen.

    Args:
        selection: Which entries.
        values: For each name with selected entries their values in ascending order of the entries, ``[K]``, floating.
        digests: For each name of the pool the digest of its other entries.

    Raises:
        ValueError: Names or sizes are not those of the selection.
    """

    def __init__(self, selection: Selection, values: Mapping[str, Tensor], digests: Mapping[str, str]) -> None:
        sizes = {name: tuple(tensor.shape) for name, tensor in values.items()}
        wanted = {name: (count,) for name, count in selection.counts.items() if count}
        if sizes != wanted or digests.keys() != selection.shapes.keys():
            raise ValueError(
                f"values must be [K] of the {len(wanted)} names with selected entries and digests of the "
                f"{len(selection.names)} names of the pool, got {len(sizes)} and {len(digests)} that differ."
            )
        vars(self).update(selection=selection, _values=dict(values), _digests=dict(digests))

    selection: Selection

    @property
    def count(self) -> int:
        """Number of values."""
        return self.selection.count

    def values(self, name: str) -> Tensor:
        """Give the values of one parameter.

        Args:
            name: A name of the selection's pool with selected entries.

        Returns:
            ``[K]`` on the CPU, in ascending order of ``selection.indices(name)``. Not to be changed.
        """
        return self._values[name]

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"a Delta is frozen: {name} cannot be set.")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"a Delta is frozen: {name} cannot be deleted.")

    def __repr__(self) -> str:
        nbytes = sum(values.nbytes for values in self._values.values())
        return f"Delta({self.count:,} values in {len(self._values)} parameters, {nbytes / 2**20:.3g} MiB)"

    def rename(self, fn: Callable[[str], str]) -> Delta:
        """Give every parameter another name, for example that of the same parameter outside a PEFT model.

        Args:
            fn: From the old name to the new one.

        Returns:
            A new delta of the same values.

        Raises:
            ValueError: Two names become one.
        """
        selection = self.selection.rename(fn)
        names = dict(zip(self.selection.names, selection.names, strict=True))
        values = {names[name]: values for name, values in self._values.items()}
        return Delta(selection, values, {names[name]: digest for name, digest in self._digests.items()})

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Save as one ``.safetensors`` file of the selection's size: values, and indices or a bit per coordinate.

        Args:
            path: ``name.safetensors`` (or ``name``; the suffix is added). Its folder must exist.

        Returns:
            The file to give to :meth:`load`.

        Raises:
            FileExistsError: A file of that name holds something else, such as a model.
            OSError: The folder is missing or read-only, or the disk is full.
        """
        tensors: dict[str, AnyTensor] = {}
        pool = {}
        for name, shape in self.selection.shapes.items():
            form = "whole" if name in self.selection.whole else "indices" if name in self._values else "none"
            if form == "indices":
                entries = self.selection.indices(name)
                if -(-shape.numel() // 8) < entries.nbytes:
                    form, entries = "bits", packed(entries, shape.numel())
                tensors[f"entries:{name}"] = entries
            if name in self._values:
                tensors[f"values:{name}"] = self._values[name]
            pool[name] = [list(shape), form, self._digests[name]]
        provenance = json.dumps(self.selection.provenance)
        return save_tensors(path, tensors, format=FORMAT, metadata={"pool": json.dumps(pool), "provenance": provenance})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Delta:
        """Load what :meth:`save` wrote.

        Args:
            path: The file, or its name without suffix.

        Returns:
            The delta.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is truncated or damaged, holds no delta, or was written in a newer format.
        """
        metadata, stored = open_tensors(path, format=FORMAT)
        with parsing(f"{path} holds no valid delta"):
            listed = {name: _checked_entry(name, *entry) for name, entry in read_json(metadata["pool"]).items()}
            pool = {name: (shape, form) for name, (shape, form, _) in listed.items()}
            provenance = read_provenance(metadata["provenance"])
            wanted = {f"entries:{name}" for name, (_, form) in pool.items() if form in ("indices", "bits")}
            wanted |= {f"values:{name}" for name, (_, form) in pool.items() if form != "none"}
            if odd := stored.keys() ^ wanted:
                raise ValueError(f"its header and its tensors disagree on {in_brief(min(odd), 80)}")
            indices, values = {}, {}
            for name, (shape, form) in pool.items():
                if form in ("indices", "bits"):
                    indices[name] = read_indices(name, stored[f"entries:{name}"], shape, form)
                if form != "none":
                    held = stored[f"values:{name}"]
                    if not held.dtype.is_floating_point or held.numel() > shape.numel():
                        raise ValueError(f"{in_brief(name, 80)} {tuple(shape)} holds {held.numel()} {held.dtype}")
                    values[name] = held.read()
            shapes = {name: shape for name, (shape, _) in pool.items()}
            whole = [name for name, (_, form) in pool.items() if form == "whole"]
            selection = Selection(shapes, indices, whole=whole, provenance=provenance)
            return cls(selection, values, {name: digest for name, (_, _, digest) in listed.items()})


def _checked_entry(name: str, shape: object, form: object, digest: object) -> tuple[torch.Size, str, str]:
    if not isinstance(digest, str):
        raise ValueError(f"the digest of {in_brief(name, 80)} is no text")
    return *checked_entry(name, shape, form), digest


@torch.no_grad()
def delta(model: nn.Module, selection: Selection) -> Delta:
    """Take the selected values of a trained model.

    The digest of what is not selected reads the whole pool once.

    Args:
        model: The model, after training.
        selection: What was trained. What was trained outside its pool is not in the delta.

    Returns:
        The values on the CPU, in the model's dtypes.

    Raises:
        ValueError: The selection does not fit the model.
    """
    selection.check(model)
    named = named_tensors(model)
    digests = {name: _digest_of_others(named[name], selection, name) for name in selection.names}
    return _taken(named, selection, digests)


@torch.no_grad()
def apply_delta(model: nn.Module, delta: Delta, *, check: bool = True) -> Delta:
    """Put the values of a delta into the base model that it was trained from.

    One delta may be followed by another of the same base and selection; to go on with that of another selection, apply
    the returned one first. ``model.save_pretrained`` then writes a plain checkpoint with the values merged. Everything
    is checked before anything is written.

    Args:
        model: The base model, in the dtype in which the delta was trained.
        delta: From :func:`delta` or :meth:`Delta.load`.
        check: Compare the digest of what is not selected; without, values are also cast to the model's dtype.

    Returns:
        What stood in those places before.

    Raises:
        ValueError: Names, shapes, dtypes, or the values that are not selected, are not those of the model that the
            delta was taken from.
    """
    selection = delta.selection
    selection.check(model)
    named = named_tensors(model)
    if check:
        for name, values in delta._values.items():
            if values.dtype != named[name].dtype:
                raise ValueError(
                    f"the delta holds {name} as {values.dtype}, the model as {named[name].dtype}: load the model with "
                    f"dtype={values.dtype}, or pass check=False to cast."
                )
        if other := [n for n in selection.names if _digest_of_others(named[n], selection, n) != delta._digests[n]]:
            raise ValueError(
                f"the model is not the delta's base: {len(other)} of {len(selection.names)} parameters differ where "
                f"nothing is selected, such as {other[0]}. Load the base that it was trained from, and for an adapter "
                "its start; undo a delta of another selection first; check=False applies it all the same."
            )
    before = _taken(named, selection, delta._digests)
    for name, values in delta._values.items():
        parameter, flat = named[name], named[name].detach().contiguous().view(-1)
        flat[_places(selection, name, parameter)] = values.to(flat)
        if not parameter.is_contiguous():
            parameter.copy_(flat.view(parameter.shape))
    return before


def _places(selection: Selection, name: str, parameter: Tensor) -> Tensor | slice:
    return slice(None) if name in selection.whole else selection.indices(name).long().to(parameter.device)


def _taken(named: Mapping[str, Tensor], selection: Selection, digests: Mapping[str, str]) -> Delta:
    values = {}
    for name, count in selection.counts.items():
        if count:
            flat = named[name].detach().contiguous().view(-1)
            values[name] = flat[_places(selection, name, flat)].to("cpu", copy=True)
    return Delta(selection, values, digests)


def _digest_of_others(parameter: Tensor, selection: Selection, name: str) -> str:
    """Hash dtype and bytes, with zeros where it is selected; one that is selected whole has no bytes to hash."""
    digest = blake2b(str(parameter.dtype).encode(), digest_size=8)
    if name in selection.whole:
        return digest.hexdigest()
    indices = selection.indices(name)
    flat = parameter.detach().contiguous().view(-1)
    for start in range(0, len(flat), PIECE):
        piece = flat[start : start + PIECE]
        buffer = bytearray(piece.nbytes)
        copy = torch.frombuffer(buffer, dtype=piece.dtype).copy_(piece)
        ends = torch.searchsorted(indices, torch.tensor([start, start + len(piece)], dtype=indices.dtype))
        copy[indices[ends[0] : ends[1]].long() - start] = 0
        digest.update(buffer)
    return digest.hexdigest()
