"""This machine's own roofs: device copies, and matrix products of the vendor's library on random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.cases.sum_grad_squared import DTYPES
from benchmarks.gpu import Part, Record
from benchmarks.gpu.timing import time_providers

TESTS: dict[str, list[str]] = {"gpu": []}
COPIED = 4 * 2**30  # bytes
SIDE = 8192


def parts(device: torch.device) -> list[Part]:
    gemms = [Part(f"gemm {name}", partial(_gemm, device, name), seconds=4) for name in DTYPES]
    return [Part("copy", partial(_copy, device), seconds=4), *gemms]


def _copy(device: torch.device) -> Iterator[Record]:
    source = torch.randint(0, 127, (COPIED,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    figures = time_providers({"torch": lambda: target.copy_(source)}, ours="torch", device=device, flush=False)
    yield {"provider": "torch", "bytes": 2 * COPIED, **figures["torch"]}


def _gemm(device: torch.device, name: str) -> Iterator[Record]:
    """For float32 without tf32."""
    a, b = (torch.randn(SIDE, SIDE, device=device).to(DTYPES[name]) for _ in range(2))
    figures = time_providers({"torch": lambda: a @ b}, ours="torch", device=device, flush=False)
    yield {"provider": "torch", "dtype": name, "flops": 2 * SIDE**3, **figures["torch"]}
