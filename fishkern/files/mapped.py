"""Tensors whose values lie in a file instead of in memory, so that they may be larger than memory."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

_SMALLEST = 2**16  # bytes; the system maps whole pages, and a file for each bias would be one for nothing


def mapped_zeros(folder: str | os.PathLike[str], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Make a tensor of zeros in a file that is mapped into memory.

    The system reads and writes its pages as it needs them. The file has no name, so it is gone when nothing uses the
    tensor any more, also after an exception or a kill. Its room on the disk is reserved here, since a disk that is full
    later would end the process.

    Args:
        folder: Where the file lies, on a disk: a folder in memory (tmpfs) would spare nothing.
        shape: Of the tensor.
        dtype: Of the tensor.

    Returns:
        Zeros on the CPU; in ordinary memory if they are smaller than 64 KiB.

    Raises:
        OSError: The folder is missing or cannot be written to, or the disk is full. ``errno`` is the system's own.
    """
    size = prod(shape) * dtype.itemsize
    if size < _SMALLEST:
        return torch.zeros(tuple(shape), dtype=dtype)
    try:
        descriptor, path = tempfile.mkstemp(prefix=".fishkern-", suffix=".tmp", dir=folder)
    except OSError as error:
        raise OSError(error.errno, f"no file for sums can be made in {os.fspath(folder)}: {error.strerror}") from None
    try:
        _reserve(descriptor, size)
        return torch.from_file(path, shared=True, size=prod(shape), dtype=dtype).view(tuple(shape))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise OSError(
            error.errno,
            f"the disk of {os.fspath(folder)} has no room for another {size:,} bytes of sums, a number for each entry "
            "that is estimated: free some, name a folder on another disk, or estimate fewer parameters at a time",
        ) from None
    finally:
        os.close(descriptor)
        os.unlink(path)  # what is mapped stays


def _reserve(descriptor: int, size: int) -> None:
    """Let a file have so many zeros that the disk has room for."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
        return
    zeros = memoryview(bytes(min(size, 2**24)))  # macOS
    while size:
        size -= os.write(descriptor, zeros[:size])
