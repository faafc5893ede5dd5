"""Exact top-k over many tensors.

On a CPU in memory against torch, and from a file against one cold sequential read of it. All providers take turns
within each round, and the file is dropped from the page cache before every run that reads it. ``-k 1.0e+08`` takes the
small cases alone; the large ones need 8 GiB of memory and 9 GB of disk.

On a GPU against one read of the scores and against torch's top-k of their concatenation. ``one_read`` sums every
tensor, which any method must do at least once, and every record has the bytes of the scores. The selection is compared
with the reference, over repeated calls, and with the blocks in the opposite order.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median

import pytest
import torch
from torch import Tensor

from benchmarks.engine.memory import GIB, MIB, available_memory, peak_mib, rounded
from benchmarks.engine.process import in_process
from benchmarks.engine.turns import spread
from benchmarks.gpu import Part, Record, too_large
from benchmarks.gpu.timing import time_providers
from benchmarks.rivals.providers import TOPK, runs
from benchmarks.rivals.topk import fishkern
from benchmarks.subjects.scores import TopK, drop_from_cache, read_once
from fishkern.files import Format, open_tensors
from fishkern.ops import streaming_topk

TESTS = {
    "run": ["tests/ops/test_streaming_topk.py", "tests/ops/test_streaming_topk_files.py"],
    "gpu": ["tests/ops/test_streaming_topk.py", "tests/kernels/test_streaming_topk.py"],
}
TESTED_IN = 45
PROVIDERS = runs(TOPK)

# On a CPU.
IN_MEMORY = [
    TopK(10**8, blocks=50),
    TopK(10**8, 0.0001, blocks=50),
    TopK(10**8, 0.1, blocks=50),
    TopK(10**8, 0.5, blocks=50),
    TopK(10**8, 0.5, blocks=50, zeros=0.9),
    TopK(10**9),
]
IN_FILE = [TopK(22 * 10**8), TopK(4 * 10**8, 0.5, blocks=40, zeros=0.9)]  # more than 2^31; most of them equal
ROUNDS = 5
SLOW_ROUNDS = 1  # of providers that take a minute
SLOW = {"cat_topk", "kthvalue"}
# Bytes that each takes for one score in addition to the scores: a copy, and the workspace of torch's CPU kernels.
BYTES_PER_SCORE = {"fishkern": 0, "sampled_threshold": 1, "kthvalue": 16, "cat_topk": 20}
FORMAT = Format("scores", 1, "a benchmark")
WITHOUT_INDICES = 1024  # MiB that a selection from a file may take, its indices not counted


def compared() -> dict[str, dict[str, Callable]]:
    """For ``python -m benchmarks compare``."""
    case = IN_MEMORY[0]

    def make(provider: str) -> Callable[[], object]:
        return partial(PROVIDERS[provider], case.scores(), case.k)

    return {str(case): {name: partial(make, name) for name in ("fishkern", "sampled_threshold")}}


def description(case: TopK, provider: str, quantity: str, where: str) -> Record:
    """The fields of a record other than its figures."""
    shared = {"op": "streaming_topk", "quantity": quantity, "where": where, "case": vars(case), "dtype": "float32"}
    return {**shared, "provider": provider}


@pytest.mark.parametrize("case", IN_MEMORY, ids=str)
def test_in_memory(case, benchmark, record):
    scores, free = case.scores(), available_memory()
    left_out = {
        name: f"needs {needed * case.n / GIB:.0f} GiB of memory besides the scores"
        for name, needed in BYTES_PER_SCORE.items()
        if needed * case.n > free
    }
    seconds: dict[str, list[float]] = {name: [] for name in PROVIDERS}
    thresholds: dict[str, float] = {}

    def run(name: str) -> None:
        start = time.perf_counter()
        selected = PROVIDERS[name](scores, case.k)
        seconds[name].append(time.perf_counter() - start)
        blocks = scores if len(selected) == len(scores) else [torch.cat(scores)]
        smallest = min(b[i].min().item() for b, i in zip(blocks, selected, strict=True) if len(i))
        agreed = thresholds.setdefault("all", smallest)
        assert smallest == agreed, f"{name} selects down to {smallest}, another down to {agreed}"

    def rivals() -> None:
        for name in PROVIDERS:
            finished = name in SLOW and len(seconds[name]) == SLOW_ROUNDS
            if name != "fishkern" and name not in left_out and not finished:
                run(name)

    rivals()
    run("fishkern")
    for name in PROVIDERS.keys() - SLOW:
        seconds[name].clear()  # a warm-up, which the slow ones do without
    assert sum(map(len, fishkern(scores, case.k))) == case.k
    benchmark.pedantic(fishkern, args=(scores, case.k), setup=rivals, rounds=ROUNDS)
    seconds["fishkern"] = list(benchmark.stats.stats.data)
    for name, values in seconds.items():
        measured = {"left out": left_out[name]} if name in left_out else {"seconds": spread(values)}
        described = description(case, name, "time", "memory")
        record("streaming_topk", {**described, "rounds": len(values), **measured})
        if values:
            benchmark.extra_info[name] = round(median(values), 3)


@pytest.fixture(scope="module", params=IN_FILE, ids=str)
def file(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("scores") / "scores.safetensors"
    request.param.write(path)
    yield request.param, path
    path.unlink()


def test_from_a_file(file: tuple[TopK, Path], benchmark, record):
    case, path = file
    stored = list(open_tensors(path, format=FORMAT)[1].values())
    reads: list[float] = []

    def cold() -> None:
        drop_from_cache(path)
        start = time.perf_counter()
        read_once(path)
        reads.append(time.perf_counter() - start)
        drop_from_cache(path)

    selected = benchmark.pedantic(fishkern, args=(stored, case.k), setup=cold, rounds=3)
    assert sum(map(len, selected)) == case.k
    for name, values in {"fishkern": list(benchmark.stats.stats.data), "one_cold_read": reads}.items():
        described = {**description(case, name, "time", "file"), "bytes": path.stat().st_size}
        record("streaming_topk", {**described, "rounds": len(values), "seconds": spread(values)})
        benchmark.extra_info[name] = round(median(values), 3)


def test_peak_memory_from_a_file(file: tuple[TopK, Path], record):
    case, path = file
    figures = in_process("benchmarks.cases.streaming_topk:memory", path, case.k)
    assert figures["peak_mib"] - figures["indices_mib"] < WITHOUT_INDICES
    described = {**description(case, "fishkern", "memory", "file"), "bytes": path.stat().st_size}
    record("streaming_topk", {**described, **figures})


def memory(path: Path, k: int) -> Record:
    """The peak of a selection from a file, and the size of the indices, which it includes."""
    _, stored = open_tensors(path, format=FORMAT)
    streaming_topk([torch.rand(10**5)], 100)  # libraries allocate on first use
    selected: list[Tensor] = []
    peak = peak_mib(lambda: selected.extend(streaming_topk(list(stored.values()), k)))
    return rounded({"peak_mib": peak, "indices_mib": sum(indices.nbytes for indices in selected) / MIB})


# On a GPU.
CASES = {
    "1e9 0.01%": TopK(10**9, 1e-4, 291),
    "1e9 0.5%": TopK(10**9, 0.005, 291),
    "1e9 10%": TopK(10**9, 0.1, 291),
    "1e9 50%": TopK(10**9, 0.5, 291),
    "8e9 0.5%": TopK(8 * 10**9, 0.005, 291),
    "64e5 in 64s": TopK(64 * 10**5, 0.005, 10**5),
    "1e9 half zeros": TopK(10**9, 0.6, 291, zeros=0.5),  # the threshold is zero
    "1e8 half zeros": TopK(10**8, 0.6, 50, zeros=0.5),
}
ONE_ULP = torch.finfo(torch.float32).eps
# Other scores; each changes a block of a TopK in place.
DISTRIBUTIONS: dict[str, Callable[[Tensor], object]] = {
    "all equal": lambda block: block.fill_(1.0),
    "within an ulp": lambda block: block.copy_(1 + ONE_ULP * (torch.rand_like(block) < 0.3)),
    "nine values": lambda block: block.copy_(torch.randint_like(block, 9)),
    "denormals": lambda block: block.clamp_(max=1).mul_(1e-39),
    "ascending": lambda block: block.copy_(block.sort().values),  # neighbours in a sample are alike
    "infinities": lambda block: block.masked_fill_(torch.rand_like(block) < 0.01, math.inf),
}
CHECKED_CALLS = 3


def parts(device: torch.device) -> list[Part]:
    every = {name: partial(_measure, case, device) for name, case in CASES.items()}
    for name in DISTRIBUTIONS:
        every[f"1e8 {name}"] = partial(_measure, TopK(10**8, 0.005, 50), device, name)
    every["1e8 half on the CPU"] = partial(_half, TopK(10**8, 0.005, 50), device)
    return [Part(name, run, 40 if name.startswith("8e9") else 15) for name, run in every.items()]


def _measure(case: TopK, device: torch.device, distribution: str = "") -> Iterator[Record]:
    if (most := 4.5 * case.n) > torch.cuda.get_device_properties(device).total_memory:
        yield too_large(case, most)
        return
    scores = case.scores(device)
    torch.manual_seed(0)
    for block in scores if distribution else []:
        DISTRIBUTIONS[distribution](block)
    k = int(sum(map(len, scores)) * case.density)
    rivals: dict[str, Callable[[], object]] = {
        "fishkern": partial(streaming_topk, scores, k, backend="triton"),
        "torch": partial(streaming_topk, scores, k, backend="torch"),
        "one_read": lambda: [block.sum() for block in scores],
        "cat_topk": lambda: torch.cat(scores).topk(k).indices,
    }
    figures = time_providers(rivals, ours="fishkern", device=device, flush=False)
    check(scores, k)
    yield from _records({**asdict(case), "distribution": distribution}, figures)


def _half(case: TopK, device: torch.device) -> Iterator[Record]:
    """Every other block on the CPU, which the kernel does not take: by the reference, or moved to the GPU first."""
    scores = [block.cpu() if number % 2 else block for number, block in enumerate(case.scores(device))]

    def ours() -> list[Tensor]:
        return streaming_topk(scores, case.k)

    def moved() -> list[Tensor]:
        return streaming_topk([block.to(device) for block in scores], case.k, backend="triton")

    figures = time_providers({"fishkern": ours, "moved": moved}, ours="fishkern", device=device, flush=False)
    demand_equal(ours(), moved())
    yield from _records(asdict(case), figures)


def _records(case: Record, figures: dict[str, Record]) -> Iterator[Record]:
    for provider, measured in figures.items():
        yield {"provider": provider, "case": case, "dtype": "float32", "bytes": 4 * case["n"], **measured}


def demand_equal(mixed: list[Tensor], on_one: list[Tensor]) -> None:
    """Raise unless the selection from blocks on two devices is that from blocks on one."""
    if not all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(mixed, on_one, strict=True)):
        raise ValueError("the selection from blocks on two devices differs from that on one")


def check(scores: list[Tensor], k: int) -> None:
    """Raise unless there are ``k`` entries, the reference's, whatever the order of the blocks."""
    reference = streaming_topk(scores, k, backend="torch")
    for _ in range(CHECKED_CALLS):
        ours = streaming_topk(scores, k, backend="triton")
        if sum(map(len, ours)) != k:
            raise ValueError(f"{sum(map(len, ours))} selected instead of {k}")
        if list(map(len, ours)) != list(map(len, reference)) or not torch.equal(torch.cat(ours), torch.cat(reference)):
            raise ValueError("the kernels select other scores than the reference")
    backwards = streaming_topk(scores[::-1], k, backend="triton")[::-1]
    selected = [
        (torch.cat(indices), torch.cat([block[at] for block, at in zip(scores, indices, strict=True)]))
        for indices in (ours, backwards)
    ]
    threshold = selected[0][1].min()
    # Ties at the threshold go to other blocks when these come first; all scores above it must be the same.
    above = [[part[values > threshold] for part in (indices, values)] for indices, values in selected]
    if not all(torch.equal(one, other) for one, other in zip(*above, strict=True)):
        raise ValueError("another order of the blocks selects other scores")
