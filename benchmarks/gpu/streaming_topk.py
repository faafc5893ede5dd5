"""K2: exact top-k over hundreds of tensors, against one read of them and against torch's top-k of their concatenation.

``one_read`` sums every tensor: what any method must do at least once. Every record has the bytes of the scores. What is
selected is compared with the reference, over repeated calls, and with the blocks in the opposite order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu import Part, Record, too_large
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
    "1e9 half zeros": TopK(10**9, 0.6, 291, zeros=0.5),  # the threshold lies within them
    "1e8 half zeros": TopK(10**8, 0.6, 50, zeros=0.5),
}


ONE_ULP = torch.finfo(torch.float32).eps
# What else the scores may be; each works in place, on a block of a TopK.
DISTRIBUTIONS: dict[str, Callable[[Tensor], object]] = {
    "all equal": lambda block: block.fill_(1.0),
    "within an ulp": lambda block: block.copy_(1 + ONE_ULP * (torch.rand_like(block) < 0.3)),
    "nine values": lambda block: block.copy_(torch.randint_like(block, 9)),
    "denormals": lambda block: block.clamp_(max=1).mul_(1e-39),
    "ascending": lambda block: block.copy_(block.sort().values),  # neighbours in a sample resemble each other
    "infinities": lambda block: block.masked_fill_(torch.rand_like(block) < 0.01, math.inf),
}
CHECKED_CALLS = 3
TESTED_IN = 45


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
    found = compare(rivals, ours="fishkern", device=device, flush=False)
    check(scores, k)
    for provider, figures in found.items():
        described = {**asdict(case), "distribution": distribution}
        yield {"provider": provider, "case": described, "dtype": "float32", "bytes": 4 * case.n, **figures}


def _half(case: TopK, device: torch.device) -> Iterator[Record]:
    """Every other block on the CPU, which the kernel does not take: by the reference, or moved to the GPU first."""
    scores = [block.cpu() if number % 2 else block for number, block in enumerate(case.scores(device))]

    def ours() -> list[Tensor]:
        return streaming_topk(scores, case.k)

    def moved() -> list[Tensor]:
        return streaming_topk([block.to(device) for block in scores], case.k, backend="triton")

    found = compare({"fishkern": ours, "moved": moved}, ours="fishkern", device=device, flush=False)
    demand_equal(ours(), moved())
    for provider, figures in found.items():
        yield {"provider": provider, "case": asdict(case), "dtype": "float32", "bytes": 4 * case.n, **figures}


def demand_equal(mixed: list[Tensor], on_one: list[Tensor]) -> None:
    """Demand that blocks on two devices are selected from as those on one are."""
    if not all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(mixed, on_one, strict=True)):
        raise ValueError("blocks on two devices are selected from otherwise than those on one")


def check(scores: list[Tensor], k: int) -> None:
    """Demand what a timing does not show: the number, the reference's bits, and no order of the blocks."""
    reference = streaming_topk(scores, k, backend="torch")
    for _ in range(CHECKED_CALLS):
        ours = streaming_topk(scores, k, backend="triton")
        if sum(map(len, ours)) != k:
            raise ValueError(f"{sum(map(len, ours))} selected instead of {k}")
        if list(map(len, ours)) != list(map(len, reference)) or not torch.equal(torch.cat(ours), torch.cat(reference)):
            raise ValueError("the kernels select other scores than the reference")
    backwards = streaming_topk(scores[::-1], k, backend="triton")[::-1]
    selected = [
        (torch.cat(found), torch.cat([block[places] for block, places in zip(scores, found, strict=True)]))
        for found in (ours, backwards)
    ]
    threshold = selected[0][1].min()
    # Of scores at the threshold others come first, the rest must be the same in the same places.
    (places, values), (others, their_values) = ([part[pair[1] > threshold] for part in pair] for pair in selected)
    if not (torch.equal(places, others) and torch.equal(values, their_values)):
        raise ValueError("another order of the blocks selects other scores")
