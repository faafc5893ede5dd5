"""Threads that take the next piece of work as soon as they are free."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

ALONE = 2**15  # entries up to which an operation of PyTorch runs in the thread that calls it
# A few threads use up what memory delivers.
_MOST = 16
# Begun for each thread beyond the one whose result is awaited, so that none waits for the caller.
_AHEAD = 2


def threads() -> int:
    """Say how many threads gain: as many as PyTorch's own operations take, but not more than memory keeps busy.

    Returns:
        At least 1.
    """
    return min(torch.get_num_threads(), _MOST)


def in_threads(work: Callable[[Item], Result], items: Iterable[Item], count: int) -> Iterator[tuple[Item, Result]]:
    """Do some work on many items in several threads, and give the results in the order of the items.

    PyTorch deals the pieces of each operation to its threads once, and waits for the last: beside a busy process that
    is one whose core has another to serve, again and again. Here a thread that is held up does fewer items, and what
    is waited for is at most one of them. So the work should call nothing that has threads of its own, as PyTorch's
    operations on more than :data:`ALONE` entries do; numpy's have none, and let other threads run meanwhile.

    Args:
        work: Called in any of the threads, beside itself. What it raises, the loop over the results raises.
        items: Taken in the caller's thread, a few ahead of the results.
        count: How many threads. The caller's own does it all where that is one at most, and a single item.

    Yields:
        Each item with its result.
    """
    items = iter(items)
    two = list(islice(items, 2)) if count > 1 else []
    items = chain(two, items)
    if len(two) < 2:
        yield from ((item, work(item)) for item in items)
        return
    with ThreadPoolExecutor(count, "fishkern") as pool:
        begun: deque[tuple[Item, Future[Result]]] = deque()
        for item in items:
            begun.append((item, pool.submit(work, item)))
            if len(begun) > _AHEAD * count:
                first, result = begun.popleft()
                yield first, result.result()
        while begun:
            first, result = begun.popleft()
            yield first, result.result()
