"""Work that is dealt to threads comes back in order, a few items ahead, with its errors."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fishkern.ops._threads import in_threads, threads


@pytest.mark.parametrize("count", [1, 2, 5])
def test_results_come_in_the_order_of_the_items(count: int):
    """However long each takes: every other item waits for the one after it, where there is a thread for that."""
    done = [threading.Event() for _ in range(20)]

    def square(number: int) -> int:
        if count > 1 and number % 2 == 0:
            assert done[number + 1].wait(10)
        done[number].set()
        return number**2

    assert list(in_threads(square, range(20), count)) == [(number, number**2) for number in range(20)]


@pytest.mark.parametrize("count", [1, 3])
def test_items_are_taken_a_few_ahead(count: int):
    taken: list[int] = []
    results = in_threads(lambda number: number, (taken.append(n) or n for n in range(100)), count)
    assert taken == []
    assert next(results) == (0, 0)
    assert len(taken) == (1 if count == 1 else count + 1)
    results.close()
    assert len(taken) < 10


@pytest.mark.parametrize("count", [1, 3])
def test_the_first_error_is_raised(count: int):
    def work(number: int) -> int:
        if number in (5, 7):
            raise ValueError(f"item {number}")
        return number

    seen = []
    with pytest.raises(ValueError, match="item 5"):
        seen.extend(in_threads(work, range(100), count))
    before = threading.active_count()
    results = in_threads(work, range(100), count)
    assert [next(results)[0] for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="item 5"):
        next(results)
    assert threading.active_count() == before


def test_after_an_error_little_more_is_done():
    begun, go_on = [], threading.Event()

    def work(number: int) -> None:
        begun.append(number)
        if number == 0:
            raise ValueError("item 0")
        assert go_on.wait(10)

    with pytest.raises(ValueError, match="item 0"):
        threading.Timer(0.2, go_on.set).start()
        list(in_threads(work, range(100), 2))
    assert len(begun) < 5


def test_where_no_thread_starts_the_caller_does_it_all(monkeypatch: pytest.MonkeyPatch):
    """As at the end of the interpreter."""

    def refuse(*args: object) -> None:
        raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    monkeypatch.setattr(ThreadPoolExecutor, "submit", refuse)
    assert list(in_threads(lambda number: -number, range(3), 4)) == [(0, 0), (1, -1), (2, -2)]


def test_a_single_item_is_done_by_the_caller():
    assert list(in_threads(lambda _: threading.get_ident(), [0], 4)) == [(0, threading.get_ident())]


def test_as_many_as_pytorch_takes():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert threads() == 1
        torch.set_num_threads(3)
        assert threads() == 3
    finally:
        torch.set_num_threads(before)
