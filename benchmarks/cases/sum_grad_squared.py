"""The sum of squared per-example gradients of a layer, on layers of named open models.

Every record has the operation's flops and the bytes that it must move, and the relative error of some rows of the
result against float64. ``cublas_dw`` is the ordinary weight gradient of the same tensors: one matrix product without
squares, the floor of the time where compute is the limit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu import Part, Record
from benchmarks.gpu.timing import time_providers
from benchmarks.rivals.layers import bmm_squares, einsum_squares, vmap_squares
from fishkern.ops import sum_grad_squared

TESTS = {"gpu": ["tests/ops/test_sum_grad_squared.py", "tests/kernels/test_sum_grad_squared.py"]}
TESTED_IN = 110
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Float32 gradients of about so many bytes stay in the L2 cache between the product and the square.
L2_BYTES = 30 * 2**20
CHECKED_ROWS = 16


@dataclass(frozen=True)
class Case:
    """One layer and batch.

    Args:
        O: Out-features.
        I: In-features.
        N: Examples.
        T: Positions of each.
        dtype: Of the inputs.
        lengths: ``"equal"``, or packed with log-normal lengths of this mean and up to 8192 (``T`` is their mean).
        grads: The output gradients: ``"normal"``; ``"mostly zero"`` (nine rows of ten); ``"transposed"``
            (positions last in memory); ``"scaled"`` (by a loss scale of 2^16); ``"spread"`` (from 1e-12 to 1e3).
        mean: Whether the mean gradient is computed in the same pass.
        allow_tf32: As in the operation.
    """

    O: int
    I: int
    N: int
    T: int
    dtype: str = "bfloat16"
    lengths: str = "equal"
    grads: str = "normal"
    mean: bool = False
    allow_tf32: bool = False

    def flops(self) -> int:
        return 2 * self.N * self.T * self.O * self.I

    def bytes(self) -> int:
        """Both inputs read once, the result read and written."""
        return self.N * self.T * (self.O + self.I) * DTYPES[self.dtype].itemsize + 8 * self.O * self.I * (1 + self.mean)

    def inputs(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        torch.manual_seed(0)
        dtype, shape = DTYPES[self.dtype], (self.N, self.T)
        x = torch.randn(*shape, self.I, device=device).to(dtype)
        g = torch.randn(*shape, self.O, device=device)
        if self.grads == "mostly zero":
            g[torch.rand(shape, device=device) < 0.9] = 0
        elif self.grads == "scaled":
            g *= 1e-4 * 2**16 / 100
        elif self.grads == "spread":
            g *= torch.logspace(-12, 3, self.N, device=device)[:, None, None]
        g = g.to(dtype)
        if self.grads == "transposed":
            g = g.mT.contiguous().mT
        if self.lengths == "equal":
            return x, g, None
        return x.flatten(0, 1), g.flatten(0, 1), lognormal_offsets(self.N, self.N * self.T)


def lognormal_offsets(N: int, positions: int) -> Tensor:
    """Offsets of packed examples of 1 to 8192 positions, most of them short; on the CPU."""
    drawn = torch.randn(N, generator=torch.Generator().manual_seed(1)).exp().double()
    lengths = (drawn / drawn.sum() * positions).floor().clamp(1, 8192).long()
    lengths[lengths.argmin()] += positions - lengths.sum()
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


GATE = dict(O=11008, I=4096)  # LLaMA 7B
CASES = {
    "a gate 8x512": Case(**GATE, N=8, T=512),
    "b gate 32x128": Case(**GATE, N=32, T=128),
    "b gate 256x16": Case(**GATE, N=256, T=16),
    "b gate 4096x1": Case(**GATE, N=4096, T=1),
    "b gate 64x1": Case(**GATE, N=64, T=1),
    "b gate 64x4": Case(**GATE, N=64, T=4),
    "b gate 1x4096": Case(**GATE, N=1, T=4096),
    "b gate 2x8192": Case(**GATE, N=2, T=8192),
    "c gate packed": Case(**GATE, N=55, T=298, lengths="packed"),
    "d k 1024x4096": Case(O=1024, I=4096, N=8, T=512),
    "d k 1024x1024": Case(O=1024, I=1024, N=8, T=512),
    "e head mostly zero": Case(O=128256, I=4096, N=8, T=512, grads="mostly zero"),
    "g lora_A r=16": Case(O=16, I=4096, N=8, T=512),
    "g lora_B r=16": Case(O=11008, I=16, N=8, T=512),
    "g lora_A r=64": Case(O=64, I=4096, N=8, T=512),
    "g lora_B r=8": Case(O=11008, I=8, N=8, T=512),
    "i odd I": Case(O=11008, I=11007, N=8, T=128),
    "i odd O": Case(O=4097, I=4096, N=8, T=512),
    "j transposed": Case(O=4096, I=4096, N=8, T=512, grads="transposed"),
    "k scaled fp16": Case(O=4096, I=4096, N=8, T=512, dtype="float16", grads="scaled"),
    "l spread": Case(O=4096, I=4096, N=8, T=512, grads="spread"),
    "m past 2^31": Case(O=2**16, I=2**15 + 64, N=2, T=64),
    "fp32": Case(O=4096, I=4096, N=8, T=512, dtype="float32"),
    "tf32": Case(O=4096, I=4096, N=8, T=512, dtype="float32", allow_tf32=True),
    "with mean gradient": Case(**GATE, N=8, T=512, mean=True),
}
# Slow parts: rivals that store [N, O, I], or results of many GiB.
SECONDS = {"b gate 256x16": 25, "b gate 64x1": 20, "b gate 64x4": 20, "b gate 32x128": 20, "m past 2^31": 20}
LORA_LAYERS = 32
BACKENDS = {"fishkern": "triton", "torch": "torch"}


def parts(device: torch.device) -> list[Part]:
    every: dict[str, Callable[[], Iterator[Record]]] = {
        name: partial(_measure, case, device) for name, case in CASES.items()
    }
    for rank in (8, 16, 64):
        every[f"g 448 lora tensors r={rank}"] = partial(_all_lora, device, rank)
    return [Part(name, run, SECONDS.get(name, 12)) for name, run in every.items()]


def _measure(case: Case, device: torch.device) -> Iterator[Record]:
    x, g, offsets = case.inputs(device)
    out = torch.zeros(case.O, case.I, device=device)
    options = {"offsets": offsets, "out": out, "allow_tf32": case.allow_tf32}
    if case.mean:
        options["grad_out"] = torch.zeros_like(out)
    figures = time_providers(
        {
            "fishkern": partial(sum_grad_squared, x, g, backend="triton", **options),
            "torch": partial(sum_grad_squared, x, g, backend="torch", **options),
            **_rivals(case, x, g, offsets, out),
        },
        ours="fishkern",
        device=device,
    )
    error = relative_error(case, x, g, offsets)
    for provider, measured in figures.items():
        record = {"provider": provider, "case": asdict(case), "dtype": case.dtype, "flops": case.flops(), **measured}
        if provider != "cublas_dw":
            record["bytes"] = case.bytes()
        if provider == "fishkern":
            record["error"] = f"{error:.1e}"
        yield record


def _rivals(case: Case, x: Tensor, g: Tensor, offsets: Tensor | None, out: Tensor) -> dict[str, Callable[[], object]]:
    flat_x, flat_g = x.reshape(-1, case.I), g.reshape(-1, case.O)
    rivals: dict[str, Callable[[], object]] = {"cublas_dw": lambda: flat_g.mT @ flat_x}
    if offsets is None:
        stored = 4 * case.N * case.O * case.I
        rivals["bmm_in_l2"] = partial(bmm_squares, x, g, out, max(1, L2_BYTES // (4 * case.N * case.I)))
        if stored < torch.cuda.get_device_properties(x.device).total_memory // 6:  # each stores it, some twice
            rivals["bmm"] = partial(bmm_squares, x, g, out, case.O)
            rivals["opacus_einsum"] = partial(einsum_squares, x, g, out)
            rivals["vmap_grad"] = partial(vmap_squares, x, g, out)
    return rivals


def relative_error(case: Case, x: Tensor, g: Tensor, offsets: Tensor | None) -> float:
    """:func:`error_of` what the kernel gives."""
    result = sum_grad_squared(x, g, offsets=offsets, allow_tf32=case.allow_tf32, backend="triton")
    return error_of(result, case, x, g, offsets)


def error_of(result: Tensor, case: Case, x: Tensor, g: Tensor, offsets: Tensor | None = None) -> float:
    """``|result - truth| / |truth|`` in some rows, first and last ones among them."""
    spread = torch.arange(CHECKED_ROWS, device=x.device) * (case.O - 1) // (CHECKED_ROWS - 1)
    rows = spread.unique()
    lengths = [case.T] * case.N if offsets is None else offsets.diff().tolist()
    xs, gs = (tensor.reshape(-1, tensor.shape[-1]).split(lengths) for tensor in (x, g[..., rows]))
    truth = sum((b.double().mT @ a.double()).square() for a, b in zip(xs, gs, strict=True))
    error = (result[rows].double() - truth).norm() / truth.norm()
    if not math.isfinite(error):
        raise FloatingPointError(f"the result of {case} is not finite")
    return error.item()


def _all_lora(device: torch.device, rank: int) -> Iterator[Record]:
    """Both factors on the seven linears of each of 32 layers of LLaMA 7B: 448 launches, one after the other."""
    N, T = 8, 512
    wide = {width: torch.randn(N, T, width, device=device).bfloat16() for width in (4096, 11008)}
    narrow = torch.randn(N, T, rank, device=device).bfloat16()
    linears = [(4096, 4096)] * 4 + [(4096, 11008)] * 2 + [(11008, 4096)]  # in, out
    calls = [call for i, o in linears for call in ((wide[i], narrow), (narrow, wide[o]))] * LORA_LAYERS
    outs = [torch.zeros(g.shape[-1], x.shape[-1], device=device) for x, g in calls]

    def run(backend: str) -> None:
        for (x, g), out in zip(calls, outs, strict=True):
            sum_grad_squared(x, g, out=out, backend=backend)

    moved = sum(x.nbytes + g.nbytes for x, g in calls) + sum(2 * out.nbytes for out in outs)
    figures = time_providers(
        {name: partial(run, kind) for name, kind in BACKENDS.items()}, ours="fishkern", device=device
    )
    for provider, measured in figures.items():
        case = {"tensors": len(calls), "rank": rank, "N": N, "T": T}
        yield {"provider": provider, "case": case, "dtype": "bfloat16", "bytes": moved, **measured}
