"""The case of a busy machine: neighbours run while they should, providers agree, and every load is measured."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
from benchmarks.cases import busy
from benchmarks.engine.origin import origin
from benchmarks.subjects.neighbours import neighbours, threads
from benchmarks.subjects.scores import TopK


def children() -> list[int]:
    """The processes that this one has started and that still run."""
    return [int(one) for task in Path("/proc/self/task").iterdir() for one in (task / "children").read_text().split()]


def test_neighbours_compute_until_the_block_ends():
    before = set(children())
    with neighbours(2):
        (first, second) = (pid for pid in children() if pid not in before)
        deadline = time.monotonic() + 20
        while min(ticks(first), ticks(second)) < 3:  # hundredths of a second
            assert time.monotonic() < deadline, "a neighbour does not compute"
            time.sleep(0.01)
    assert set(children()) == before


def ticks(pid: int) -> int:
    """The processor time of a process, in clock ticks."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11])


def test_threads_are_given_back():
    before = torch.get_num_threads()
    with pytest.raises(KeyError), threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise KeyError
    assert torch.get_num_threads() == before


class Once:
    """A benchmark fixture that runs its rounds and keeps nothing."""

    def pedantic(self, run, rounds):
        for _ in range(rounds):
            run()


def test_every_provider_is_measured_under_every_load(monkeypatch):
    seen: list[tuple[int, int]] = []

    def timed(run):
        seen.append((len(children()), torch.get_num_threads()))
        assert sum(map(len, run())) == 100
        return 1.0

    monkeypatch.setattr(busy, "seconds_of", timed)
    before, own = len(children()), torch.get_num_threads()
    providers = busy.topk(TopK(10**4, 0.01, blocks=2))
    seconds = busy.measured(providers, Once(), rounds=2)
    assert set(seconds) == {(name, load) for name in ("fishkern", "sampled_threshold") for load in busy.LOADS}
    assert all(len(values) == 2 for values in seconds.values())
    expected = [(before + load.neighbours, 1 if load.one_thread else own) for load in busy.LOADS for _ in providers]
    assert seen == 2 * expected


def test_records_tell_the_loads_apart():
    """Beside what every record says of its origin, such as the threads of torch."""
    described = [busy.description("pass", "a case", "fishkern", load) for load in busy.LOADS]
    assert len({(one["neighbours"], one["one_thread"]) for one in described}) == len(busy.LOADS)
    assert not described[0].keys() & origin().keys()
