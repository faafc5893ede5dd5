"""A selection as a file holds it: of each parameter its indices or a bit for each coordinate, or nothing.

Nothing stands for a parameter that is selected whole, or not at all; the header says which of these it is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fishkern.files import (
    AnyTensor,
    Format,
    StoredTensor,
    checked_shape,
    in_brief,
    open_tensors,
    parsing,
    read_json,
    save_tensors,
)
from fishkern.ops.streaming_topk import index_dtype
from fishkern.selection._packed import packed, unpacked

FORMS = ("indices", "bits", "whole", "none")

FORMAT = Format("fishkern.selection", version=1, saved_by="Selection.save")


def save(
    path: str | os.PathLike[str],
    shapes: Mapping[str, torch.Size],
    entries: Mapping[str, Tensor | None],
    provenance: str,
    *,
    max_shard_size: str | int | None,
) -> Path:
    """Write a selection.

    Args:
        path: See :meth:`fishkern.Selection.save`.
        shapes: The pool.
        entries: Indices ``[K]`` by name, ascending, ``None`` where the parameter is selected whole.
        provenance: JSON.
        max_shard_size: See :meth:`fishkern.Selection.save`.

    Returns:
        The file to give to :func:`load`.
    """
    tensors: dict[str, AnyTensor] = {}
    pool = {}
    for name, entry in entries.items():
        numel = shapes[name].numel()
        form = "whole" if entry is None else "indices" if len(entry) else "none"
        if form == "indices":
            if -(-numel // 8) < entry.nbytes:
                form, entry = "bits", packed(entry, numel)
            tensors[name] = entry
        pool[name] = [list(shapes[name]), form]
    metadata = {"pool": json.dumps(pool), "provenance": provenance}
    return save_tensors(path, tensors, format=FORMAT, metadata=metadata, max_shard_size=max_shard_size)


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what :func:`save` wrote.

    Args:
        path: See :meth:`fishkern.Selection.load`.

    Returns:
        The arguments of :class:`fishkern.Selection`, by name.

    Raises:
        ValueError: Header and tensors are damaged or do not agree.
    """
    metadata, stored = open_tensors(path, format=FORMAT)
    with parsing(f"{path} has a damaged header"):
        provenance = read_provenance(metadata["provenance"])
        pool = {name: checked_entry(name, *entry) for name, entry in read_json(metadata["pool"]).items()}
    if listed := stored.keys() ^ {name for name, (_, form) in pool.items() if form in ("indices", "bits")}:
        odd = in_brief(min(listed), 80)
        raise ValueError(f"{path} is damaged: its header and its tensors disagree on {odd}. Save it again.")
    with parsing(f"{path} holds no valid selection"):
        indices = {name: read_indices(name, tensor, *pool[name]) for name, tensor in stored.items()}
    whole = [name for name, (_, form) in pool.items() if form == "whole"]
    shapes = {name: shape for name, (shape, _) in pool.items()}
    return {"shapes": shapes, "indices": indices, "whole": whole, "provenance": provenance}


def checked_entry(name: str, shape: object, form: object) -> tuple[torch.Size, str]:
    """Demand what a header says of one parameter of a pool.

    Args:
        name: The parameter's name.
        shape: Its shape.
        form: How what is selected of it is held.

    Returns:
        Shape and form.

    Raises:
        ValueError: It is no shape, or none of :data:`FORMS`.
    """
    if form not in FORMS:
        shown = in_brief(repr(form), 40)
        raise ValueError(f"{in_brief(name, 80)} is held as {shown}, which is none of {', '.join(FORMS)}")
    try:
        return checked_shape(shape), form
    except ValueError as error:
        raise ValueError(f"the shape of {in_brief(name, 80)}: {error}") from None


def read_indices(name: str, tensor: StoredTensor, shape: torch.Size, form: str) -> Tensor:
    """Read the list of indices of one parameter.

    Args:
        name: The parameter's name.
        tensor: Its indices ``[K]``, or its bits.
        shape: Its shape.
        form: ``"indices"`` or ``"bits"``.

    Returns:
        Indices, not checked.

    Raises:
        ValueError: The tensor cannot be that.
    """
    numel = shape.numel()
    if form == "indices":
        if tensor.numel() > numel:
            raise ValueError(f"{in_brief(name, 80)} has {numel} coordinates, and {tensor.numel()} indices")
        return tensor.read()
    if (tensor.dtype, tuple(tensor.shape)) != (torch.uint8, (-(-numel // 8),)):
        raise ValueError(f"{in_brief(name, 80)} is said to be bits of {tuple(shape)}, and is not")
    return unpacked(tensor.read(), index_dtype(numel))


def read_provenance(text: str) -> dict[str, Any]:
    """Read where a selection comes from, as far as others rely on its form.

    Args:
        text: JSON.

    Returns:
        The provenance.

    Raises:
        ValueError: It has another form.
    """
    provenance = read_json(text)
    if not isinstance(provenance, dict):
        raise ValueError("provenance is an object of JSON")
    rule, k = provenance.get("rule", {}), provenance.get("k")
    if isinstance(rule, dict) and not isinstance(rule.get("name", ""), str):
        raise ValueError(f"a rule has no name {in_brief(repr(rule['name']), 40)}")
    if not (k is None or type(k) is int):
        raise ValueError(f"k is a number of entries, not {in_brief(repr(k), 40)}")
    for start in (provenance.get("start", {}), provenance.get("start_unselected", {})):
        if not isinstance(start, dict) or not all(map(_is_digest, start.values())):
            raise ValueError("the start is a norm and a sum for each name")
    if not provenance.get("start_unselected", {}).keys() <= provenance.get("start", {}).keys():
        raise ValueError("the start of what is not selected has other names than the start")
    return provenance


def _is_digest(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(number, int | float) for number in value)
