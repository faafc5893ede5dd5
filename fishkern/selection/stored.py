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

from fishkern.files import AnyTensor, Format, open_tensors, save_tensors
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
    try:
        provenance = json.loads(metadata["provenance"])
        pool = {name: (torch.Size(shape), form) for name, (shape, form) in json.loads(metadata["pool"]).items()}
        for name, (_, form) in pool.items():
            if form not in FORMS:
                raise ValueError(f"{name} is held as {form!r}, which is none of {', '.join(FORMS)}")
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} has a damaged header ({error!r}): copy or save it again.") from None
    if listed := stored.keys() ^ {name for name, (_, form) in pool.items() if form in ("indices", "bits")}:
        raise ValueError(f"{path} is damaged: its header and its tensors disagree on {min(listed)}. Save it again.")
    indices = {}
    try:
        for name, tensor in stored.items():
            shape, form = pool[name]
            if form == "bits" and (tensor.dtype, tensor.numel()) != (torch.uint8, -(-shape.numel() // 8)):
                raise ValueError(f"{name} is said to be bits of {tuple(shape)}, and is not.")
            read = tensor.read()
            indices[name] = unpacked(read, index_dtype(shape.numel())) if form == "bits" else read
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} holds no valid selection: {error}") from None
    whole = [name for name, (_, form) in pool.items() if form == "whole"]
    shapes = {name: shape for name, (shape, _) in pool.items()}
    return {"shapes": shapes, "indices": indices, "whole": whole, "provenance": provenance}
