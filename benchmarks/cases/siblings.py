"""The other squares of a pass, which have no kernel: embeddings, biases, scales of norms.

A kernel would be worth its code where PyTorch's own path takes far longer than reading the inputs once. Every record
has the bytes of its inputs and of the entries of the result that it adds to; ``of roof`` is the time of moving these at
the measured rate of a copy, over the time taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial

import torch

from benchmarks.gpu import Part, Record
from benchmarks.gpu.timing import time_providers
from fishkern.layers.grads import EmbeddingGrads, PositionGrads

TESTS = {"gpu": ["tests/ops/test_embedding_sum_grad_squared.py", "tests/laws/test_layers.py"]}
TESTED_IN = 30


@dataclass(frozen=True)
class Case:
    """A parameter of LLaMA 7B or its like, and a batch.

    Args:
        kind: ``"embedding"``, ``"bias"``, or ``"scale"``, whose gradient is that of a bias times the normalised inputs.
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

    def work(self, device: torch.device) -> tuple[Callable[[], object], int]:
        """A call as the pass makes it, and the bytes that it must move."""
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
        inputs = torch.randn_like(grads)

        def scale() -> None:
            PositionGrads(grads.float() * inputs).add_squares_(total)

        return scale, inputs.nbytes + grads.nbytes + 8 * self.D


CASES = {
    "embedding 8x512": Case("embedding"),
    "embedding 64x16": Case("embedding", N=64, T=16),
    "embedding 8x512 of 128256": Case("embedding", vocabulary=128_256),
    "bias 8x512": Case("bias"),
    "bias 64x16": Case("bias", N=64, T=16),
    "scale 8x512": Case("scale"),
    "scale 64x16": Case("scale", N=64, T=16),
}


def parts(device: torch.device) -> list[Part]:
    return [Part(name, partial(_measure, case, device), seconds=4) for name, case in CASES.items()]


def _measure(case: Case, device: torch.device) -> Iterator[Record]:
    work, moved = case.work(device)
    figures = time_providers({"torch": work}, ours="torch", device=device)
    yield {"provider": "torch", "case": asdict(case), "dtype": "bfloat16", "bytes": moved, **figures["torch"]}
