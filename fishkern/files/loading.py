"""Open files of named tensors: headers are read and checked, values stay on disk."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fishkern.files.parsing import checked_shape, in_brief, parsing, read_count, read_json
from fishkern.files.tensors import StoredTensor, stamp_of

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

LARGEST_INDEX = 100_000_000  # bytes: the limit of safetensors for a header


@dataclass(frozen=True)
class Format:
    """The kind of a file of tensors, as its header names it.

    Attributes:
        name: The ``format`` entry of the header, such as ``"fishkern.statistics"``.
        version: The newest ``format_version`` that this code reads, and the one it writes.
        saved_by: The function that writes such files, for error messages: ``"Statistics.save"``.
    """

    name: str
    version: int
    saved_by: str

    @property
    def noun(self) -> str:
        """The name in words: ``"fishkern statistics"``."""
        return self.name.replace(".", " ")


def open_tensors(path: str | os.PathLike[str], *, format: Format) -> tuple[dict[str, str], dict[str, StoredTensor]]:
    """Open a save of :func:`save_tensors`, reading headers only.

    Args:
        path: The file, the index of its shards, or the name without suffix.
        format: The format that its header must name.

    Returns:
        The metadata, and the tensors by name in the order in which they were saved.

    Raises:
        FileNotFoundError: There is no such file, or a shard is missing.
        ValueError: The file is truncated or damaged, has another or a newer format, or is one shard of a set.
    """
    single, index = _existing(path)
    contents = read_index(index) if index.is_file() else None
    # Our own index takes precedence over a single file, which an interrupted save may have left; that of a model, which
    # may have the same name, does not.
    if contents and (contents["metadata"].get("format") == format.name or not single.is_file()):
        return _open_shards(index, contents, format)
    metadata, tensors = open_one(single, format)
    if "index" in metadata:
        raise ValueError(f"{single} is one shard of several: load {metadata['index']}.")
    return metadata, tensors


def format_of(path: str | os.PathLike[str]) -> str | None:
    """Read which format a file has.

    Args:
        path: As for :func:`open_tensors`.

    Returns:
        The ``format`` entry of its header, ``None`` where there is none.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, or is not a ``.safetensors`` file.
    """
    single, index = _existing(path)
    formats = [read_index(index)["metadata"].get("format")] if index.is_file() else []
    if single.is_file():
        formats.append(read_header(single)[0]["__metadata__"].get("format"))
    # Ours, where an index of a model has the same name.
    return next((name for name in formats if str(name).startswith("fishkern.")), formats[-1])


def files_of(path: str | os.PathLike[str]) -> list[Path]:
    """List the files of one save.

    Args:
        path: The path that :func:`save_tensors` returned.

    Returns:
        The file itself, or the index and the shards that it names.
    """
    path = Path(path)
    if not path.name.endswith(".index.json"):
        return [path]
    return [path, *(path.parent / name for name in dict.fromkeys(read_index(path)["weight_map"].values()))]


def _existing(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Return the single file and the index that a name may mean, of which at least one exists."""
    path = Path(path)
    single, index = single_and_index(path)
    if path.is_file() and path != index:
        single = path
    if not single.is_file() and not index.is_file():
        inside = ": it is a folder, and one of its files is expected" if path.is_dir() else ""
        message = in_brief(f"nothing to load at {path}{inside or f': no {single.name}, no {index.name}'}.")
        raise FileNotFoundError(errno.ENOENT, message)
    return single, index


def _open_shards(
    index: Path, contents: dict[str, Any], format: Format
) -> tuple[dict[str, str], dict[str, StoredTensor]]:
    metadata = {key: value for key, value in contents["metadata"].items() if key != "total_size"}
    check_format(index, metadata, format)
    shards = {}
    for name in dict.fromkeys(contents["weight_map"].values()):
        shard = index.parent / name
        # An index from elsewhere may name any file of the disk; only files next to it belong to its set.
        if shard.name != name or name == ".." or not name.isprintable() or len(name.encode()) > 255:
            shown = in_brief(repr(name), 80)
            raise ValueError(f"{index} is damaged: it names the shard {shown}, which is not a plain file name.")
        if not shard.is_file():
            raise FileNotFoundError(
                errno.ENOENT, f"{shard} is missing, which {index.name} names: copy all files that it lists."
            )
        own_metadata, shards[name] = open_one(shard, format)
        if own_metadata != metadata | {"index": index.name}:
            raise ValueError(f"{shard} belongs to another save than {index.name}: copy all files of one save.")
    tensors = {}
    for name, shard in contents["weight_map"].items():
        if name not in shards[shard]:
            raise ValueError(f"{index} is damaged: its shards hold no tensor {in_brief(repr(name), 80)}.")
        tensors[name] = shards[shard].pop(name)
    for shard, unnamed in shards.items():
        for name in unnamed:
            raise ValueError(
                f"{index} is damaged: it does not name {in_brief(repr(name), 80)} of {shard}. Copy or save it again."
            )
    return metadata, tensors


def open_one(path: Path, format: Format) -> tuple[dict[str, str], dict[str, StoredTensor]]:
    """Open one file, which may be a shard.

    Args:
        path: The file.
        format: The format that its header must name.

    Returns:
        The metadata, and the tensors by name in the order in which they were saved.

    Raises:
        ValueError: The file is damaged, or has another or a newer format.
    """
    header, start, stamp = read_header(path)
    metadata = header.pop("__metadata__")
    check_format(path, metadata, format)
    tensors = {}
    for name, entry in header.items():
        if (dtype := DTYPES.get(entry["dtype"])) is None:
            shown = in_brief(name, 80)
            raise ValueError(f"{path} holds {shown} as {entry['dtype']}; the dtypes read are {', '.join(DTYPES)}.")
        with parsing(f"{path} is damaged: of {in_brief(name, 80)}"):
            shape = checked_shape(entry["shape"])
        tensors[name] = StoredTensor(path.absolute(), stamp, dtype, shape, start + entry["data_offsets"][0])
    return metadata, tensors


def read_header(path: Path) -> tuple[dict[str, Any], int, tuple[int, int]]:
    """Read the header of a ``.safetensors`` file.

    Args:
        path: The file.

    Returns:
        The header in the order of the file, the number of bytes before the data, and the stamp of the file
        (:func:`stamp_of`).

    Raises:
        ValueError: The file is truncated or damaged.
    """
    try:
        # Checks that the offsets cover the file to its end. It does not tell where a tensor begins, so the header is
        # parsed here as well.
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(
            f"{path} is truncated, damaged or no .safetensors file ({in_brief(error)}): copy or save it again."
        ) from None
    with open(path, "rb") as file, parsing(f"{path} has a damaged header"):
        length = int.from_bytes(file.read(8), "little")
        header = read_json(file.read(length))
        header["__metadata__"] = header.get("__metadata__") or {}  # safetensors accepts null
        return header, 8 + length, stamp_of(file)


def read_index(path: Path) -> dict[str, Any]:
    """Read an index of shards.

    Args:
        path: The ``.index.json``.

    Returns:
        ``metadata`` and ``weight_map``.

    Raises:
        ValueError: It is not an index of shards.
    """
    try:
        contents = read_json(path.read_bytes()) if path.stat().st_size <= LARGEST_INDEX else None
        metadata = {key: value for key, value in contents["metadata"].items() if key != "total_size"}
        if all(type(value) is str for value in (*metadata.values(), *contents["weight_map"].values())):
            return contents
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ValueError(f"{path} is damaged: it is not an index of shards. Copy or save it again.")


def check_format(path: Path, metadata: Mapping[str, str], format: Format) -> None:
    """Check what a file says that it is.

    Args:
        path: The file, for the message.
        metadata: Its header, of which ``format`` and ``format_version`` are read.
        format: The expected format.

    Raises:
        ValueError: It is of another or a newer format, or says none.
    """
    if (name := metadata.get("format")) != format.name:
        says = "names no format" if name is None else f"says format={in_brief(name, 80)}"
        raise ValueError(
            f"{path} holds no {format.noun}: its header {says}, expected "
            f"format={format.name}. Write one with {format.saved_by}."
        )
    version = metadata.get("format_version", "")
    try:
        number = read_count(version)
    except ValueError:
        shown = in_brief(repr(version), 80)
        raise ValueError(f"{path} is damaged: its header says format_version={shown}. Copy or save it again.") from None
    if number > format.version:
        raise ValueError(
            f"{path} is in {format.name} format {version}, this fishkern reads up to {format.version}: update fishkern."
        )


def single_and_index(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Return the two paths that a name may mean.

    Args:
        path: With or without suffix, or the index.

    Returns:
        ``name.safetensors`` and its ``.index.json``.

    Raises:
        ValueError: It does not name a file.
    """
    path = Path(path)
    if not path.name:
        raise ValueError(f"{os.fspath(path)!r} names no file: give the name of one, such as name.safetensors.")
    name = path.name.removesuffix(".index.json").removesuffix(".safetensors") + ".safetensors"
    return path.with_name(name), path.with_name(name + ".index.json")
