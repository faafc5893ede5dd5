"""How every artefact reaches the disk and comes back: whole, or not at all.

:func:`atomic_write` is for one file of any kind. :func:`save_tensors` and :func:`open_tensors` keep named tensors as
``.safetensors``, in shards when large (the convention of transformers: ``name-00001-of-00003.safetensors`` beside
``name.safetensors.index.json``), and say in the header what they are.

At every moment of a save exactly one set is the valid one. Shards are written under names that no older set uses; the
index beats a single file of the same name; so one rename (of the index) or one removal (of an older index) moves from
the old set to the new. What that leaves behind is removed afterwards. Only one process may save to one name at a time.
"""

from __future__ import annotations

import errno
import glob
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import IO, Any, ClassVar, Literal, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

PIECE = 2**20  # entries held in memory at once: 4 MiB of float32, which stay in the cache

_CODES = {
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
_DTYPES = {code: dtype for dtype, code in _CODES.items()}


@contextmanager
def atomic_write(path: str | os.PathLike[str], mode: Literal["wb", "w"] = "wb") -> Iterator[IO[Any]]:
    """Write a file that appears under its name only when it is complete.

    The bytes go to a hidden ``.<name>.<random>.tmp`` in the same folder, reach the disk (fsync), and are then renamed
    over ``path``. After any exception, also ``KeyboardInterrupt``, that file is gone and the old one is untouched; only
    a killed process leaves it behind, to be deleted by hand. A symbolic link is written through.

    Args:
        path: Where the file shall stand; its folder must exist.
        mode: ``"wb"`` for bytes, ``"w"`` for UTF-8 text.

    Yields:
        The open temporary file; ``.name`` is its path, for libraries that want one.

    Raises:
        OSError: The folder is missing or read-only, ``path`` is not a regular file, or the disk is full. The message
            names the path and what to do; ``errno`` and the subclass are those of the system's own error.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():  # renaming over /dev/null would replace the device
        raise OSError(errno.EINVAL, f"{path} is not a regular file and cannot be replaced: give the name of a file.")
    temporary = path.with_name(f".{path.name[:40]}.{token_hex(4)}.tmp")
    try:
        try:
            file = open(temporary, mode.replace("w", "x"), encoding="utf-8" if mode == "w" else None)  # noqa: SIM115
        except OSError as error:
            raise OSError(error.errno, _advice(error, path)) from None
        try:
            with file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):  # others may be the caller's own, about another file
                raise OSError(error.errno, _advice(error, path)) from None
            raise
    finally:
        with suppress(OSError):
            temporary.unlink()
    _sync(path.parent)


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


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that stays in its ``.safetensors`` file until it is read.

    No file is kept open and nothing is memory-mapped: reading costs the memory of what is read, may happen in any
    thread or process, and notices when the file was replaced in the meantime.

    Attributes:
        path: The file.
        stamp: Size in bytes and modification time in ns of the file when it was opened.
        dtype: The dtype on disk.
        shape: The tensor's shape.
        offset: Where its first byte stands in the file.
    """

    path: Path
    stamp: tuple[int, int]
    dtype: torch.dtype
    shape: torch.Size
    offset: int
    device: ClassVar[torch.device] = torch.device("cpu")

    def numel(self) -> int:
        """Count the entries.

        Returns:
            The number of entries.
        """
        return self.shape.numel()

    def pieces(
        self, numel: int = PIECE, *, start: int = 0, buffers: Iterator[bytearray] | None = None
    ) -> Iterator[Tensor]:
        """Read the tensor in flat pieces, in order, one in memory at a time.

        Args:
            numel: Entries per piece.
            start: Flat index of the first entry to read.
            buffers: Where to read each piece, large enough; it is valid as long as its buffer holds it. ``None`` for
                new memory each time.

        Yields:
            ``[numel]`` (the last one shorter), of the dtype on disk, on the CPU.

        Raises:
            FileNotFoundError: The file is gone.
            RuntimeError: The file has changed since it was opened.
        """
        if not self.path.is_file():
            raise FileNotFoundError(errno.ENOENT, f"{self.path} is gone since it was opened: load it again.")
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.offset + start * self.dtype.itemsize)
            for first in range(start, self.numel(), numel):
                nbytes = min(numel, self.numel() - first) * self.dtype.itemsize
                buffer = bytearray(nbytes) if buffers is None else next(buffers)
                if _stamp(file) != self.stamp or not _filled(file, memoryview(buffer)[:nbytes]):
                    raise RuntimeError(f"{self.path} has changed since it was opened: load it again.")
                yield torch.frombuffer(buffer, dtype=self.dtype, count=nbytes // self.dtype.itemsize)

    def read(self, dtype: torch.dtype | None = None) -> Tensor:
        """Read the whole tensor.

        Args:
            dtype: The dtype to return; ``None`` keeps the one on disk.

        Returns:
            A new tensor of :attr:`shape` on the CPU.
        """
        tensor = torch.empty(self.shape, dtype=dtype or self.dtype)
        rest = tensor.view(-1)
        for piece in self.pieces():
            rest[: len(piece)] = piece
            rest = rest[len(piece) :]
        return tensor


AnyTensor: TypeAlias = Tensor | StoredTensor


def pieces(tensor: AnyTensor, numel: int = PIECE) -> Iterator[Tensor]:
    """Walk through a tensor in flat pieces, wherever it lies.

    Args:
        tensor: In memory or on disk.
        numel: Entries per piece.

    Yields:
        ``[numel]`` (the last one shorter), the entries in row-major order; views where the tensor is contiguous.
    """
    if isinstance(tensor, StoredTensor):
        yield from tensor.pieces(numel)
    elif tensor.numel():
        yield from tensor.detach().reshape(-1).split(numel)


def save_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, AnyTensor],
    *,
    format: Format,
    metadata: Mapping[str, str],
    dtype: torch.dtype | None = None,
    max_shard_size: str | int | None = None,
) -> Path:
    """Save named tensors in their order, replacing what stood under that name in one step.

    Beside the tensors, only one piece of one tensor is held in memory. Whenever the save is cut short, the old set or
    the new one can be read, whole.

    Args:
        path: ``name.safetensors`` (or ``name``; the suffix is added).
        tensors: The tensors by name, on any device or on disk.
        format: What the file shall say it is.
        metadata: What the header says besides.
        dtype: Cast to this dtype on the way; ``None`` keeps each tensor's own.
        max_shard_size: Largest size of one file in bytes, or as ``"5GB"`` or ``"500MiB"``; a single tensor above it
            gets a shard of its own. ``None`` for one file.

    Returns:
        The file to open: ``name.safetensors``, or the index of the shards.

    Raises:
        FileExistsError: Under that name stands a file of another format, such as a model.
        OSError: As in :func:`atomic_write`.
        ValueError: A value overflows ``dtype``, or a non-zero one becomes zero in float16; or ``max_shard_size`` is
            no size.
    """  # noqa: DOC502
    single, index = _single_and_index(path)
    _refuse_foreign(single, index, format)
    metadata = {"format": format.name, "format_version": str(format.version), **metadata}
    shards = _shards(tensors, dtype, max_shard_size)
    try:
        if len(shards) <= 1:
            _write(single, tensors, metadata, dtype)
            index.unlink(missing_ok=True)  # an older sharded set is the valid one up to here
            _sync(single.parent)
            return single
        weight_map = {}
        for file, shard in zip(_free_names(single, len(shards)), shards, strict=True):
            _write(file, shard, metadata | {"index": index.name}, dtype)
            weight_map |= dict.fromkeys(shard, file.name)
        total_size = sum(_nbytes(tensor, dtype) for tensor in tensors.values())
        with atomic_write(index, "w") as file:
            json.dump({"metadata": {"total_size": total_size, **metadata}, "weight_map": weight_map}, file, indent=2)
        return index
    finally:
        _remove_stale(single, index, format)


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
    single, index = _single_and_index(path)
    if path.is_file() and path != index:
        single = path
    contents = _read_index(index) if index.is_file() else None
    if contents and (contents["metadata"].get("format") == format.name or not single.is_file()):
        return _open_shards(index, contents, format)
    if not single.is_file():
        raise FileNotFoundError(errno.ENOENT, f"nothing to load at {path}: no {single.name}, no {index.name}.")
    metadata, tensors = _open(single, format)
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
        said, shards[name] = _open(shard, format)
        if said != metadata | {"index": index.name}:
            raise ValueError(f"{shard} belongs to another save than {index.name}: copy all files of one save.")
    try:
        return metadata, {name: shards[shard][name] for name, shard in contents["weight_map"].items()}
    except KeyError as error:
        raise ValueError(f"{index} is damaged: its shards hold no tensor {error}.") from None


def _open(path: Path, format: Format) -> tuple[dict[str, str], dict[str, StoredTensor]]:
    header, start, stamp = _read_header(path)
    metadata = header.pop("__metadata__", {})
    _check_format(path, metadata, format)
    tensors = {}
    for name, entry in header.items():
        if (dtype := _DTYPES.get(entry["dtype"])) is None:
            raise ValueError(f"{path} holds {name} as {entry['dtype']}; the dtypes read are {', '.join(_DTYPES)}.")
        offset = start + entry["data_offsets"][0]
        tensors[name] = StoredTensor(path.absolute(), stamp, dtype, torch.Size(entry["shape"]), offset)
    return metadata, tensors


def _read_header(path: Path) -> tuple[dict[str, Any], int, tuple[int, int]]:
    """Return the header of a ``.safetensors`` file in its own order, where the data start, and the file's stamp."""
    try:
        with safe_open(path, framework="pt"):  # checks the header, and that the file ends where it says
            pass
    except SafetensorError as error:
        raise ValueError(
            f"{path} is truncated, damaged or no .safetensors file ({error}): copy or save it again."
        ) from None
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(length)), 8 + length, _stamp(file)


def _read_index(path: Path) -> dict[str, Any]:
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


def _write(
    path: Path, tensors: Mapping[str, AnyTensor], metadata: Mapping[str, str], dtype: torch.dtype | None
) -> None:
    """Write one ``.safetensors`` file piece by piece; ``safetensors.torch.save_file`` wants all of it in memory."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + _nbytes(tensor, dtype)
        shape = list(tensor.shape)
        header[name] = {"dtype": _CODES[dtype or tensor.dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes
    with atomic_write(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            for piece in pieces(tensor):
                file.write(_encoded(piece, dtype or tensor.dtype, name))


def _encoded(piece: Tensor, dtype: torch.dtype, name: str) -> bytearray:
    """Cast a flat piece into bytes, refusing what the dtype cannot hold."""
    buffer = bytearray(piece.numel() * dtype.itemsize)
    encoded = torch.frombuffer(buffer, dtype=dtype).copy_(piece)
    if piece.dtype != dtype and dtype.is_floating_point:
        check_cast(name, piece.cpu(), encoded)
    return buffer


def check_cast(name: str, before: Tensor, after: Tensor) -> None:
    """Refuse a cast that turned a finite value infinite or, in float16, a non-zero one into zero.

    float16 ends at 6e-8, where most of a Fisher information lies below. bfloat16 has the range of float32, and what
    vanishes there (below 1e-40) is let go.

    Args:
        name: What the tensor is called in the message.
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
    limit = math.inf if max_shard_size is None else _bytes(max_shard_size)
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


def _bytes(size: str | int) -> int:
    """Read a size as huggingface_hub does: ``"5GB"`` is 5 * 1000**3 bytes, ``"5GiB"`` 5 * 1024**3."""
    if match := re.fullmatch(r"(\d+) *(?:([KMGT])(I?)B)?", str(size).strip().upper()):
        number, prefix, binary = match.groups()
        nbytes = int(number) * (1024 if binary else 1000) ** " KMGT".index(prefix or " ")
        if nbytes:
            return nbytes
    raise ValueError(f'max_shard_size must be a positive number of bytes or like "5GB", "500MiB"; got {size!r}.')


def _single_and_index(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Return the two files that a name may stand for: ``name.safetensors`` and its ``.index.json``."""
    path = Path(path)
    name = path.name.removesuffix(".index.json").removesuffix(".safetensors") + ".safetensors"
    return path.with_name(name), path.with_name(name + ".index.json")


def _free_names(single: Path, count: int) -> list[Path]:
    """Name the shards, with a random tag if any plain name is taken: an older set must stay readable meanwhile."""
    stem = single.name.removesuffix(".safetensors")
    while True:
        names = [single.with_name(f"{stem}-{n:05d}-of-{count:05d}.safetensors") for n in range(1, count + 1)]
        if not any(name.exists() for name in names):
            return names
        stem = f"{single.name.removesuffix('.safetensors')}-{token_hex(4)}"


def _refuse_foreign(single: Path, index: Path, format: Format) -> None:
    """Overwrite one's own kind or a damaged file, but no model that happens to have this name."""
    metadata = []
    with suppress(ValueError, OSError):
        metadata.append((single, _read_header(single)[0].get("__metadata__", {})))
    with suppress(ValueError, OSError):
        metadata.append((index, _read_index(index)["metadata"]))
    for path, said in metadata:
        if said.get("format") != format.name or "index" in said:
            is_what = f"is a shard of {said['index']}" if "index" in said else f"holds no {format.noun}"
            raise FileExistsError(
                errno.EEXIST,
                f"{path} {is_what} and is not overwritten: choose another name, or delete it first.",
            )


def _remove_stale(single: Path, index: Path, format: Format) -> None:
    """Remove what :func:`open_tensors` would not read: leftovers of older or unfinished saves, on failure of this one.

    It never raises, since by now the save has succeeded, or failed for a reason of its own.
    """
    try:
        valid = set(_read_index(index)["weight_map"].values()) if index.is_file() else set()
    except (ValueError, OSError):
        return  # a damaged index cannot say what is stale
    stem = single.name.removesuffix(".safetensors")
    shard = re.compile(re.escape(stem) + r"(-[0-9a-f]{8})?-\d{5}-of-\d{5}\.safetensors")
    candidates = [(single, None)] if valid else []
    with suppress(OSError):
        paths = single.parent.glob(f"{glob.escape(stem)}-*.safetensors")
        candidates += [(path, index.name) for path in paths if shard.fullmatch(path.name) and path.name not in valid]
    for path, of_index in candidates:
        with suppress(ValueError, OSError):
            metadata, _ = _open(path, format)
            if metadata.get("index") == of_index:
                path.unlink()


def _filled(file: IO[bytes], into: memoryview) -> bool:
    """Read until ``into`` is full; an unbuffered read may bring less than it was asked for."""
    while into and (count := file.readinto(into)):
        into = into[count:]
    return not into


def _stamp(file: IO[bytes]) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _sync(folder: Path) -> None:
    """Make a rename durable where the system can (Windows cannot open folders)."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _advice(error: OSError, path: Path) -> str:
    return {
        errno.ENOENT: f"the folder {path.parent} does not exist: create it, or write elsewhere.",
        errno.ENOTDIR: f"{path.parent} is not a folder: write elsewhere.",
        errno.EACCES: f"the folder {path.parent} may not be written to: change its permissions, or write elsewhere.",
        errno.EROFS: f"the folder {path.parent} is on a read-only disk: write elsewhere.",
        errno.ENOSPC: f"no space left for {path}; what stood there is unchanged: free space, or write elsewhere.",
        errno.EDQUOT: f"the disk quota is used up for {path}; what stood there is unchanged: write elsewhere.",
    }.get(error.errno, f"{path} cannot be written: {error.strerror}.")
