"""K2: exact top-k over hundreds of tensors, against one read of them and against torch's top-k of their concatenation.

``one_read`` sums every tensor: what any method must do at least once. Every record has the bytes of the scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu import Part, Record
from benchmarks.gpu._timing import compare
from benchmarks.topk_cases import TopK
from fishkern.ops import streaming_topk

CASES = {
    "1e9 0.01%": TopK(10**9, 1e-4, 291),
    "1e9 0.5%": TopK(10**9, 0.005, 291),
    "1e9 10%": TopK(10**9, 0.1, 291),
    "1e9 50%": TopK(10**9, 0.5, 291),
    "8e9 0.5%": TopK(8 * 10**9, 0.005, 291),
    "64e5 in 64s": TopK(64 * 10**5, 0.005, 10**5),
}


def parts(device: torch.device) -> list[Part]:
    every = {name: partial(_measure, case, device) for name, case in CASES.items()}
    every["1e9 half zeros"] = partial(_measure, TopK(10**9, 0.6, 291), device, zeros=0.5)
    return [Part(name, run) for name, run in every.items()]


def _measure(case: TopK, device: torch.device, zeros: float = 0.0) -> Iterator[Record]:
    if 4.5 * case.n > torch.cuda.get_device_properties(device).total_memory:
        return
    scores = case.scores(device)
    for block in scores if zeros else []:
        block[torch.rand_like(block) < zeros] = 0
    k = int(sum(map(len, scores)) * case.density)
    rivals: dict[str, Callable[[], object]] = {
        "fishkern": partial(streaming_topk, scores, k, backend="triton"),
        "torch": partial(streaming_topk, scores, k, backend="torch"),
        "one_read": lambda: [block.sum() for block in scores],
        "cat_topk": lambda: torch.cat(scores).topk(k).indices,
    }
    found = compare(rivals, ours="fishkern", device=device, flush=False)
    check(scores, k)
    for provider, figures in found.items():
        described = {**asdict(case), "zeros": zeros}
        yield {"provider": provider, "case": described, "dtype": "float32", "bytes": 4 * case.n, **figures}


def check(scores: list[Tensor], k: int) -> None:
    """Demand what a timing alone does not show: as many as asked for, and the same by both backends."""
    ours = streaming_topk(scores, k, backend="triton")
    if sum(map(len, ours)) != k:
        raise ValueError(f"{sum(map(len, ours))} selected instead of {k}")
    reference = streaming_topk(scores, k, backend="torch")
    if not all(torch.equal(a, b) for a, b in zip(ours, reference, strict=True)):
        raise ValueError("the kernels select other scores than the reference")
