"""Whether anything runs on this device and is right, in seconds: without it the tests and the times mean nothing.

Every record has the largest relative error against float64, or that between two ways to the same result. A second call
must give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial

import torch
from torch import nn

import fishkern as fk
from benchmarks.cases import streaming_topk as topk
from benchmarks.cases import sum_grad_squared as squares
from benchmarks.cases.whole_pass import disagreement
from benchmarks.gpu import Part, Record
from benchmarks.subjects.scores import TopK
from benchmarks.subjects.transformers import Shape, Workload

TESTS: dict[str, list[str]] = {"gpu": []}
LARGE, SMALL = squares.CASES["a gate 8x512"], squares.Case(O=512, I=256, N=64, T=16)
# The paths of a call: wide tiles, narrow ones, one example alone, examples in parts, packed, few positions, odd widths,
# other dtypes.
LAYERS = {
    "gate 8x512": LARGE,
    "2048x2048 8x128": squares.Case(O=2048, I=2048, N=8, T=128),
    "512x256 64x16": SMALL,
    "lora 16x4096": squares.Case(O=16, I=4096, N=8, T=512),
    "one example": squares.Case(O=512, I=256, N=1, T=300),
    "packed": replace(SMALL, lengths="packed"),
    "few positions": replace(SMALL, T=3),
    "odd widths": replace(SMALL, O=511, I=255),
    "with mean gradient": replace(SMALL, mean=True),
    "float16": replace(SMALL, dtype="float16"),
    "float32": replace(SMALL, dtype="float32"),
    "tf32": replace(SMALL, dtype="float32", allow_tf32=True),
}
SCORES = {"of layers": TopK(10**7, 0.005, 50), "half zeros": TopK(10**6, 0.6, 20, zeros=0.5)}
# Far above any rounding of the products of the inputs; tf32 rounds these to 10 bits.
WRONG, WRONG_TF32 = 1e-4, 1e-2
MODEL = Workload(Shape(2, 256, 512, 1000, 8, 4), T=24, N=4, batches=2, dtype="bfloat16", device="cuda")


def parts(device: torch.device) -> list[Part]:
    layers = [
        Part(f"sum_grad_squared {name}", partial(_layer, case, device), seconds=3) for name, case in LAYERS.items()
    ]
    return [
        *layers,
        Part("streaming_topk", partial(_topk, device), seconds=5),
        Part("masked steps", partial(_steps, device), seconds=5),
        Part("whole pass", partial(_pass, device), seconds=12),
    ]


def _layer(case: squares.Case, device: torch.device) -> Iterator[Record]:
    x, g, offsets = case.inputs(device)
    error = squares.relative_error(case, x, g, offsets)
    options = {"offsets": offsets, "allow_tf32": case.allow_tf32, "backend": "triton"}
    first, second = (fk.ops.sum_grad_squared(x, g, **options) for _ in range(2))
    if error > (WRONG_TF32 if case.allow_tf32 else WRONG):
        raise ArithmeticError(f"the relative error is {error:.1e}")
    demand_equal(first, second)
    yield {"provider": "fishkern", "case": asdict(case), "dtype": case.dtype, "error": f"{error:.1e}"}


def _topk(device: torch.device) -> Iterator[Record]:
    for case in SCORES.values():
        topk.check(case.scores(device), case.k)
        yield {"provider": "fishkern", "case": asdict(case), "error": "none"}


def _steps(device: torch.device) -> Iterator[Record]:
    """Three steps of each optimizer with the kernels and with the reference."""
    for dtype in (torch.float32, torch.bfloat16):
        for kind in (fk.MaskedAdamW, fk.MaskedSGD):
            ours, again, theirs = (_trained(kind, dtype, device, backend) for backend in ("triton", "triton", "torch"))
            demand_equal(ours, again)
            error = difference(ours, theirs)
            if error > 1e-2:
                raise ArithmeticError(f"{kind.__name__} is {error:.1e} from the reference")
            case = {"optimizer": kind.__name__, "dtype": str(dtype)}
            yield {"provider": "fishkern", "case": case, "error": f"{error:.1e}"}


def _trained(kind: type, dtype: torch.dtype, device: torch.device, backend: str) -> torch.Tensor:
    torch.manual_seed(0)
    model = nn.ParameterList([torch.randn(size, 300, device=device).to(dtype) for size in (70, 5)])
    scores = {name: parameter.detach() for name, parameter in model.named_parameters()}
    optimizer = kind(model, fk.select(scores, fk.Random(density=0.3)), lr=0.1, max_grad_norm=1.0)
    with fk.use_backend(backend):
        for _ in range(3):
            for parameter in model:
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
    return torch.cat([parameter.detach().flatten().double() for parameter in model])


def _pass(device: torch.device) -> Iterator[Record]:
    model = replace(MODEL, device=str(device))
    for case in (model, replace(model, shape=replace(model.shape, tied=True)), replace(model, lora=4)):
        error = disagreement(case.model(), case.data())
        if error > 1e-2:
            raise ArithmeticError(f"the kernels are {error:.1e} from the references")
        yield {"provider": "fishkern", "case": case.fields, "dtype": case.dtype, "error": f"{error:.1e}"}


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """``|ours - theirs| / |theirs|``."""
    return ((ours - theirs).norm() / theirs.norm()).item()


def demand_equal(first: torch.Tensor, second: torch.Tensor) -> None:
    """Raise unless the bits are the same."""
    if not torch.equal(first, second):
        raise ArithmeticError("a second call gives other bits")
