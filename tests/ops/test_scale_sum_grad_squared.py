"""Autograd of one example at a time -> the reference -> the kernel, for scales, norms and shifts."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fishkern import BackendUnavailableError
from fishkern.ops import scale_sum_grad_squared
from tests.support.closeness import assert_as_accurate

pytestmark = pytest.mark.matrix

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
EPS = 1e-3
close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)  # of float32 with float64

# [N, T, D]: ones, nothing, primes, more than a step of the kernel, parts of an example, a wide position, few features.
SHAPES = [
    (1, 1, 1), (5, 7, 13), (3, 37, 300), (1, 90, 65), (1, 300, 520), (2, 5, 4500), (40, 3, 2),
    (0, 3, 4), (3, 0, 4), (3, 2, 0),
]  # fmt: skip


def make(N: int, T: int, D: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    x = torch.randn(N, T, D, device=DEVICE) + 0.5  # whose mean is not 0
    return x.to(dtype), torch.randn(N, T, D, device=DEVICE).to(dtype)


def one_by_one(
    x: Tensor | None, g: Tensor, norm: str | None = None, eps: float = EPS, rounded_to: torch.dtype | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:  # fmt: skip
    """The oracle: autograd's gradient of each example alone, through the norm as its paper writes it."""
    w = torch.zeros(g.shape[-1], dtype=dtype, device=g.device, requires_grad=True)
    total = torch.zeros_like(w, requires_grad=False)
    for n in range(len(g) if g.numel() else 0):
        factor = torch.ones_like(g[n], dtype=dtype) if x is None else x[n].to(dtype)
        if norm == "layer":
            mean = factor.sum(-1, keepdim=True) / factor.shape[-1]
            factor = (factor - mean) / (((factor - mean) ** 2).mean(-1, keepdim=True) + eps).sqrt()
        if norm == "rms":
            factor = factor / ((factor**2).mean(-1, keepdim=True) + eps).sqrt()
        if rounded_to is not None:
            factor = factor.to(rounded_to).to(dtype)
        (grad,) = torch.autograd.grad(((w * factor) * g[n].to(dtype)).sum(), w)
        total += grad**2
    return total


@pytest.mark.parametrize("norm", [None, "rms", "layer"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_autograd_one_example_at_a_time(shape, norm):
    x, g = make(*shape, torch.float64)
    result = scale_sum_grad_squared(x, g, norm=norm, eps=EPS, backend="torch")
    torch.testing.assert_close(result, one_by_one(x, g, norm))
    assert result.dtype is torch.float64


@pytest.mark.parametrize("norm", [None, "rms", "layer"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_accurate_as_float32(shape, norm, backend):
    x, g = make(*shape)
    result = scale_sum_grad_squared(x, g, norm=norm, eps=EPS, backend=backend)
    assert result.dtype is torch.float32
    assert_as_accurate(result, one_by_one(x, g, norm, dtype=torch.float32), one_by_one(x, g, norm))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_shift(shape, backend):
    _, g = make(*shape)
    result = scale_sum_grad_squared(None, g, backend=backend)
    assert_as_accurate(result, one_by_one(None, g, dtype=torch.float32), one_by_one(None, g))


@pytest.mark.parametrize("norm", [None, "rms", "layer"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits(dtype, norm, backend):
    if backend == "triton" and dtype is torch.bfloat16 and not ON_GPU:
        pytest.skip("the interpreter refuses bfloat16")
    x, g = make(4, 21, 70, dtype)
    rounded_to = None if norm is None else dtype
    result = scale_sum_grad_squared(x, g, norm=norm, eps=EPS, rounded_to=rounded_to, backend=backend)
    # a factor between two values of 16 bits is rounded as float32 decides, not as float64 does
    plain = one_by_one(x, g, norm, rounded_to=rounded_to, dtype=torch.float32)
    assert_as_accurate(result, plain, one_by_one(x, g, norm, rounded_to=rounded_to), slack=3)


def test_factors_are_rounded(backend):
    """What is rounded differs from what is not, by far more than float32 does."""
    x, g = make(4, 21, 70)
    call = partial(scale_sum_grad_squared, x, g, norm="rms", eps=EPS, backend=backend)
    rounded, truth = call(rounded_to=torch.float16), one_by_one(x, g, "rms", rounded_to=torch.float16)
    scale = truth.max()
    assert (rounded - truth).abs().max() < 3e-5 * scale
    assert (call() - truth).abs().max() > 1e-4 * scale
    assert torch.equal(call(rounded_to=torch.float32), call())


def test_eps_counts_where_inputs_are_small(backend):
    x, g = make(3, 4, 6)
    result = scale_sum_grad_squared(x / 100, g, norm="rms", eps=EPS, backend=backend)
    close(result.double(), one_by_one(x / 100, g, "rms"))


def test_no_eps(backend):
    """What is not there, next to the last position, is no position of zeros, whose norm would be infinite."""
    x, g = make(2, 5, 6)
    result = scale_sum_grad_squared(x, g, norm="rms", backend=backend)
    close(result.double(), one_by_one(x, g, "rms", eps=0.0))


def test_any_strides(backend):
    x, g = (tensor.transpose(0, 2).contiguous().transpose(0, 2) for tensor in make(3, 5, 19))
    out = torch.ones(38, device=DEVICE)
    result = scale_sum_grad_squared(x, g.mT.contiguous().mT, norm="rms", eps=EPS, out=out[::2], backend=backend)
    assert result.data_ptr() == out.data_ptr()
    close(out[::2].double(), 1 + one_by_one(x, g, "rms"))
    assert torch.equal(out[1::2], torch.ones(19, device=DEVICE))


def test_other_dtypes_of_inputs_and_gradients(backend):
    x, g = make(3, 5, 19)
    result = scale_sum_grad_squared(x, g.half(), norm="layer", eps=EPS, backend=backend)
    close(result.double(), one_by_one(x, g.half(), "layer"))


@settings(max_examples=10)
@given(N=st.integers(1, 9), T=st.integers(1, 40), D=st.integers(1, 40), data=st.data())
def test_batch_size_invariance(backend, N, T, D, data):
    """Splitting the examples over calls changes nothing."""
    x, g = make(N, T, D)
    cut = data.draw(st.integers(0, N))
    options = {"norm": data.draw(st.sampled_from([None, "rms", "layer"])), "eps": EPS, "backend": backend}
    parts = scale_sum_grad_squared(x[:cut], g[:cut], **options)
    assert scale_sum_grad_squared(x[cut:], g[cut:], out=parts, **options) is parts
    torch.testing.assert_close(scale_sum_grad_squared(x, g, **options), parts)


def test_equal_calls_give_equal_bits(backend):
    x, g = make(3, 300, 65)
    first, second = (scale_sum_grad_squared(x, g, norm="layer", eps=EPS, backend=backend) for _ in range(2))
    assert torch.equal(first, second)


def test_padding_invariance(backend):
    """Garbage in padded inputs does not matter where the output gradients are zero."""
    x, g = make(2, 6, 9)
    padded = torch.cat([x, 7 * torch.ones(2, 5, 9, device=DEVICE)], 1), torch.cat([g, torch.zeros_like(g[:, :5])], 1)
    for norm in (None, "rms", "layer"):
        options = {"norm": norm, "eps": EPS, "backend": backend}
        torch.testing.assert_close(scale_sum_grad_squared(*padded, **options), scale_sum_grad_squared(x, g, **options))


def test_pieces_of_the_reference():
    """More examples than are worked on at a time, and one that is more than a piece."""
    for shape in ((9, 3000, 17), (2, 3, 2**16)):
        x, g = make(*shape)
        close(scale_sum_grad_squared(x, g, backend="torch").double(), one_by_one(x, g))


def test_nothing_is_recorded(backend):
    x, g = (tensor.requires_grad_() for tensor in make(2, 3, 4))
    assert not scale_sum_grad_squared(x, g, norm="rms", backend=backend).requires_grad


def test_float64_has_no_kernel():
    with pytest.raises(BackendUnavailableError, match="float64"):
        scale_sum_grad_squared(*make(1, 2, 3, torch.float64), backend="triton")


x, g = torch.ones(2, 3, 4), torch.ones(2, 3, 4)
REFUSED = {
    "no position axis": (x[0], g[0], {}, r"output_grads must be \[N, T, D\]"),
    "integers": (x, g.long(), {}, "floating"),
    "other positions": (x[:, :2], g, {}, "inputs must be as output_grads"),
    "integer inputs": (x.long(), g, {}, "inputs must be as output_grads"),
    "other devices": (x.to("meta"), g, {}, "one device"),
    "another norm": (x, g, dict(norm="batch"), 'norm must be "rms", "layer" or None'),
    "eps below 0": (x, g, dict(norm="rms", eps=-1.0), "eps must be a number, 0 or more"),
    "eps NaN": (x, g, dict(norm="rms", eps=float("nan")), "eps must be a number, 0 or more"),
    "rounded to integers": (x, g, dict(norm="rms", rounded_to=torch.int8), "rounded_to must be None or one of"),
    "norm of nothing": (None, g, dict(norm="rms"), "need inputs"),
    "out of another shape": (x, g, dict(out=torch.zeros(5)), r"out must be \(4,\)"),
    "out of another dtype": (x, g, dict(out=torch.zeros(4).double()), "float32"),
}


@pytest.mark.parametrize("inputs, output_grads, options, message", REFUSED.values(), ids=REFUSED)
def test_refused(inputs, output_grads, options, message):
    with pytest.raises(ValueError, match=message):
        scale_sum_grad_squared(inputs, output_grads, **options)
