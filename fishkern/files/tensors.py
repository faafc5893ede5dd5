"""Tensors that stay on disk until they are read, and the iteration over any tensor piece by piece."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar, TypeAlias

import torch
from torch import Tensor
from torch import distributed as dist

PIECE = 2**20  # entries in memory at once: 4 MiB of float32, which fit into the cache of a CPU


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that stays in its ``.safetensors`` file until it is read.

    No file is kept open and nothing is memory-mapped: reading costs the memory of what is read, may happen in any
    thread or process, and detects a file that was replaced in the meantime.

    Attributes:
        path: The file.
        stamp: Size in bytes and modification time in ns of the file when it was opened.
        dtype: The dtype on disk.
        shape: The tensor's shape.
        offset: Number of bytes in the file before its first entry.
    """

    path: Path
    stamp: tuple[int, int]
    dtype: torch.dtype
    shape: torch.Size
    offset: int
    device: ClassVar[torch.device] = torch.device("cpu")  # as a tensor has it: what is read is on the CPU

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
            buffers: Memory for each piece, large enough; a piece is valid until its buffer is reused. ``None``
                allocates new memory each time.

        Yields:
            ``[numel]`` (the last one shorter), of the dtype on disk, on the CPU.

        Raises:
            FileNotFoundError: The file is gone.
            RuntimeError: The file has changed since it was opened.
        """
        starts = range(start, self.numel(), numel)
        yield from self.spans(((first, min(first + numel, self.numel())) for first in starts), buffers=buffers)

    def spans(
        self, spans: Iterable[tuple[int, int]], *, buffers: Iterator[bytearray] | None = None
    ) -> Iterator[Tensor]:
        """Read some parts of the tensor, one in memory at a time, and nothing else of the file.

        Args:
            spans: Flat ``(start, stop)`` of each.
            buffers: As for :meth:`pieces`.

        Yields:
            ``[stop - start]``, of the dtype on disk, on the CPU.

        Raises:
            FileNotFoundError: The file is gone.
            RuntimeError: The file has changed since it was opened.
        """
        if not self.path.is_file():
            raise FileNotFoundError(errno.ENOENT, f"{self.path} is gone since it was opened: load it again.")
        # Unbuffered, so that the bytes go straight into the memory of the piece.
        with open(self.path, "rb", buffering=0) as file:
            for start, stop in spans:
                file.seek(self.offset + start * self.dtype.itemsize)
                nbytes = (stop - start) * self.dtype.itemsize
                buffer = bytearray(nbytes) if buffers is None else next(buffers)
                # Checked at each piece: a file that is rewritten in place would mix the values of two saves.
                if stamp_of(file) != self.stamp or not _read_into(file, memoryview(buffer)[:nbytes]):
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
        except RuntimeError:  # torch's own when memory runs out
            size = f"{self.numel() * dtype.itemsize / 2**30:,.3g} GiB"
            raise MemoryError(f"a tensor of {self.path} needs {size} of memory, which is not available.") from None
        rest = tensor.view(-1)
        for piece in self.pieces():
            rest[: len(piece)] = piece
            rest = rest[len(piece) :]
        return tensor


AnyTensor: TypeAlias = Tensor | StoredTensor


def pieces(tensor: AnyTensor, numel: int = PIECE) -> Iterator[Tensor]:
    """Iterate over a tensor in flat pieces, in memory or on disk.

    Args:
        tensor: In memory or on disk. A ``DTensor``, of which each process holds a part, is read by all of them
            together, and each gets every piece.
        numel: Entries per piece.

    Yields:
        ``[numel]`` (the last one shorter), the entries in row-major order; views where the tensor is contiguous.
    """
    if hasattr(tensor, "pieces"):
        yield from tensor.pieces(numel)
    elif hasattr(tensor, "device_mesh"):
        yield from _gathered(tensor, numel)
    elif tensor.numel():
        yield from tensor.detach().reshape(-1).split(numel)


def _gathered(tensor: Any, numel: int) -> Iterator[Tensor]:
    """Gather a ``DTensor`` piece by piece, on all processes that hold parts of it."""
    split = [place for place, one in enumerate(tensor.placements) if not one.is_replicate()]
    if [getattr(tensor.placements[place], "dim", None) for place in split] != [0]:
        yield from pieces(tensor.full_tensor(), numel)
        return
    mesh, local = tensor.device_mesh, tensor.detach().to_local().reshape(-1)
    chunk = -(-tensor.shape[0] // mesh.size(split[0])) * tensor.shape[1:].numel()  # as torch.chunk deals the rows
    start = chunk * mesh.get_local_rank(split[0])
    for first in range(0, tensor.numel(), numel):
        piece = local.new_zeros(min(numel, tensor.numel() - first))
        low, high = max(first, start), min(first + len(piece), start + len(local))
        if low < high:
            piece[low - first : high - first] = local[low - start : high - start]
        # bytes add up to the same bits, since all but one process have zeros there
        dist.all_reduce(piece.view(torch.uint8), group=mesh.get_group(split[0]))
        yield piece


def stamp_of(file: IO[bytes]) -> tuple[int, int]:
    """Return what changes when a file is written again.

    Args:
        file: Open.

    Returns:
        Its size in bytes and modification time in ns.
    """
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _read_into(file: IO[bytes], memory: memoryview) -> bool:
    """Fill the memory, and say whether the file was long enough; one unbuffered read may return less than requested."""
    while memory and (count := file.readinto(memory)):
        memory = memory[count:]
    return not memory
