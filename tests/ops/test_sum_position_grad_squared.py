"""Autograd of single positions -> the operation, and its laws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fishkern.ops import sum_grad_squared, sum_position_grad_squared
from tests.support.closeness import assert_as_accurate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# [N, T, I, O]: ones, nothing, primes, more positions than are squared at once, more entries than a tile.
SHAPES = [
    (1, 1, 1, 1), (5, 7, 13, 11), (2, 33, 65, 63), (5, 411, 3, 2), (1, 2, 1000, 1100),
    (0, 3, 4, 5), (3, 0, 4, 5), (3, 2, 0, 5), (3, 2, 4, 0),
]  # fmt: skip


def make(N: int, T: int, I: int, O: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(N, T, I, device=DEVICE).to(dtype), torch.randn(N, T, O, device=DEVICE).to(dtype)


def one_by_one(x: Tensor, g: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """The oracle: autograd's weight gradient of every position alone, squared and summed."""
    weight = torch.zeros(g.shape[-1], x.shape[-1], dtype=dtype, device=x.device, requires_grad=True)
    total = torch.zeros_like(weight, requires_grad=False)
    positions = x.flatten(0, -2).to(dtype), g.flatten(0, -2).to(dtype)
    for activation, output_grad in zip(*positions, strict=True):
        (grad,) = torch.autograd.grad(F.linear(activation, weight), weight, output_grad)
        total += grad**2
    return total


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_autograd_one_position_at_a_time(shape):
    x, g = make(*shape, torch.float64)
    torch.testing.assert_close(sum_position_grad_squared(x, g), one_by_one(x, g))
    torch.testing.assert_close(sum_position_grad_squared(x.flatten(0, 1), g.flatten(0, 1)), one_by_one(x, g))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_accurate_as_float32(shape, dtype):
    x, g = make(*shape, dtype)
    result = sum_position_grad_squared(x, g)
    assert result.dtype is torch.float32
    assert_as_accurate(result, one_by_one(x, g, torch.float32), one_by_one(x, g))


def test_any_strides():
    x, g = (tensor.transpose(0, 2).contiguous().transpose(0, 2) for tensor in make(3, 5, 19, 23))
    out = torch.zeros(19, 46, device=DEVICE)[:, ::2].mT
    sum_position_grad_squared(x, g, out=out)
    assert_as_accurate(out, one_by_one(x, g, torch.float32), one_by_one(x, g))


@given(N=st.integers(0, 9), T=st.integers(0, 9), I=st.integers(0, 9), O=st.integers(0, 9), data=st.data())
def test_batch_size_invariance(N, T, I, O, data):
    """Splitting the examples over calls changes nothing."""
    x, g = make(N, T, I, O)
    cut = data.draw(st.integers(0, N))
    parts = sum_position_grad_squared(x[:cut], g[:cut])
    assert sum_position_grad_squared(x[cut:], g[cut:], out=parts) is parts
    torch.testing.assert_close(sum_position_grad_squared(x, g), parts)


def test_is_the_example_unit_only_for_single_positions():
    x, g = make(6, 2, 5, 4)
    torch.testing.assert_close(sum_position_grad_squared(x[:, :1], g[:, :1]), sum_grad_squared(x[:, :1], g[:, :1]))
    assert not torch.allclose(sum_position_grad_squared(x, g), sum_grad_squared(x, g))


def test_padding_invariance():
    """Garbage in padded activations does not matter where the output gradients are zero."""
    x, g = make(2, 6, 9, 8)
    padded = F.pad(x, (0, 0, 0, 5), value=7.0), F.pad(g, (0, 0, 0, 5))
    torch.testing.assert_close(sum_position_grad_squared(*padded), sum_position_grad_squared(x, g))


def test_loss_scale():
    """A loss c times as large has c^2 times the result."""
    x, g = make(3, 6, 9, 8)
    torch.testing.assert_close(sum_position_grad_squared(x, 3 * g), 9 * sum_position_grad_squared(x, g))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_squares_of_16_bit_gradients_do_not_vanish(dtype):
    """2e-5 squared is zero in float16."""
    g = torch.full((1, 2, 2), 2e-5, dtype=dtype)
    result = sum_position_grad_squared(torch.ones(1, 2, 3, dtype=dtype), g)
    torch.testing.assert_close(result, (2 * g[0, 0, 0].double().square()).float().expand(2, 3))


def test_nothing_is_recorded():
    x, g = (tensor.requires_grad_() for tensor in make(2, 3, 4, 5))
    assert not sum_position_grad_squared(x, g).requires_grad


x, g = torch.ones(2, 3, 4), torch.ones(2, 3, 5)
REFUSED = {
    "other positions": (x, g[:, :2], {}, "agree in all sizes but the last"),
    "one dimension": (x[0, 0], g[0, 0], {}, "agree in all sizes but the last"),
    "other dtypes": (x, g.half(), {}, "same floating dtype"),
    "other devices": (x, g.to("meta"), {}, "one device"),
    "out of another shape": (x, g, dict(out=torch.zeros(4, 5)), r"out must be \(5, 4\)"),
}


@pytest.mark.parametrize("activations, output_grads, options, message", REFUSED.values(), ids=REFUSED)
def test_refused(activations, output_grads, options, message):
    with pytest.raises(ValueError, match=message):
        sum_position_grad_squared(activations, output_grads, **options)
