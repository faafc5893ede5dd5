"""Save named tensors as ``.safetensors``, in shards when large, replacing an older set in one step.

At every moment of a save exactly one set is valid. Shards get names that no older set uses, and an index takes
precedence over a single file of the same name. So one rename (of the index) or one removal (of an older index) switches
from the old set to the new. Files of the old set are removed afterwards. Only one process may save to a name at a time.
"""

from __future__ import annotations

import errno
import glob
import json
import math
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from typing import Any

import torch
from torch import Tensor

from fishkern.arguments import byte_count
from fishkern.files.atomic import atomic_write, check_target, sync
from fishkern.files.loading import CODES, Format, open_one, read_header, read_index, single_and_index
from fishkern.files.tensors import AnyTensor, pieces


def save_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, AnyTensor],
    *,
    format: Format,
    metadata: Mapping[str, str],
    dtype: torch.dtype | None = None,
    max_shard_size: str | int | None = None,
) -> Path:
    """Save named tensors in their order, replacing an older save of that name in one step.

    Apart from the tensors, only one piece of one tensor is in memory. Whenever the save is cut short, the old set or
    the new one can be read, whole.

    Args:
        path: ``name.safetensors`` (or ``name``; the suffix is added).
        tensors: The tensors by name, on any device or on disk.
        format: The format, for the header.
        metadata: Further entries of the header.
        dtype: Cast to this dtype; ``None`` keeps each tensor's own.
        max_shard_size: Largest size of one file in bytes, or as ``"5GB"`` or ``"500MiB"``; a single tensor above it
            gets a shard of its own. ``None`` for one file.

    Returns:
        The file to open: ``name.safetensors``, or the index of the shards.

    Raises:
        FileExistsError: There is a file of that name in another format, such as a model.
        OSError: As in :func:`atomic_write`.
        ValueError: A value overflows ``dtype``, or a non-zero one becomes zero in float16; or ``max_shard_size`` is
            not a size.
    """
    check_target(path, f"{format.name.rpartition('.')[2]}.safetensors")
    single, index = single_and_index(path)
    _refuse_foreign(single, index, format)
    metadata = {"format": format.name, "format_version": str(format.version), **metadata}
    shards = _shards(tensors, dtype, max_shard_size)
    try:
        if len(shards) <= 1:
            write_one(single, tensors, metadata, dtype)
            index.unlink(missing_ok=True)  # an older sharded set is the valid one up to here
            sync(single.parent)
            return single
        weight_map = {}
        for file, shard in zip(_free_names(single, len(shards)), shards, strict=True):
            write_one(file, shard, metadata | {"index": index.name}, dtype)
            weight_map |= dict.fromkeys(shard, file.name)
        total_size = sum(_nbytes(tensor, dtype) for tensor in tensors.values())
        with atomic_write(index, "w") as file:
            json.dump({"metadata": {"total_size": total_size, **metadata}, "weight_map": weight_map}, file, indent=2)
        return index
    finally:  # after a failure as well: the shards written so far belong to no set
        _remove_stale(single, index, format)


def write_one(
    path: Path, tensors: Mapping[str, AnyTensor], metadata: Mapping[str, str], dtype: torch.dtype | None = None
) -> None:
    """Write one file in the format of safetensors, piece by piece; safetensors' own function needs all in memory.

    Args:
        path: The file, whatever its suffix.
        tensors: The tensors by name.
        metadata: All entries of the header.
        dtype: Cast to this dtype; ``None`` keeps each tensor's own.

    Raises:
        OSError: As in :func:`atomic_write`.
        ValueError: A value overflows ``dtype``, or a non-zero one becomes zero in float16.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + _nbytes(tensor, dtype)
        shape = list(tensor.shape)
        header[name] = {"dtype": CODES[dtype or tensor.dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes
    with atomic_write(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            for piece in pieces(tensor):
                file.write(_encoded(piece, dtype or tensor.dtype, name))


def _encoded(piece: Tensor, dtype: torch.dtype, name: str) -> bytearray:
    """Cast a flat piece and return its bytes; a value that the dtype cannot represent raises."""
    buffer = bytearray(piece.numel() * dtype.itemsize)  # not numpy's, which has no bfloat16
    encoded = torch.frombuffer(buffer, dtype=dtype).copy_(piece)
    if piece.dtype != dtype and dtype.is_floating_point:
        check_cast(name, piece.cpu(), encoded)
    return buffer


def check_cast(name: str, before: Tensor, after: Tensor) -> None:
    """Refuse a cast that turned a finite value infinite or, in float16, a non-zero one into zero.

    The smallest float16 is 6e-8, and most of a Fisher information is below it. bfloat16 has the range of float32; what
    vanishes there, below 1e-40, is accepted.

    Args:
        name: Name of the tensor, for the message.
        before: The tensor before the cast.
        after: The same tensor after it.

    Raises:
        ValueError: A value overflowed or vanished.
    """
    dtype = str(after.dtype).removeprefix("torch.")
    overflowed = after.isinf() & before.isfinite()
    if overflowed.any():
        value, largest = before[overflowed].abs().max().item(), torch.finfo(after.dtype).max
        raise ValueError(f"{name} holds {value:.3g}, which {dtype} cannot (largest {largest:.3g}): use a wider dtype.")
    vanished = (after == 0) & (before != 0)
    if after.dtype == torch.float16 and vanished.any():
        value = before[vanished].abs().min().item()
        raise ValueError(f"{name} holds {value:.3g}, which becomes zero in float16: use bfloat16 or float32.")


def _shards(
    tensors: Mapping[str, AnyTensor], dtype: torch.dtype | None, max_shard_size: str | int | None
) -> list[dict[str, AnyTensor]]:
    limit = math.inf if max_shard_size is None else byte_count(max_shard_size, "max_shard_size")
    shards: list[dict[str, AnyTensor]] = []
    room = 0.0
    for name, tensor in tensors.items():
        nbytes = _nbytes(tensor, dtype)
        if not shards or nbytes > room:
            shards.append({})
            room = limit
        shards[-1][name] = tensor
        room -= nbytes
    return shards


def _nbytes(tensor: AnyTensor, dtype: torch.dtype | None) -> int:
    return tensor.numel() * (dtype or tensor.dtype).itemsize


def _free_names(single: Path, count: int) -> list[Path]:
    """Name the shards, with a random tag if any plain name is taken: an older set must stay readable meanwhile."""
    stem = single.name.removesuffix(".safetensors")
    while True:
        names = [single.with_name(f"{stem}-{n:05d}-of-{count:05d}.safetensors") for n in range(1, count + 1)]
        if not any(name.exists() for name in names):
            return names
        stem = f"{single.name.removesuffix('.safetensors')}-{token_hex(4)}"


def _refuse_foreign(single: Path, index: Path, format: Format) -> None:
    """Raise at a file of another format, such as a model of this name; ours and damaged ones may be overwritten."""
    existing = []
    with suppress(ValueError, OSError):
        existing.append((single, read_header(single)[0]["__metadata__"]))
    with suppress(ValueError, OSError):
        existing.append((index, read_index(index)["metadata"]))
    for path, metadata in existing:
        if metadata.get("format") != format.name or "index" in metadata:
            content = f"is a shard of {metadata['index']}" if "index" in metadata else f"holds no {format.noun}"
            raise FileExistsError(
                errno.EEXIST,
                f"{path} {content} and is not overwritten: choose another name, or delete it first.",
            )


def _remove_stale(single: Path, index: Path, format: Format) -> None:
    """Remove files that :func:`open_tensors` would not read: those of older saves, and of this one where it failed.

    It never raises, since by now the save has succeeded, or failed for a reason of its own.
    """
    try:
        valid = set(read_index(index)["weight_map"].values()) if index.is_file() else set()
    except (ValueError, OSError):
        return  # a damaged index does not say which files are valid
    stem = single.name.removesuffix(".safetensors")
    shard = re.compile(re.escape(stem) + r"(-[0-9a-f]{8})?-\d{5}-of-\d{5}\.safetensors")
    # Each with the index that its header must name: a stranger's file that happens to have such a name stays.
    candidates = [(single, None)] if valid else []
    with suppress(OSError):
        paths = single.parent.glob(f"{glob.escape(stem)}-*.safetensors")
        candidates += [(path, index.name) for path in paths if shard.fullmatch(path.name) and path.name not in valid]
    for path, of_index in candidates:
        with suppress(ValueError, OSError):
            metadata, _ = open_one(path, format)
            if metadata.get("index") == of_index:
                path.unlink()
