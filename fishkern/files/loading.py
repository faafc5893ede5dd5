"""Open named tensors: headers are read and checked, values stay on disk."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fishkern.files.stored import StoredTensor, stamp_of

CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {code: dtype for dtype, code in CODES.items()}


@dataclass(frozen=True)
class Format:
    """What a file of tensors says it is.

    Attributes:
        name: The ``format`` entry of the header, such as ``"fishkern.statistics"``.
        version: The newest ``format_version`` that this code reads, and the one it writes.
        saved_by: What writes such files, for error messages: ``"Statistics.save"``.
    """

    name: str
    version: int
    saved_by: str

    @property
    def noun(self) -> str:
        """The name in words: ``"fishkern statistics"``."""
        return self.name.replace(".", " ")


def open_tensors(path: str | os.PathLike[str], *, format: Format) -> tuple[dict[str, str], dict[str, StoredTensor]]:
    """Open what :func:`save_tensors` wrote, reading headers only.

    Args:
        path: The file, the index of its shards, or the name without suffix.
        format: What it must say it is.

    Returns:
        The metadata, and the tensors by name in the order in which they were saved.

    Raises:
        FileNotFoundError: There is no such file, or a shard is missing.
        ValueError: The file is truncated or damaged, holds something else, is one shard of a set, or was written in a
            newer format.
    """
    path = Path(path)
    single, index = single_and_index(path)
    if path.is_file() and path != index:
        single = path
    contents = read_index(index) if index.is_file() else None
    if contents and (contents["metadata"].get("format") == format.name or not single.is_file()):
        return _open_shards(index, contents, format)
    if not single.is_file():
        raise FileNotFoundError(errno.ENOENT, f"nothing to load at {path}: no {single.name}, no {index.name}.")
    metadata, tensors = open_one(single, format)
    if "index" in metadata:
        raise ValueError(f"{single} is one shard of several: load {metadata['index']}.")
    return metadata, tensors


def _open_shards(
    index: Path, contents: dict[str, Any], format: Format
) -> tuple[dict[str, str], dict[str, StoredTensor]]:
    metadata = {key: value for key, value in contents["metadata"].items() if key != "total_size"}
    _check_format(index, metadata, format)
    shards = {}
    for name in dict.fromkeys(contents["weight_map"].values()):
        shard = index.parent / name
        if shard.parent != index.parent or name == "..":
            raise ValueError(f"{index} is damaged: it names the shard {name!r}, which is not a plain file name.")
        if not shard.is_file():
            raise FileNotFoundError(
                errno.ENOENT, f"{shard} is missing, which {index.name} names: copy all files that it lists."
            )
        said, shards[name] = open_one(shard, format)
        if said != metadata | {"index": index.name}:
            raise ValueError(f"{shard} belongs to another save than {index.name}: copy all files of one save.")
    try:
        return metadata, {name: shards[shard][name] for name, shard in contents["weight_map"].items()}
    except KeyError as error:
        raise ValueError(f"{index} is damaged: its shards hold no tensor {error}.") from None


def open_one(path: Path, format: Format) -> tuple[dict[str, str], dict[str, StoredTensor]]:
    """Open one file, whole or a shard.

    Args:
        path: The file.
        format: What it must say it is.

    Returns:
        The metadata, and the tensors by name in the order in which they were saved.

    Raises:
        ValueError: The file is damaged, holds something else, or was written in a newer format.
    """
    header, start, stamp = read_header(path)
    metadata = header.pop("__metadata__", {})
    _check_format(path, metadata, format)
    tensors = {}
    for name, entry in header.items():
        if (dtype := DTYPES.get(entry["dtype"])) is None:
            raise ValueError(f"{path} holds {name} as {entry['dtype']}; the dtypes read are {', '.join(DTYPES)}.")
        offset = start + entry["data_offsets"][0]
        tensors[name] = StoredTensor(path.absolute(), stamp, dtype, torch.Size(entry["shape"]), offset)
    return metadata, tensors


def read_header(path: Path) -> tuple[dict[str, Any], int, tuple[int, int]]:
    """Read the header of a ``.safetensors`` file.

    Args:
        path: The file.

    Returns:
        The header in the file's own order, where the data start, and the file's stamp.

    Raises:
        ValueError: The file is truncated or damaged.
    """
    try:
        with safe_open(path, framework="pt"):  # checks the header, and that the file ends where it says
            pass
    except SafetensorError as error:
        raise ValueError(
            f"{path} is truncated, damaged or no .safetensors file ({error}): copy or save it again."
        ) from None
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(length)), 8 + length, stamp_of(file)


def read_index(path: Path) -> dict[str, Any]:
    """Read an index of shards.

    Args:
        path: The ``.index.json``.

    Returns:
        ``metadata`` and ``weight_map``.

    Raises:
        ValueError: It is no such index.
    """
    try:
        contents = json.loads(path.read_bytes())
        if isinstance(contents["metadata"], dict) and all(type(v) is str for v in contents["weight_map"].values()):
            return contents
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ValueError(f"{path} is damaged: it is no index of shards. Copy or save it again.")


def _check_format(path: Path, metadata: Mapping[str, str], format: Format) -> None:
    if (said := metadata.get("format")) != format.name:
        says = "nothing of a format" if said is None else f"format={said}"
        raise ValueError(
            f"{path} holds no {format.noun}: its header says {says}, expected "
            f"format={format.name}. Write one with {format.saved_by}."
        )
    version = metadata.get("format_version", "")
    if not version.isdecimal():
        raise ValueError(f"{path} is damaged: its header says format_version={version!r}. Copy or save it again.")
    if int(version) > format.version:
        raise ValueError(
            f"{path} is in {format.name} format {version}, this fishkern reads up to {format.version}: update fishkern."
        )


def single_and_index(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Name the two files that a name may stand for.

    Args:
        path: With or without suffix, or the index.

    Returns:
        ``name.safetensors`` and its ``.index.json``.
    """
    path = Path(path)
    name = path.name.removesuffix(".index.json").removesuffix(".safetensors") + ".safetensors"
    return path.with_name(name), path.with_name(name + ".index.json")
