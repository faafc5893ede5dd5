"""The delta of trained values: the selected entries after training, small enough to keep one for each task."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fishkern import hosts
from fishkern.files import (
    AnyTensor,
    Format,
    StoredTensor,
    in_brief,
    open_tensors,
    parsing,
    read_json,
    save_tensors,
)
from fishkern.selection.format import (
    Form,
    checked_entry,
    form_of,
    has_tensor,
    oldest_format,
    read_entries,
    read_provenance,
)
from fishkern.selection.frozen import Frozen
from fishkern.selection.local import own_entries, own_values
from fishkern.selection.patches import CheckpointLayout, WeightPatch, patch, placed_entries
from fishkern.selection.result import Selection
from fishkern.selection.start import agreed_tensors
from fishkern.selection.stream import DeltaStream
from fishkern.selection.values import check_base, digest_of_others, selected_values

FORMAT = Format("fishkern.delta", version=3, saved_by="Delta.save")


class Delta(Frozen):
    """The trained values of the selected entries, and a digest of all others in the pool.

    Training with a masked optimizer moves the selected entries only, so the others are the base model's, and their
    digest tells the base from any other model. Made by :func:`delta`, written into a model by :func:`apply_delta`.
    Frozen.

    Args:
        selection: Which entries.
        values: For each name with selected entries their values in ascending order of the entries, ``[K]``, floating.
        digests: For each name of the pool the digest of its other entries.

    Raises:
        ValueError: Names or sizes are not those of the selection.
    """

    def __init__(self, selection: Selection, values: Mapping[str, Tensor], digests: Mapping[str, str]) -> None:
        sizes = {name: tuple(tensor.shape) for name, tensor in values.items()}
        expected = {name: (count,) for name, count in selection.counts.items() if count}
        if sizes != expected or digests.keys() != selection.shapes.keys():
            raise ValueError(
                f"values must be [K] of the {len(expected)} names with selected entries and digests of the "
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

    def patches(self, layout: CheckpointLayout | None = None) -> list[WeightPatch]:
        """Give the values as engines of inference take them, such as vLLM's sparse updates of a checkpoint.

        Args:
            layout: Where the entries are in the model's checkpoint, from
                ``fishkern.integrations.layout.checkpoint_layout``; ``None`` for the model's own names and indices.

        Returns:
            One patch for each tensor with selected entries.

        Raises:
            ValueError: A parameter is in no checkpoint, such as that of an adapter.
        """
        placed = placed_entries(self.selection, layout)
        return [patch(name, one.entries, one.values(self._values)) for name, one in placed.items()]

    @staticmethod
    def stream(
        model: nn.Module, *, layout: CheckpointLayout | None = None, dtype: torch.dtype | None = None
    ) -> DeltaStream:
        """Make a stream of updates of a model in training: entries once, then the values alone.

        Args:
            model: See :class:`DeltaStream`.
            layout: See :class:`DeltaStream`.
            dtype: See :class:`DeltaStream`.

        Returns:
            The stream.
        """
        return DeltaStream(model, layout=layout, dtype=dtype)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Save as one ``.safetensors`` file of the selection's size: its values, and about a byte for each entry.

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
        entries = {name: self.selection.entries(name) for name in self.selection.names}
        for name, selected in entries.items():
            form, tensor = form_of(selected, code=True)
            if tensor is not None:
                tensors[f"entries:{name}"] = tensor
            if name in self._values:
                tensors[f"values:{name}"] = self._values[name]
            pool[name] = [list(selected.shape), form, self._digests[name]]
        metadata = {"pool": json.dumps(pool), "provenance": json.dumps(self.selection.provenance)}
        return save_tensors(
            path, tensors, format=oldest_format(FORMAT, (form for _, form, _ in pool.values())), metadata=metadata
        )

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
            pool = {name: _checked_entry(name, *entry) for name, entry in read_json(metadata["pool"]).items()}
            provenance = read_provenance(metadata["provenance"])
            expected = {f"entries:{name}" for name, (_, form, _) in pool.items() if has_tensor(form)}
            expected |= {f"values:{name}" for name, (_, form, _) in pool.items() if form != "none"}
            if odd := stored.keys() ^ expected:
                raise ValueError(f"its header and its tensors disagree on {in_brief(min(odd), 80)}")
            entries, values = {}, {}
            for name, (shape, form, _) in pool.items():
                entries[name] = read_entries(name, shape, form, stored.get(f"entries:{name}"))
                if form != "none":
                    values[name] = _read_values(name, shape, stored[f"values:{name}"])
            selection = Selection.from_entries(entries, provenance=provenance)
            return cls(selection, values, {name: digest for name, (_, _, digest) in pool.items()})


def _checked_entry(name: str, shape: object, form: object, digest: object) -> tuple[torch.Size, Form, str]:
    if not isinstance(digest, str):
        raise ValueError(f"the digest of {in_brief(name, 80)} is no text")
    return *checked_entry(name, shape, form), digest


def _read_values(name: str, shape: torch.Size, stored: StoredTensor) -> Tensor:
    if not stored.dtype.is_floating_point or stored.numel() > shape.numel():
        raise ValueError(f"{in_brief(name, 80)} {tuple(shape)} holds {stored.numel()} {stored.dtype}")
    return stored.read()


@torch.no_grad()
def delta(model: nn.Module, selection: Selection) -> Delta:
    """Take the selected values of a trained model.

    The digest of what is not selected reads the whole pool once. Of a model that FSDP2 shards every rank calls it and
    gets the whole delta, that of one process; one of them saves it.

    Args:
        model: The model, after training.
        selection: What was trained. What was trained outside its pool is not in the delta.

    Returns:
        The values on the CPU, in the model's dtypes.

    Raises:
        TypeError: What is given is no selection.
        ValueError: The selection does not fit the model.
        RuntimeError: Ranks that shard the model have different selections.
    """
    named = agreed_tensors(model, selection)
    selection = selection.gathered()
    selection.check(model)
    digests = {name: digest_of_others(selection, name, named[name]) for name in selection.names}
    return Delta(selection, selected_values(named, selection), digests)


@torch.no_grad()
def apply_delta(model: nn.Module, delta: Delta, *, check: bool = True) -> Delta:
    """Write the values of a delta into the base model that it was trained from.

    One delta may be followed by another of the same base and selection; to go on with that of another selection, apply
    the returned one first. ``model.save_pretrained`` then writes a plain checkpoint with the values merged. Everything
    is checked before anything is written. Into a model that FSDP2 shards every rank writes what it holds; all call it.

    Args:
        model: The base model, in the dtype in which the delta was trained.
        delta: From :func:`delta` or :meth:`Delta.load`.
        check: Compare the digest of what is not selected; without, values are also cast to the model's dtype.

    Returns:
        The values that were there before.

    Raises:
        TypeError: It is no delta.
        ValueError: Names, shapes, dtypes, or the values that are not selected, are not those of the model that the
            delta was taken from.
        RuntimeError: Ranks that shard the model have deltas of different entries.
    """
    if not isinstance(delta, Delta):
        raise TypeError(f"expected a fishkern.Delta, as fishkern.delta gives, got {type(delta).__name__}.")
    selection = delta.selection
    named = agreed_tensors(model, selection)
    selection.check(model)
    if check:
        for name, values in delta._values.items():
            if values.dtype != named[name].dtype:
                raise ValueError(
                    f"the delta holds {name} as {values.dtype}, the model as {named[name].dtype}: load the model with "
                    f"dtype={values.dtype}, or pass check=False to cast."
                )
        check_base(named, selection, delta._digests)
    before = Delta(selection, selected_values(named, selection), delta._digests)
    for name, values in delta._values.items():
        (own, share), parameter = own_entries(selection, name, named[name]), hosts.local_part(named[name])
        values = values if share is None else own_values(values, selection.entries(name), share)
        own.scatter_(parameter, values.to(parameter.device))
    return before
