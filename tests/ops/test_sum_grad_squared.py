"""Autograd of single examples -> the reference -> the kernel, and the laws that all of them obey."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fishkern import BackendUnavailableError
from fishkern.ops import sum_grad_squared
from fishkern.ops.sum_grad_squared import sum_grad_squared_torch
from tests.support.closeness import assert_as_accurate, matrix_steps
from tests.support.forked import PEAK, forked

pytestmark = pytest.mark.matrix

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"

# [N, T, I, O]: ones, nothing, primes, one off a tile of the kernel, and two positions blocks.
SHAPES = [
    (1, 1, 1, 1), (3, 1, 7, 5), (2, 5, 1, 3), (2, 5, 3, 1), (5, 7, 13, 11), (2, 33, 65, 63), (1, 67, 64, 64),
    (17, 3, 4, 6), (0, 3, 4, 5), (3, 0, 4, 5), (3, 2, 0, 5), (3, 2, 4, 0),
]  # fmt: skip


def make(N: int, T: int, I: int, O: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(N, T, I, device=DEVICE).to(dtype), torch.randn(N, T, O, device=DEVICE).to(dtype)


def one_by_one(x: Tensor, g: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """The oracle: autograd's weight gradient of every example alone, squared and summed."""
    weight = torch.zeros(g.shape[-1], x.shape[-1], dtype=dtype, device=x.device, requires_grad=True)
    total = torch.zeros_like(weight, requires_grad=False)
    for activations, output_grads in zip(x.to(dtype), g.to(dtype), strict=True):
        (grad,) = torch.autograd.grad(F.linear(activations, weight), weight, output_grads)
        total += grad**2
    return total


def check(actual: Tensor, x: Tensor, g: Tensor) -> None:
    """Demand the accuracy of a float32 loop over the same numbers, which for 16-bit inputs are exact in float32."""
    plain, truth = (one_by_one(x, g, dtype) for dtype in (torch.promote_types(x.dtype, torch.float32), torch.float64))
    assert_as_accurate(actual, plain, truth, steps=matrix_steps(x, x.shape[1]))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reference_is_autograd_one_example_at_a_time(shape):
    x, g = make(*shape, torch.float64)
    torch.testing.assert_close(sum_grad_squared_torch(x, g), one_by_one(x, g))


@pytest.mark.parametrize("O, I", [(1100, 1000), (1030, 1030), (700, 1600), (4000, 1540), (3, 400_001), (400_001, 3)])
@pytest.mark.parametrize("T", [1, 2])
def test_reference_in_several_tiles(O, I, T):
    x, g = make(2, T, I, O, torch.float64)
    out = torch.ones(I, O, dtype=torch.float64, device=DEVICE).mT
    torch.testing.assert_close(sum_grad_squared_torch(x, g, out=out), 1 + one_by_one(x, g))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_accurate_as_float32(shape, dtype, backend):
    if backend == "triton" and dtype is torch.bfloat16 and not ON_GPU:
        pytest.skip("Triton's interpreter gets bfloat16 wrong")
    x, g = make(*shape, dtype)
    result = sum_grad_squared(x, g, backend=backend)
    assert result.dtype is torch.float32
    check(result, x, g)


VIEWS = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "position first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every other feature": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "columns of a wider tensor": lambda x: F.pad(x, (3, 2), value=torch.nan)[..., 3:-2],
    "expanded positions": lambda x: x[:, :1].expand_as(x),
    "expanded examples": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_any_strides(view, packed, backend):
    x, g = (view(tensor) for tensor in make(3, 5, 19, 23))
    out = torch.zeros(19, 46, device=DEVICE)[:, ::2].mT
    if packed:
        flat = [view(tensor.flatten(0, 1)[None])[0] for tensor in (x, g)]
        x, g = (tensor.unflatten(0, (3, 5)) for tensor in flat)
        sum_grad_squared(*flat, offsets=torch.tensor([0, 5, 10, 15]), out=out, backend=backend)
    else:
        sum_grad_squared(x, g, out=out, backend=backend)
    check(out, x, g)


small = st.integers(0, 9)


@settings(max_examples=25)
@given(shape=st.tuples(small, small, small, small), data=st.data())
def test_batch_size_invariance(shape, data, backend):
    """Splitting the examples over calls changes nothing."""
    x, g = make(*shape)
    cut = data.draw(st.integers(0, shape[0]))
    parts = sum_grad_squared(x[:cut], g[:cut], backend=backend)
    assert sum_grad_squared(x[cut:], g[cut:], out=parts, backend=backend) is parts
    torch.testing.assert_close(sum_grad_squared(x, g, backend=backend), parts)


@settings(max_examples=25)
@given(lengths=st.lists(small, max_size=6), I=small, O=small, dtype=st.sampled_from([torch.int32, torch.int64]))
def test_packed_equals_dense(lengths, I, O, dtype, backend):
    """Packed examples, some of them empty, equal the same ones one by one."""
    x, g = (tensor[0] for tensor in make(1, sum(lengths), I, O))
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(dtype)
    expected = torch.zeros(O, I, device=DEVICE)
    for part_x, part_g in zip(x.split(lengths), g.split(lengths), strict=True):
        sum_grad_squared(part_x[None], part_g[None], out=expected, backend="torch")
    torch.testing.assert_close(sum_grad_squared(x, g, offsets=offsets, backend=backend), expected)


def test_packed_longer_than_a_block(backend):
    x, g = make(1, 103, 17, 19)
    lengths = [31, 0, 32, 40]
    total = sum(one_by_one(a, b) for a, b in zip(x.split(lengths, 1), g.split(lengths, 1), strict=True))
    plain = sum(one_by_one(a, b, torch.float32) for a, b in zip(x.split(lengths, 1), g.split(lengths, 1), strict=True))
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    assert_as_accurate(sum_grad_squared(x[0], g[0], offsets=offsets, backend=backend), plain, total)


def test_order_of_examples(backend):
    x, g = make(5, 4, 9, 8)
    torch.testing.assert_close(
        sum_grad_squared(x.flip(0), g.flip(0), backend=backend), sum_grad_squared(x, g, backend=backend)
    )


@pytest.mark.parametrize("T", [1, 6])
def test_padding_invariance(T, backend):
    """Garbage in padded activations does not matter where the output gradients are zero."""
    x, g = make(2, T, 9, 8)
    padded = F.pad(x, (0, 0, 0, 40), value=1e30), F.pad(g, (0, 0, 0, 40))
    torch.testing.assert_close(sum_grad_squared(*padded, backend=backend), sum_grad_squared(x, g, backend=backend))


@pytest.mark.parametrize("T", [1, 6])
def test_loss_scale(T, backend):
    """A loss c times as large has c^2 times the Fisher."""
    x, g = make(3, T, 9, 8)
    scaled = sum_grad_squared(x, 3 * g, backend=backend)
    torch.testing.assert_close(scaled, 9 * sum_grad_squared(x, g, backend=backend))


def test_example_without_gradient(backend):
    x, g = make(3, 4, 9, 8)
    g[1] = 0
    kept = torch.tensor([0, 2], device=DEVICE)
    torch.testing.assert_close(
        sum_grad_squared(x, g, backend=backend), sum_grad_squared(x[kept], g[kept], backend=backend)
    )


def test_accumulates_into_out(backend):
    x, g = make(3, 4, 9, 8)
    out = torch.full((8, 9), 5.0, device=DEVICE)
    assert sum_grad_squared(x, g, out=out, backend=backend) is out
    torch.testing.assert_close(out, 5 + sum_grad_squared(x, g, backend=backend))


@pytest.mark.parametrize("shape", [(3, 1, 7, 5), (5, 7, 13, 11), (2, 33, 65, 63), (17, 3, 4, 6), (0, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_gradients_themselves(shape, packed, backend):
    """The batch gradient is added to ``grad_out``, and ``out`` is the same as without it."""
    x, g = make(*shape)
    N, T, I, O = shape
    grad_out = torch.full((I, O), 2.0, device=DEVICE).mT
    flat = {"offsets": torch.arange(N + 1) * T} if packed else {}
    x, g = (tensor.flatten(0, 1) if packed else tensor for tensor in (x, g))
    out = sum_grad_squared(x, g, grad_out=grad_out, backend=backend, **flat)
    batch = g.reshape(N * T, O).double().mT @ x.reshape(N * T, I).double()
    torch.testing.assert_close(grad_out, (2 + batch).float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out, sum_grad_squared(x, g, backend=backend, **flat))


def test_gradients_themselves_in_several_tiles():
    """Of the reference, whose tiles are large."""
    x, g = make(2, 3, 1000, 1100, torch.float64)
    grad_out = torch.zeros(1100, 1000, dtype=torch.float64, device=DEVICE)
    sum_grad_squared_torch(x, g, grad_out=grad_out)
    torch.testing.assert_close(grad_out, g.flatten(0, 1).mT @ x.flatten(0, 1))


@pytest.mark.parametrize("T", [1, 20])
def test_tf32_is_a_permission(T, backend):
    """The reference makes no use of it; a kernel stays within the rounding to 10 bits of both factors."""
    x, g = make(3, T, 40, 24)
    exact, allowed = (sum_grad_squared(x, g, allow_tf32=allow, backend=backend) for allow in (False, True))
    if backend == "torch":
        assert torch.equal(exact, allowed)
    torch.testing.assert_close(allowed, exact, rtol=1e-2, atol=1e-2 * exact.max().item())


@pytest.mark.parametrize("T", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_squares_of_16_bit_gradients_do_not_vanish(T, dtype, backend):
    """2e-5 squared is zero in float16, and so would the gradients of small losses be."""
    if backend == "triton" and dtype is torch.bfloat16 and not ON_GPU:
        pytest.skip("Triton's interpreter gets bfloat16 wrong")
    x = torch.ones(1, T, 3, dtype=dtype, device=DEVICE)
    g = torch.full((1, T, 2), 2e-5, dtype=dtype, device=DEVICE)
    result = sum_grad_squared(x, g, backend=backend)
    torch.testing.assert_close(result, (T * g[0, 0, 0].double()).square().float().expand(2, 3))


def test_bits_repeat(backend):
    x, g = make(4, 37, 21, 22)
    assert torch.equal(sum_grad_squared(x, g, backend=backend), sum_grad_squared(x, g, backend=backend))


def test_nothing_is_recorded_and_autocast_is_ignored(backend):
    x, g = (tensor.requires_grad_() for tensor in make(2, 3, 4, 5))
    expected = sum_grad_squared(x, g, backend=backend)
    with torch.autocast(DEVICE, torch.bfloat16):
        result = sum_grad_squared(x, g, backend=backend)
    assert not result.requires_grad
    assert torch.equal(result, expected)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_examples():
    """512 gradients of 1 MiB would be 512 MiB; each case in a process of its own, since a peak never falls."""
    code = f"""
{PEAK}
from fishkern.ops import sum_grad_squared

def run(N):
    x, g = torch.randn(2, N, 2, 512, dtype=getattr(torch, dtype))
    if packed:
        return sum_grad_squared(x.flatten(0, 1), g.flatten(0, 1), offsets=torch.arange(N + 1) * 2, backend="torch")
    return sum_grad_squared(x, g, backend="torch")

run(2)
before = peak()
run(512)
print(peak() - before)
"""
    layouts = [("float32", False), ("float32", True), ("bfloat16", False)]
    cases = [{"dtype": dtype, "packed": packed} for dtype, packed in layouts]
    for case, done in zip(cases, forked(code, cases), strict=True):
        assert done.returncode == 0, done.stderr
        assert float(done.stdout) < 64, case


def test_float64_is_not_for_triton():
    x, g = make(1, 2, 3, 4, torch.float64)
    with pytest.raises(BackendUnavailableError, match="sum_grad_squared cannot run on Triton"):
        sum_grad_squared(x, g, backend="triton")


x, g, x1, g1 = torch.ones(2, 3, 4), torch.ones(2, 3, 5), torch.ones(6, 4), torch.ones(6, 5)
REFUSED = {
    "without offsets two dimensions": (x1, g1, {}, r"\[N, T, I\].* got \(6, 4\)"),
    "with offsets three": (x, g, dict(offsets=torch.tensor([0, 6])), r"\[S, I\].* got \(2, 3, 4\)"),
    "other positions": (x, g[:, :2], {}, "agree in all sizes but the last"),
    "other examples": (x[:1], g, {}, "agree in all sizes but the last"),
    "other dtypes": (x, g.double(), {}, "same floating dtype"),
    "integers": (x.int(), g.int(), {}, "same floating dtype"),
    "other devices": (x, g.to("meta"), {}, "one device"),
    "out of another shape": (x, g, dict(out=torch.zeros(4, 5)), r"out must be \(5, 4\)"),
    "out in 16 bits": (x.half(), g.half(), dict(out=torch.zeros(5, 4).half()), "out must be .*float32"),
    "out short of float64": (x.double(), g.double(), dict(out=torch.zeros(5, 4)), "out must be .*float64"),
    "grad_out of another shape": (x, g, dict(grad_out=torch.zeros(4, 5)), r"grad_out must be \(5, 4\)"),
    "grad_out in 16 bits": (x.half(), g.half(), dict(grad_out=torch.zeros(5, 4).half()), "grad_out must be .*float32"),
    "out elsewhere": (x, g, dict(out=torch.zeros(5, 4, device="meta")), "out must be .*on cpu"),
    "floating offsets": (x1, g1, dict(offsets=torch.tensor([0.0, 6.0])), "int64 or int32"),
    "no offsets": (x1, g1, dict(offsets=torch.tensor([], dtype=torch.int64)), r"\[N \+ 1\]"),
    "a table of offsets": (x1, g1, dict(offsets=torch.tensor([[0, 6]])), r"\[N \+ 1\]"),
    "offsets from 1": (x1, g1, dict(offsets=torch.tensor([1, 6])), "from 0 to the number of positions, 6"),
    "offsets short of the end": (x1, g1, dict(offsets=torch.tensor([0, 5])), "got 2 numbers from 0 to 5"),
    "offsets that fall": (x1, g1, dict(offsets=torch.tensor([0, 4, 3, 6])), "do not ascend"),
    "an unknown backend": (x, g, dict(backend="cuda"), "backend must be one of"),
}


@pytest.mark.parametrize("activations, output_grads, options, message", REFUSED.values(), ids=REFUSED)
def test_refused(activations, output_grads, options, message):
    with pytest.raises(ValueError, match=message):
        sum_grad_squared(activations, output_grads, **options)


@pytest.mark.slow
@pytest.mark.gpu
def test_more_entries_than_int32_counts(backend):
    x, g = make(2, 3, 2**15 + 8, 2**16)
    total = sum_grad_squared(x, g, backend=backend)
    for rows in (slice(0, 8), slice(-8, None)):
        check(total[rows], x, g[..., rows])
