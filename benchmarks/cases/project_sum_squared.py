"""Sums of squares along directions of a layer, against covariances of both sides, and against torch without pieces.

On a CPU time and peak memory of a few batches. ``covariances`` adds up ``[I, I]`` and ``[O, O]`` and reads the first
two rows off them at the end, as published code does; the joint row it does not have. ``plain`` keeps the projections of
a batch. On a GPU the time of one call; ``products`` are the two matrix products alone, their results in the inputs'
dtype: the floor of the time where compute is the limit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median

import pytest
import torch
from torch import Tensor

from benchmarks.cases.sum_grad_squared import DTYPES
from benchmarks.engine.memory import peak_mib, rounded
from benchmarks.engine.process import in_process
from benchmarks.engine.turns import Run, in_turns, seconds_of, spread
from benchmarks.gpu import Part, Record
from benchmarks.gpu.timing import time_providers
from fishkern.ops import project_sum_squared

TESTS = {
    "run": ["tests/ops/test_project_sum_squared.py"],
    "gpu": ["tests/ops/test_project_sum_squared.py", "tests/kernels/test_project_sum_squared.py"],
}
TESTED_IN = 60
ROUNDS = 5
GOAL = 1.1  # times what plain torch takes
ALLOWED_MIB = 40  # above the inputs: 8 MiB of projections, of factors and of directions, and what products need


@dataclass(frozen=True)
class Case:
    """One layer and its batches.

    Args:
        O: Out-features.
        I: In-features.
        N: Examples of a batch.
        T: Positions of each.
        batches: How many of them.
        dtype: Of activations and output gradients.
        directions: Dtype of the directions; as many as the layer's smaller side has features.
        padding: Share of the positions that do not count.
        allow_tf32: As in the operation.
    """

    O: int
    I: int
    N: int
    T: int
    batches: int = 1
    dtype: str = "float32"
    directions: str = "float32"
    padding: float = 0.0
    allow_tf32: bool = False

    def __str__(self) -> str:
        return f"{self.O}x{self.I} {self.batches}x{self.N}x{self.T} {self.dtype} on {self.directions}"

    @property
    def K(self) -> int:
        """Directions."""
        return min(self.O, self.I)

    def flops(self) -> int:
        return 2 * self.batches * self.N * self.T * self.K * (self.O + self.I)

    def bytes(self) -> int:
        """Factors and directions read once, the result written."""
        factors = self.batches * self.N * self.T * DTYPES[self.dtype].itemsize
        return (factors + self.K * DTYPES[self.directions].itemsize) * (self.O + self.I) + 12 * self.K

    def inputs(self, device: torch.device) -> tuple[list[tuple[Tensor, Tensor, Tensor]], Tensor, Tensor]:
        """Activations, output gradients and what counts of each batch; the directions of both sides, of length 1."""
        torch.manual_seed(0)
        directions = [torch.randn(side, self.K, device=device) for side in (self.I, self.O)]
        V, U = ((matrix / matrix.norm(dim=0)).to(DTYPES[self.directions]) for matrix in directions)
        batches = []
        for _ in range(self.batches):
            x, g = (
                torch.randn(self.N, self.T, side, device=device).to(DTYPES[self.dtype]) for side in (self.I, self.O)
            )
            batches.append((x, g, torch.rand(self.N, self.T, device=device) >= self.padding))
        return batches, V, U


Batches = list[tuple[Tensor, Tensor, Tensor]]


def fishkern(batches: Batches, V: Tensor, U: Tensor) -> Tensor:
    return sum(project_sum_squared(x, g, V, U, counted=counted) for x, g, counted in batches)


def plain(batches: Batches, V: Tensor, U: Tensor) -> Tensor:
    """Four lines of torch, which keep the projections of a batch; in float32."""
    total = torch.zeros(3, V.shape[1], device=V.device)
    for x, g, counted in batches:
        h, d = product(x, V), product(g, U)
        total[0] += h[counted].square().sum(0)
        total[1] += d[counted].square().sum(0)
        total[2] += (h * d).sum(1).square().sum(0)
    return total


def product(factors: Tensor, directions: Tensor) -> Tensor:
    """A matrix product in float32, as fast as torch has it for these dtypes."""
    if factors.is_cuda and factors.dtype == directions.dtype != torch.float32:
        flat = torch.mm(factors.flatten(0, 1), directions, out_dtype=torch.float32)
        return flat.unflatten(0, factors.shape[:2])
    return factors.float() @ directions.float()


def covariances(batches: Batches, V: Tensor, U: Tensor) -> Tensor:
    """The first two rows as ``v^T S v``."""
    rows = []
    for side, directions in enumerate((V.float(), U.float())):
        covariance = torch.zeros(len(directions), len(directions), device=V.device)
        for *factors, counted in batches:
            positions = factors[side][counted].float()
            covariance.addmm_(positions.mT, positions)
        rows.append(((covariance @ directions) * directions).sum(0))
    return torch.stack(rows)


PROVIDERS: dict[str, Callable[[Batches, Tensor, Tensor], Tensor]] = {
    "fishkern": fishkern,
    "plain": plain,
    "covariances": covariances,
}

# On a CPU: layers of MiniLM and of LLaMAs of 104 million and 1 billion parameters.
ON_CPU = [
    Case(O=1536, I=384, N=16, T=128, batches=4, padding=0.3),
    Case(O=2048, I=768, N=8, T=128, batches=4),
    Case(O=2048, I=768, N=64, T=16, batches=4),
    Case(O=2048, I=768, N=8, T=128, batches=4, dtype="bfloat16", directions="bfloat16"),
    Case(O=2048, I=2048, N=2, T=512, batches=4),
]

# On a GPU.
HALF = dict(dtype="bfloat16", directions="bfloat16")
CASES = {
    "q 16x512": Case(O=4096, I=4096, N=16, T=512, **HALF),
    "gate 8x512": Case(O=11008, I=4096, N=8, T=512, **HALF),
    "k 8x512": Case(O=1024, I=4096, N=8, T=512, **HALF),
    "q 1x2048": Case(O=4096, I=4096, N=1, T=2048, **HALF),
    "q 512x16": Case(O=4096, I=4096, N=512, T=16, **HALF),
    "q 16x300": Case(O=4096, I=4096, N=16, T=300, **HALF),
    "vit 64x197": Case(O=3072, I=768, N=64, T=197, **HALF),
    "head 256x1": Case(O=2, I=768, N=256, T=1, **HALF),
    "q 16x512 float32 directions": Case(O=4096, I=4096, N=16, T=512, dtype="bfloat16"),
    "q 8x512 float32": Case(O=4096, I=4096, N=8, T=512),
    "q 8x512 tf32": Case(O=4096, I=4096, N=8, T=512, allow_tf32=True),
}


def description(case: Case, provider: str, quantity: str) -> Record:
    """The fields of a record other than its figures."""
    shared = {"op": "project_sum_squared", "quantity": quantity, "case": asdict(case), "dtype": case.dtype}
    return {**shared, "provider": provider, "rows": 2 if provider == "covariances" else 3}


def compared() -> dict[str, dict[str, Callable[[], Run]]]:
    """For ``python -m benchmarks compare``."""

    def make(name: str, case: Case) -> Run:
        return partial(PROVIDERS[name], *case.inputs(torch.device("cpu")))

    return {str(case): {name: partial(make, name, case) for name in PROVIDERS} for case in ON_CPU}


@pytest.mark.parametrize("case", ON_CPU, ids=str)
def test_time(case, benchmark, record):
    inputs = case.inputs(torch.device("cpu"))
    timed = {name: partial(seconds_of, partial(run, *inputs)) for name, run in PROVIDERS.items()}
    for run in timed.values():
        run()
    seconds = in_turns(benchmark, timed, ROUNDS)
    for name, values in seconds.items():
        figures = {"seconds": spread(values), "rounds": ROUNDS}
        record("project_sum_squared", {**description(case, name, "time"), **figures})
    assert median(seconds["fishkern"]) <= GOAL * median(seconds["plain"])


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", ON_CPU, ids=str)
def test_peak_memory(case, provider, record):
    figures = in_process("benchmarks.cases.project_sum_squared:memory", provider, case)
    record("project_sum_squared", {**description(case, provider, "memory"), **figures})
    if provider == "fishkern":
        assert figures["peak_mib"] <= ALLOWED_MIB


def memory(provider: str, case: Case) -> Record:
    """The peak of all batches above the inputs."""
    small = Case(O=9, I=8, N=2, T=3, dtype=case.dtype, directions=case.directions).inputs(torch.device("cpu"))
    PROVIDERS[provider](*small)  # libraries are loaded and allocate on first use
    inputs = case.inputs(torch.device("cpu"))
    return rounded({"peak_mib": peak_mib(partial(PROVIDERS[provider], *inputs))})


def parts(device: torch.device) -> list[Part]:
    return [Part(name, partial(_measure, case, device), seconds=12) for name, case in CASES.items()]


def _measure(case: Case, device: torch.device) -> Iterator[Record]:
    batches, V, U = case.inputs(device)
    ((x, g, counted),) = batches
    run = partial(project_sum_squared, x, g, V, U, counted=counted, allow_tf32=case.allow_tf32)
    providers: dict[str, Callable[[], object]] = {
        "fishkern": partial(run, backend="triton"),
        "torch": partial(run, backend="torch"),
        "plain": partial(plain, batches, V, U),
        "covariances": partial(covariances, batches, V, U),
        "products": lambda: (x @ V.to(x.dtype), g @ U.to(g.dtype)),
    }
    truth = project_sum_squared(*(tensor.double() for tensor in (x, g, V, U)), counted=counted, backend="torch")
    for provider, figures in time_providers(providers, ours="fishkern", device=device).items():
        record = {**description(case, provider, "time"), "flops": case.flops(), **figures}
        if provider != "products":
            record["bytes"] = case.bytes()
        if provider == "fishkern":
            difference = providers[provider]().double() - truth
            error = (difference.norm(dim=1) / truth.norm(dim=1)).max().item()
            if not math.isfinite(error):
                raise FloatingPointError(f"the result of {case} is not finite")
            record["error"] = f"{error:.1e}"
        yield record
