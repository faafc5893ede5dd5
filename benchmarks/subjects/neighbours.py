"""Other processes on the same cores, as data loaders and colleagues are."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Says that it runs, and then keeps one core busy.
_BURN = "print(flush=True)\nwhile True: pass"


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """Run so many processes that compute without a pause, until the ``with`` block ends.

    Args:
        count: How many, each of which keeps one core busy.

    Yields:
        Nothing, when all of them run.
    """
    running = [subprocess.Popen([sys.executable, "-c", _BURN], stdout=subprocess.PIPE) for _ in range(count)]
    try:
        for one in running:
            assert one.stdout is not None
            one.stdout.readline()
        yield
    finally:
        for one in running:
            one.kill()
            one.communicate()


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch compute with so many threads inside the ``with`` block.

    Args:
        count: How many.

    Yields:
        Nothing.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
