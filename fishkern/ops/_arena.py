"""Memory for many long-lived arrays, returned to the system when they end."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# In entries. The C library gets blocks above 32 MiB from the system one by one, and returns them at once. Smaller ones
# stay in a heap, where long-lived ones between others leave holes: only the first few may be smaller.
_FIRST, _BLOCK = 2**14, 2**23 + 2**10


@dataclass(frozen=True, slots=True)
class Span:
    """Some neighbouring entries of a larger array; not an array, because each of those takes more heap space.

    Args:
        memory: ``[any]``.
        start: Index of the first entry.
        stop: Index after the last.
    """

    memory: np.ndarray
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def array(self) -> np.ndarray:
        """The entries, ``[n]``, a view."""
        return self.memory[self.start : self.stop]


EMPTY = Span(np.empty(0), 0, 0)


class Arena:
    """Copies arrays of one dtype one after another into large blocks. A block is freed with the last of its spans."""

    def __init__(self) -> None:
        self._block, self._used, self._next = EMPTY.memory, 0, _FIRST

    def put(self, array: np.ndarray) -> Span:
        """Copy an array into the arena.

        Args:
            array: ``[n]``.

        Returns:
            Its span there.
        """
        if not len(array):
            return EMPTY
        if self._block.dtype != array.dtype or self._used + len(array) > len(self._block):
            self._block, self._used = np.empty(max(self._next, len(array)), array.dtype), 0
            self._next = min(8 * self._next, _BLOCK)
        span = Span(self._block, self._used, self._used + len(array))
        span.array[:] = array
        self._used = span.stop
        return span
