"""The format of a selection's file: of each parameter its indices, or a bit for each coordinate, or nothing.

The header says for each parameter its shape and its form. ``"whole"`` and ``"none"`` need no tensor, and neither do
ranges, ``{"rows": [[start, stop], ...]}`` and ``{"columns": [[start, stop], ...]}``. A file with ranges is of format 2;
one without them is of format 1, which an older fishkern reads as well. A delta's file may also have indices in the code
of Elias and Fano, ``{"elias-fano": [K, low]}``, and is of format 3 then.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

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
from fishkern.selection._elias_fano import coded, coded_size, decoded, low_bits
from fishkern.selection._packed import packed, unpacked
from fishkern.selection.entries import Entries
from fishkern.selection.ranges import Columns, Ranges, Rows

Form: TypeAlias = str | dict[str, list[Any]]

FORMS = ("indices", "bits", "whole", "none")
RANGES: dict[str, type[Ranges]] = {"rows": Rows, "columns": Columns}
CODED = "elias-fano"

_WORTH_CODING = 32  # bytes that a code must save: more than it takes in the header, and small files stay of format 1

FORMAT = Format("fishkern.selection", version=2, saved_by="Selection.save")


def save_entries(
    path: str | os.PathLike[str],
    entries: Mapping[str, Entries],
    provenance: str,
    *,
    max_shard_size: str | int | None,
) -> Path:
    """Write a selection.

    Args:
        path: See :meth:`fishkern.Selection.save`.
        entries: What is selected of each parameter, by name.
        provenance: JSON.
        max_shard_size: See :meth:`fishkern.Selection.save`.

    Returns:
        The file to give to :func:`load_entries`.
    """
    tensors: dict[str, AnyTensor] = {}
    pool = {}
    for name, selected in entries.items():
        form, tensor = form_of(selected)
        pool[name] = [list(selected.shape), form]
        if tensor is not None:
            tensors[name] = tensor
    metadata = {"pool": json.dumps(pool), "provenance": provenance}
    return save_tensors(
        path,
        tensors,
        format=oldest_format(FORMAT, (form for _, form in pool.values())),
        metadata=metadata,
        max_shard_size=max_shard_size,
    )


def load_entries(path: str | os.PathLike[str]) -> tuple[dict[str, Entries], dict[str, Any]]:
    """Read what :func:`save_entries` wrote.

    Args:
        path: See :meth:`fishkern.Selection.load`.

    Returns:
        What is selected of each parameter by name, and the provenance.

    Raises:
        ValueError: Header and tensors are damaged or do not agree.
    """
    metadata, stored = open_tensors(path, format=FORMAT)
    with parsing(f"{path} has a damaged header"):
        provenance = read_provenance(metadata["provenance"])
        pool = {name: checked_entry(name, *entry) for name, entry in read_json(metadata["pool"]).items()}
    if differing := stored.keys() ^ {name for name, (_, form) in pool.items() if has_tensor(form)}:
        odd = in_brief(min(differing), 80)
        raise ValueError(f"{path} is damaged: its header and its tensors disagree on {odd}. Save it again.")
    with parsing(f"{path} holds no valid selection"):
        entries = {name: read_entries(name, shape, form, stored.get(name)) for name, (shape, form) in pool.items()}
    return entries, provenance


def form_of(entries: Entries, *, code: bool = False) -> tuple[Form, Tensor | None]:
    """Choose how a file stores the selected entries of one parameter.

    Args:
        entries: The selected entries.
        code: Whether the file may have them in the code of Elias and Fano.

    Returns:
        What the header says, and the tensor: indices ``[K]``, bits ``[ceil(P / 8)]`` or a code, whichever is smallest,
        or ``None`` where the header says all.
    """
    if entries.count == 0:
        return "none", None
    if entries.is_all and entries.ranges is None:
        return "whole", None
    if entries.ranges is not None:
        axis = next(axis for axis, kind in RANGES.items() if isinstance(entries.ranges, kind))
        return {axis: [list(bounds) for bounds in entries.ranges.bounds]}, None
    indices, numel = entries.indices(), entries.shape.numel()
    low = low_bits(len(indices), numel)
    if code and coded_size(len(indices), numel, low) + _WORTH_CODING <= min(indices.nbytes, -(-numel // 8)):
        return {CODED: [len(indices), low]}, coded(indices, numel, low)
    if -(-numel // 8) < indices.nbytes:
        return "bits", packed(indices, numel)
    return "indices", indices


def has_tensor(form: Form) -> bool:
    """Tell whether a form stores the selected entries in a tensor.

    Args:
        form: From :func:`form_of` or :func:`checked_entry`.

    Returns:
        False where the header says everything.
    """
    return form in ("indices", "bits") or (isinstance(form, dict) and CODED in form)


def oldest_format(format: Format, forms: Iterable[Form]) -> Format:
    """Choose the oldest version of a format that can hold some entries.

    Args:
        format: The newest version.
        forms: How the selected entries of each parameter are stored.

    Returns:
        The format: of version 3 where some are coded, else of version 2 where some are ranges, else of version 1.
    """
    kinds = {kind for form in forms if isinstance(form, dict) for kind in form}
    return replace(format, version=3 if CODED in kinds else 2 if kinds else 1)


def checked_entry(name: str, shape: object, form: object) -> tuple[torch.Size, Form]:
    """Check what a header says of one parameter of a pool.

    Args:
        name: The parameter's name.
        shape: Its shape.
        form: How its selected entries are stored.

    Returns:
        Shape and form.

    Raises:
        ValueError: It is not a shape, or none of :data:`FORMS`, :data:`RANGES` and :data:`CODED`.
    """
    other = isinstance(form, dict) and len(form) == 1 and form.keys() <= {*RANGES, CODED}
    if not other and form not in FORMS:
        shown, known = in_brief(repr(form), 40), ", ".join([*FORMS, *RANGES, CODED])
        raise ValueError(f"{in_brief(name, 80)} is stored as {shown}, which is none of {known}")
    try:
        return checked_shape(shape), form
    except ValueError as error:
        raise ValueError(f"the shape of {in_brief(name, 80)}: {error}") from None


def read_entries(name: str, shape: torch.Size, form: Form, tensor: StoredTensor | None) -> Entries:
    """Read the selected entries of one parameter.

    Args:
        name: The parameter's name.
        shape: Its shape.
        form: How they are stored, as checked by :func:`checked_entry`.
        tensor: Its indices ``[K]``, its bits or its code; ``None`` for the other forms.

    Returns:
        The entries.

    Raises:
        TypeError: Indices or ranges are not integers.
        ValueError: Tensor or ranges do not fit the shape.
    """
    if isinstance(form, dict) and CODED not in form:
        ((axis, bounds),) = form.items()
        return Entries.of(shape, RANGES[axis](*bounds), name)
    if form == "whole":
        return Entries.all(shape)
    if form == "none":
        return Entries.none(shape)
    return Entries.of(shape, _read_indices(name, shape, form, tensor), name)


def _read_indices(name: str, shape: torch.Size, form: Form, tensor: StoredTensor) -> Tensor:
    numel = shape.numel()
    if isinstance(form, dict):
        return _read_coded(name, numel, form[CODED], tensor)
    if form == "indices":
        if tensor.numel() > numel:
            raise ValueError(f"{in_brief(name, 80)} has {numel} coordinates, and {tensor.numel()} indices")
        return tensor.read()
    if (tensor.dtype, tuple(tensor.shape)) != (torch.uint8, (-(-numel // 8),)):
        raise ValueError(f"{in_brief(name, 80)} is said to be bits of {tuple(shape)}, and is not")
    return unpacked(tensor.read(), index_dtype(numel))


def _read_coded(name: str, numel: int, sizes: object, tensor: StoredTensor) -> Tensor:
    if not (isinstance(sizes, list) and len(sizes) == 2 and all(type(size) is int for size in sizes)):
        raise ValueError(
            f"the code of {in_brief(name, 80)} has a count and a number of bits, not {in_brief(repr(sizes), 40)}"
        )
    count, low = sizes
    if not (0 < count <= numel and 0 <= low < numel.bit_length()):
        raise ValueError(f"{in_brief(name, 80)} has {numel} coordinates, and a code of {count} with {low} low bits")
    expected = (torch.uint8, (coded_size(count, numel, low),))
    if (tensor.dtype, tuple(tensor.shape)) != expected:
        raise ValueError(f"{in_brief(name, 80)} is said to be a code of {count} of {numel}, and is not")
    try:
        return decoded(tensor.read(), count, numel, low)
    except ValueError as error:
        raise ValueError(f"{in_brief(name, 80)}: {error}") from None


def read_provenance(text: str) -> dict[str, Any]:
    """Read where a selection comes from, and check the parts that other code relies on.

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
