"""Memory for many long-lived tensors, returned to the system when they end."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# In entries. The C library gets blocks above 32 MiB from the system one by one, and returns them at once. Smaller ones
# stay in a heap, where long-lived ones between others leave holes: only the first few may be smaller.
_FIRST, _BLOCK = 2**14, 2**23 + 2**10


@dataclass(frozen=True, slots=True)
class Span:
    """Some neighbouring entries of a larger tensor; not a Tensor object, because each of those takes heap space.

    Args:
        memory: ``[any]``.
        start: Index of the first entry.
        stop: Index after the last.
    """

    memory: Tensor
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def tensor(self) -> Tensor:
        """The entries, ``[n]``, a view."""
        return self.memory[self.start : self.stop]

    def first(self, count: int) -> Span:
        """Take the first entries.

        Args:
            count: How many at most.

        Returns:
            Their span.
        """
        return Span(self.memory, self.start, min(self.stop, self.start + count))


EMPTY = Span(torch.empty(0), 0, 0)


class Arena:
    """Copies tensors of one dtype one after another into large blocks. A block is freed with the last of its spans."""

    def __init__(self) -> None:
        self._block, self._used, self._next = EMPTY.memory, 0, _FIRST

    def put(self, tensor: Tensor) -> Span:
        """Copy a tensor into the arena; one on another device than the CPU stays where it is.

        Args:
            tensor: ``[n]``.

        Returns:
            Its span there.
        """
        if not len(tensor):
            return EMPTY
        if tensor.device.type != "cpu":
            return Span(tensor, 0, len(tensor))
        if self._block.dtype != tensor.dtype or self._used + len(tensor) > len(self._block):
            self._block, self._used = tensor.new_empty(max(self._next, len(tensor))), 0
            self._next = min(8 * self._next, _BLOCK)
        span = Span(self._block, self._used, self._used + len(tensor))
        span.tensor.copy_(tensor)
        self._used = span.stop
        return span
