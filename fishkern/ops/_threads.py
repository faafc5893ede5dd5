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
    is waited for is at most one of them. For that the work must call nothing that has threads of its own, as PyTorch's
    operations on more than :data:`ALONE` entries do; numpy's have none, and let other threads run meanwhile.

    Args:
        work: Called in any of the threads, beside itself, without the modes of PyTorch that the caller is in. What it
            raises, the loop over the results raises, and work that has not begun by then is dropped.
        items: Taken in the caller's thread, one for each thread and one more ahead of the results.
        count: How many threads. With one, with a single item, and where the interpreter is about to end and starts no
            more threads, all is done in the caller's.

    Yields:
        Each item with its result.
    """
    items = iter(items)
    two = list(islice(items, 2)) if count > 1 else []
    items = chain(two, items)
    pool = ThreadPoolExecutor(count, "fishkern") if len(two) == 2 else None
    if pool is None or not _starts(pool):
        yield from ((item, work(item)) for item in items)
        return
    try:
        begun: deque[tuple[Item, Future[Result]]] = deque()
        for item in items:
            begun.append((item, pool.submit(work, item)))
            if len(begun) > count:
                first, result = begun.popleft()
                yield first, result.result()
        while begun:
            first, result = begun.popleft()
            yield first, result.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _starts(pool: ThreadPoolExecutor) -> bool:
    try:
        pool.submit(int)
    except RuntimeError:
        return False
    return True
