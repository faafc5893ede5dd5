"""Tensors that stay on disk until they are read, and the walk through any tensor piece by piece."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, ClassVar, TypeAlias

import torch
from torch import Tensor

PIECE = 2**20  # entries held in memory at once: 4 MiB of float32, which stay in the cache


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
                if stamp_of(file) != self.stamp or not _filled(file, memoryview(buffer)[:nbytes]):
                    raise RuntimeError(f"{self.path} has changed since it was opened: load it again.")
                yield torch.frombuffer(buffer, dtype=self.dtype, count=nbytes // self.dtype.itemsize)

    def read(self, dtype: torch.dtype | None = None) -> Tensor:
        """Read the whole tensor.

        Args:
            dtype: The dtype to return; ``None`` keeps the one on disk.

        Returns:
            A new tensor of :attr:`shape` on the CPU.

        Raises:
            MemoryError: It does not fit into memory.
        """
        dtype = dtype or self.dtype
        try:
            tensor = torch.empty(self.shape, dtype=dtype)
        except RuntimeError:
            size = f"{self.numel() * dtype.itemsize / 2**30:,.3g} GiB"
            raise MemoryError(f"a tensor of {self.path} needs {size}, and there is not so much memory.") from None
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


def stamp_of(file: IO[bytes]) -> tuple[int, int]:
    """Say what tells one state of a file from another.

    Args:
        file: Open.

    Returns:
        Its size in bytes and modification time in ns.
    """
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _filled(file: IO[bytes], into: memoryview) -> bool:
    """Read until ``into`` is full; an unbuffered read may bring less than it was asked for."""
    while into and (count := file.readinto(into)):
        into = into[count:]
    return not into
