"""Histograms of logarithms of magnitudes, against one read of the values and against torch's own histogram.

``histc`` takes logarithms in float32 and counts bins of one width, so that it rounds where ours is exact: what one
would write without the operation. ``one_read`` sums the values, which any method must do at least once. The counts are
compared with the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.cases.sum_grad_squared import DTYPES
from benchmarks.gpu import Part, Record, too_large
from benchmarks.gpu.timing import time_providers
from fishkern.ops import log_histogram

TESTS = {"gpu": ["tests/ops/test_log_histogram.py"]}
TESTED_IN = 30


@dataclass(frozen=True)
class Histogram:
    """One tensor and its bins.

    Args:
        n: Values.
        dtype: Of the values.
        bins: Of the histogram.
        spread: Standard deviation of the decimal logarithms; the edges are those of 1 % and 99 %.
    """

    n: int
    dtype: str = "float32"
    bins: int = 64
    spread: float = 1.0

    def bytes(self) -> int:
        """The values read once."""
        return self.n * DTYPES[self.dtype].itemsize

    def inputs(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Values whose logarithms are normal, and the edges."""
        generator = torch.Generator(device).manual_seed(0)
        logs = torch.randn(self.n, generator=generator, device=device).mul_(self.spread).sub_(4)
        ends = 2.326 * self.spread
        return logs.mul_(2.302585).exp_().to(DTYPES[self.dtype]), torch.linspace(-4 - ends, -4 + ends, self.bins + 1)


CASES = {
    "1e9": Histogram(10**9),
    "1e9 bf16": Histogram(10**9, "bfloat16"),
    "1e9 in a few bins": Histogram(10**9, spread=0.01),
    "4096 x 11008 / 4": Histogram(4096 * 11008 // 4),
    "1e6": Histogram(10**6),
    "1e6 in 16 bins": Histogram(10**6, bins=16),
}


def parts(device: torch.device) -> list[Part]:
    return [Part(name, partial(_measure, case, device), seconds=12) for name, case in CASES.items()]


def _measure(case: Histogram, device: torch.device) -> Iterator[Record]:
    if (most := 3 * 4 * case.n) > torch.cuda.get_device_properties(device).total_memory:
        yield too_large(case, most)
        return
    values, edges = case.inputs(device)
    low, high = edges[0].item(), edges[-1].item()
    providers: dict[str, Callable[[], Tensor]] = {
        "fishkern": partial(log_histogram, values, edges, backend="triton"),
        "torch": partial(log_histogram, values, edges, backend="torch"),
        "one_read": values.sum,
        "histc": lambda: torch.histc((values.float().abs() + 1e-12).log10(), case.bins, low, high),
    }
    figures = time_providers(providers, ours="fishkern", device=device)
    check(providers["fishkern"](), providers["torch"]())
    for provider, measured in figures.items():
        yield {"provider": provider, "case": asdict(case), "dtype": case.dtype, "bytes": case.bytes(), **measured}


def check(ours: Tensor, reference: Tensor) -> None:
    """Raise unless the counts are the reference's."""
    if not torch.equal(ours, reference):
        raise ValueError("the kernel counts otherwise than the reference")
