"""Exact top-k on a CPU: in memory against torch, from a file against one cold sequential read of it.

All providers take turns within each round. The file is dropped from the page cache before every run that reads it.
``-k 1.0e+08`` takes the small cases alone; the large ones need 8 GiB of memory and 9 GB of disk.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from statistics import median

import pytest
import torch

from benchmarks.topk_cases import (
    BYTES_PER_SCORE,
    GIB,
    IN_FILE,
    IN_MEMORY,
    PROVIDERS,
    available_memory,
    drop_from_cache,
    fishkern,
    read_once,
)
from benchmarks.topk_memory import peak_memory
from benchmarks.turns import spread
from fishkern.files import Format, open_tensors

TESTS = ["tests/ops/test_streaming_topk.py", "tests/ops/test_streaming_topk_files.py"]
ROUNDS = 5
SLOW_ROUNDS = 1  # of what takes a minute
SLOW = {"cat_topk", "kthvalue"}
FORMAT = Format("scores", 1, "a benchmark")
COMPARED = {str(IN_MEMORY[0]): ["fishkern", "sampled_threshold"]}  # by `python -m benchmarks compare`


def prepare(described: str, provider: str) -> partial:
    """Make one of :data:`COMPARED`."""
    (case,) = (case for case in IN_MEMORY if str(case) == described)
    return partial(PROVIDERS[provider], case.scores(), case.k)


@pytest.mark.parametrize("case", IN_MEMORY, ids=str)
def test_in_memory(case, benchmark, record):
    scores = case.scores()
    smallest = None
    seconds: dict[str, list[float]] = {name: [] for name in PROVIDERS}
    left_out = {}
    for name, needed in BYTES_PER_SCORE.items():
        if needed * case.n > available_memory():
            left_out[name] = f"needs {needed * case.n / GIB:.0f} GiB of memory beside the scores"

    def run(name: str) -> float:
        start = time.perf_counter()
        found = PROVIDERS[name](scores, case.k)
        seconds[name].append(time.perf_counter() - start)
        if len(found) == len(scores):
            return min(block[places].min().item() for block, places in zip(scores, found, strict=True) if len(places))
        return torch.cat(scores)[found[0]].min().item()

    def take_turns() -> None:
        nonlocal smallest
        for name in PROVIDERS:
            if name in left_out or name == "fishkern" or (name in SLOW and len(seconds[name]) == SLOW_ROUNDS):
                continue
            found = run(name)
            assert smallest in (None, found), f"{name} selects down to {found}, another down to {smallest}"
            smallest = found

    assert sum(map(len, fishkern(scores, case.k))) == case.k
    take_turns()
    assert run("fishkern") == smallest
    for values in seconds.values():
        del values[:-SLOW_ROUNDS]  # the first is a warm-up, which the slow ones do without
    for name in PROVIDERS.keys() - SLOW:
        seconds[name].clear()
    benchmark.pedantic(fishkern, args=(scores, case.k), setup=take_turns, rounds=ROUNDS)
    seconds["fishkern"] = list(benchmark.stats.stats.data)
    for name, values in seconds.items():
        measured = {"left out": left_out[name]} if name in left_out else {"seconds": spread(values)}
        record(
            "streaming_topk",
            {
                "op": "streaming_topk",
                "quantity": "time",
                "where": "memory",
                "case": vars(case),
                "dtype": "float32",
                "provider": name,
                "rounds": len(values),
                **measured,
            },
        )
        if values:
            benchmark.extra_info[name] = round(median(values), 3)


@pytest.fixture(scope="module", params=IN_FILE, ids=str)
def file(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("scores") / "scores.safetensors"
    request.param.write(path)
    yield request.param, path
    path.unlink()


def test_from_a_file(file: tuple[object, Path], benchmark, record):
    case, path = file
    stored = list(open_tensors(path, format=FORMAT)[1].values())
    reads: list[float] = []

    def cold() -> None:
        drop_from_cache(path)
        start = time.perf_counter()
        read_once(path)
        reads.append(time.perf_counter() - start)
        drop_from_cache(path)

    found = benchmark.pedantic(fishkern, args=(stored, case.k), setup=cold, rounds=3)
    assert sum(map(len, found)) == case.k
    for name, values in {"fishkern": list(benchmark.stats.stats.data), "one_cold_read": reads}.items():
        record(
            "streaming_topk",
            {
                "op": "streaming_topk",
                "quantity": "time",
                "where": "file",
                "case": vars(case),
                "dtype": "float32",
                "bytes": path.stat().st_size,
                "provider": name,
                "rounds": len(values),
                "seconds": spread(values),
            },
        )
        benchmark.extra_info[name] = round(median(values), 3)


def test_peak_memory_from_a_file(file: tuple[object, Path], record):
    case, path = file
    figures = peak_memory(path, case.k)
    assert figures["peak_mib"] - figures["indices_mib"] < 1024
    record(
        "streaming_topk",
        {
            "op": "streaming_topk",
            "quantity": "memory",
            "where": "file",
            "case": vars(case),
            "dtype": "float32",
            "bytes": path.stat().st_size,
            "provider": "fishkern",
            **figures,
        },
    )
