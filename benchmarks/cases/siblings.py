"""The other squares of a pass: embeddings, which have no kernel, biases, scales and norms.

A kernel is worth its code where PyTorch's own path takes far longer than reading the inputs once. Every record has the
bytes of its inputs and of the entries of the result that it adds to; ``of roof`` is the time of moving these at the
measured rate of a copy, over the time taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial

import torch

from benchmarks.gpu import Part, Record
from benchmarks.gpu.timing import time_providers
from fishkern.backend import why_not_triton
from fishkern.layers.grads import EmbeddingGrads, Factors, PositionGrads

TESTS = {
    "gpu": [
        "tests/ops/test_embedding_sum_grad_squared.py",
        "tests/ops/test_scale_sum_grad_squared.py",
        "tests/laws/test_layers.py",
    ]
}
TESTED_IN = 30


@dataclass(frozen=True)
class Case:
    """A parameter of LLaMA 7B or its like, and a batch.

    Args:
        kind: ``"embedding"``, ``"bias"``, ``"scale"``, whose gradient is that of a bias times the inputs, or
            ``"norm"``, which normalises these first.
        N: Examples.
        T: Positions of each.
        D: Features.
        vocabulary: Rows of an embedding.
    """

    kind: str
    N: int = 8
    T: int = 512
    D: int = 4096
    vocabulary: int = 32_000

    def work(self, device: torch.device) -> tuple[Callable[[str], object], int]:
        """A call as the pass makes it, by the name of a backend, and the bytes that it must move."""
        torch.manual_seed(0)
        grads = torch.randn(self.N, self.T, self.D, device=device).bfloat16()
        if self.kind == "embedding":
            indices = torch.randint(self.vocabulary, (self.N, self.T), device=device)
            total = torch.zeros(self.vocabulary, self.D, device=device)
            form = EmbeddingGrads(indices, grads, self.vocabulary)
            rows = len(indices.unique())
            return partial(form.add_squares_, total), grads.nbytes + indices.nbytes + 8 * rows * self.D
        total = torch.zeros(self.D, device=device)
        if self.kind == "bias":
            return partial(PositionGrads(grads).add_squares_, total), grads.nbytes + 8 * self.D
        norm = {"norm": "rms", "eps": 1e-6, "rounded_to": grads.dtype} if self.kind == "norm" else {}
        factors = Factors(torch.randn_like(grads), **norm)
        return partial(PositionGrads(grads, factors=factors).add_squares_, total), 2 * grads.nbytes + 8 * self.D


CASES = {
    "embedding 8x512": Case("embedding"),
    "embedding 64x16": Case("embedding", N=64, T=16),
    "embedding 8x512 of 128256": Case("embedding", vocabulary=128_256),
    "bias 8x512": Case("bias"),
    "bias 64x16": Case("bias", N=64, T=16),
    "scale 8x512": Case("scale"),
    "scale 64x16": Case("scale", N=64, T=16),
    "norm 8x512": Case("norm"),
    "norm 64x16": Case("norm", N=64, T=16),
}


def parts(device: torch.device) -> list[Part]:
    return [Part(name, partial(_measure, case, device), seconds=4) for name, case in CASES.items()]


def _measure(case: Case, device: torch.device) -> Iterator[Record]:
    work, moved = case.work(device)
    has_kernel = case.kind != "embedding" and why_not_triton(torch.empty(0, device=device)) is None
    backends = ("triton", "torch") if has_kernel else ("torch",)
    figures = time_providers({name: partial(work, name) for name in backends}, ours=backends[0], device=device)
    for name in backends:
        yield {"provider": name, "case": asdict(case), "dtype": "bfloat16", "bytes": moved, **figures[name]}
