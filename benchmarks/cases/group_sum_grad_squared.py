"""Squares summed over rows, columns or the tensor, against their unreduced form and the same in PyTorch.

The flops are those of the per-example gradients; Gram matrices of short examples need fewer, so that a share of the
roof above 1 is possible for ``torch``. ``cublas_dw`` is the ordinary weight gradient of the same tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.cases.sum_grad_squared import DTYPES, GATE, Case
from benchmarks.gpu import Part, Record
from benchmarks.gpu.timing import time_providers
from fishkern.ops import group_sum_grad_squared, sum_grad_squared

TESTS = {"gpu": ["tests/ops/test_group_sum_grad_squared.py", "tests/kernels/test_group_sum_grad_squared.py"]}


@dataclass(frozen=True)
class GroupCase(Case):
    """One layer and batch, and the groups.

    Args:
        by: As in the operation.
    """

    by: str = "row"

    def bytes(self) -> int:
        """Both inputs read once, the result read and written."""
        groups = {"row": self.O, "column": self.I, "tensor": 1}[self.by]
        return self.N * self.T * (self.O + self.I) * DTYPES[self.dtype].itemsize + 8 * groups


CASES = {
    "gate 8x512 by row": GroupCase(**GATE, N=8, T=512),
    "gate 8x512 by column": GroupCase(**GATE, N=8, T=512, by="column"),
    "gate 8x512 by tensor": GroupCase(**GATE, N=8, T=512, by="tensor"),
    "gate 256x16 by row": GroupCase(**GATE, N=256, T=16),
    "gate 256x1 by row": GroupCase(**GATE, N=256, T=1),
    "gate 1x4096 by row": GroupCase(**GATE, N=1, T=4096),
    "gate packed by row": GroupCase(**GATE, N=55, T=298, lengths="packed"),
    "k 1024x1024 by row": GroupCase(O=1024, I=1024, N=8, T=512),
    "lora_A r=16 by row": GroupCase(O=16, I=4096, N=8, T=512),
    "fp32 by row": GroupCase(O=4096, I=4096, N=8, T=512, dtype="float32"),
}
TESTED_IN = 60


def parts(device: torch.device) -> list[Part]:
    return [Part(name, partial(_measure, case, device), seconds=12) for name, case in CASES.items()]


def _measure(case: GroupCase, device: torch.device) -> Iterator[Record]:
    x, g, offsets = case.inputs(device)
    run = partial(group_sum_grad_squared, x, g, by=case.by, offsets=offsets)
    axes = {"row": 1, "column": 0, "tensor": (0, 1)}[case.by]
    flat_x, flat_g = x.reshape(-1, case.I), g.reshape(-1, case.O)
    providers: dict[str, Callable[[], Tensor]] = {
        "fishkern": partial(run, backend="triton"),
        "torch": partial(run, backend="torch"),
        "unreduced": lambda: sum_grad_squared(x, g, offsets=offsets, backend="triton").sum(axes),
        "cublas_dw": lambda: flat_g.mT @ flat_x,
    }
    truth = group_sum_grad_squared(x.double(), g.double(), by=case.by, offsets=offsets, backend="torch")
    for provider, figures in time_providers(providers, ours="fishkern", device=device).items():
        record = {"provider": provider, "case": asdict(case), "dtype": case.dtype, "flops": case.flops(), **figures}
        if provider != "cublas_dw":
            record["bytes"] = case.bytes()
        if provider == "fishkern":
            error = ((providers[provider]().double() - truth).norm() / truth.norm()).item()
            if not math.isfinite(error):
                raise FloatingPointError(f"the result of {case} is not finite")
            record["error"] = f"{error:.1e}"
        yield record
