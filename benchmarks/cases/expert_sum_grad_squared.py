"""The sums of squared gradients of all experts of a layer in one launch, against a launch for each expert.

``each_expert`` is :func:`fishkern.ops.sum_grad_squared`, once for each expert that got rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from benchmarks.gpu import Part, Record
from benchmarks.gpu.timing import time_providers
from fishkern.ops import expert_sum_grad_squared, sum_grad_squared

TESTS = {"gpu": ["tests/ops/test_expert_sum_grad_squared.py", "tests/kernels/test_expert_sum_grad_squared.py"]}
TESTED_IN = 60


@dataclass(frozen=True)
class ExpertCase:
    """The experts of a layer, and a batch whose tokens are routed unevenly.

    Args:
        E: Experts; to every ninth no token is sent.
        O: Out-features of an expert.
        I: In-features.
        N: Examples.
        rows: About so many rows come to an expert from an example at most; many fewer on the average.
    """

    E: int
    O: int
    I: int
    N: int
    rows: int

    def inputs(self, device: torch.device) -> dict[str, Tensor]:
        """Draw the arguments of the operation, groups without rows among them."""
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(2)
        counts = torch.poisson(torch.rand(self.E, self.N, generator=generator) ** 4 * self.rows, generator=generator)
        counts[::9] = 0
        lengths = counts.long().flatten()
        x, g = (torch.randn(int(lengths.sum()), width, device=device).bfloat16() for width in (self.I, self.O))
        groups = {"expert": torch.arange(self.E).repeat_interleave(self.N), "offsets": _firsts(lengths)}
        return {"activations": x, "output_grads": g, **groups}


CASES = {
    "64 experts, gate": ExpertCase(E=64, O=1408, I=2048, N=16, rows=30),
    "64 experts, down": ExpertCase(E=64, O=2048, I=1408, N=16, rows=30),
    "256 experts of DeepSeek-V3, few rows": ExpertCase(E=256, O=2048, I=7168, N=8, rows=4),
    "8 experts of Mixtral": ExpertCase(E=8, O=14336, I=4096, N=8, rows=512),
}


def parts(device: torch.device) -> list[Part]:
    return [Part(name, partial(_measure, case, device), seconds=15) for name, case in CASES.items()]


def _measure(case: ExpertCase, device: torch.device) -> Iterator[Record]:
    inputs = case.inputs(device)
    x, g, _, offsets = inputs.values()
    total = torch.zeros(case.E, case.O, case.I, device=device)
    together = partial(expert_sum_grad_squared, num_experts=case.E, out=total, **inputs)
    firsts = offsets[:: case.N].tolist()
    of_each = [(e, first, last) for e, (first, last) in enumerate(pairwise(firsts)) if last > first]

    def each() -> None:
        for e, first, last in of_each:
            groups = offsets[e * case.N : (e + 1) * case.N + 1] - first
            sum_grad_squared(x[first:last], g[first:last], offsets=groups, out=total[e], backend="triton")

    providers: dict[str, Callable[[], object]] = {
        "fishkern": partial(together, backend="triton"),
        "torch": partial(together, backend="torch"),
        "each_expert": each,
    }
    figures = time_providers(providers, ours="fishkern", device=device)
    amount = {"flops": 2 * len(x) * case.O * case.I, "bytes": x.nbytes + g.nbytes + 8 * total[0].numel() * len(of_each)}
    error = _error(total.zero_(), together, x, g, offsets, case)
    for provider, measured in figures.items():
        record = {"provider": provider, "case": {**asdict(case), "tokens": len(x)}, "dtype": "bfloat16", **amount}
        yield record | measured | ({"error": f"{error:.1e}"} if provider == "fishkern" else {})


def _error(
    total: Tensor, together: Callable[..., Tensor], x: Tensor, g: Tensor, offsets: Tensor, case: ExpertCase
) -> float:
    """``|result - truth| / |truth|`` of the expert with the most rows."""
    together(backend="triton")
    e = int(offsets[:: case.N].diff().argmax())
    truth = torch.zeros(case.O, case.I, dtype=torch.float64, device=x.device)
    for first, last in offsets[e * case.N : (e + 1) * case.N + 1].unfold(0, 2, 1).tolist():
        truth += (g[first:last].double().mT @ x[first:last].double()).square()
    error = (total[e].double() - truth).norm() / truth.norm()
    if not math.isfinite(error):
        raise FloatingPointError(f"the result of {case} is not finite")
    return error.item()


def _firsts(lengths: Tensor) -> Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
