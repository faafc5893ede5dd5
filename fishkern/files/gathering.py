"""Tensors of which each process holds a part (``DTensor``): read piece by piece by all, written to a file by one.

Everything here is a collective operation: all processes call it, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from fishkern.files.tensors import AnyTensor, pieces


def is_sharded(tensor: AnyTensor) -> bool:
    """Tell whether each process holds a part of a tensor.

    Args:
        tensor: In memory or on disk.

    Returns:
        Whether it is a ``DTensor``.
    """
    return hasattr(tensor, "device_mesh")


def write_from_ranks(tensors: Mapping[str, AnyTensor], write: Callable[[Mapping[str, AnyTensor]], Path]) -> Path:
    """Let the first process write tensors that all of them hold parts of, with one piece in memory at a time.

    Args:
        tensors: In the order in which they are written, on all processes.
        write: Writes tensors, reading each once and in order.

    Returns:
        What ``write`` returns, on all processes.

    Raises:
        RuntimeError: The first process has failed; the message says with what.
    """
    feed = _feed(tensors)
    outcome: list[Any] = [None, None]
    error: Exception | None = None
    if dist.get_rank() == 0:
        try:
            outcome = [write({name: _Fed(tensor, feed) for name, tensor in tensors.items()}), None]
        except Exception as raised:  # raised below: meanwhile the others wait for this process to take part
            error, outcome = raised, [None, f"{type(raised).__name__}: {raised}"]
    for _ in feed:
        pass
    dist.broadcast_object_list(outcome, src=0)
    if error is not None:
        raise error
    if outcome[1] is not None:
        raise RuntimeError(f"rank 0 failed with {outcome[1]}")
    return outcome[0]


def _feed(tensors: Mapping[str, AnyTensor]) -> Iterator[Tensor]:
    for tensor in tensors.values():
        yield from pieces(tensor)


@dataclass(frozen=True, eq=False)
class _Fed:
    """A tensor whose pieces come from those of all tensors, in turn."""

    tensor: AnyTensor
    feed: Iterator[Tensor]

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def numel(self) -> int:
        return self.tensor.numel()

    def pieces(self, numel: int) -> Iterator[Tensor]:
        for _ in range(-(-self.numel() // numel)):
            yield next(self.feed)
