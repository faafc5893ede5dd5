"""When to stop, and what to say meanwhile."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Limit:
    """A time after which no run begins: one is begun if the longest so far would still fit."""

    def __init__(self, seconds: float | None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds
        self._longest = 0.0
        self.reached = False

    def allows(self) -> bool:
        if self._end is not None and time.monotonic() + self._longest > self._end:
            self.reached = True
        return not self.reached

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Time one run."""
        start = time.monotonic()
        yield
        self._longest = max(self._longest, time.monotonic() - start)


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", file=sys.stderr, flush=True)
