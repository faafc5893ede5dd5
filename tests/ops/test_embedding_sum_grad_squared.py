"""Autograd of single examples -> the operation, and its laws."""

from __future__ import annotations

import importlib
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn import functional as F

from fishkern.ops import embedding_rows, embedding_sum_grad_squared
from tests.support.closeness import assert_as_accurate

operation = importlib.import_module("fishkern.ops.embedding_sum_grad_squared")  # the function has its name
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# [N, T, D, V]: ones, nothing, primes, many repeats, few repeats.
SHAPES = [
    (1, 1, 1, 1), (3, 7, 5, 2), (5, 11, 13, 101), (4, 64, 33, 7), (0, 3, 4, 5), (3, 0, 4, 5), (3, 2, 0, 5),
]  # fmt: skip


def make(N: int, T: int, D: int, V: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randint(V, (N, T), device=DEVICE), torch.randn(N, T, D, device=DEVICE).to(dtype)


def grads_one_by_one(
    indices: Tensor, g: Tensor, V: int, padding_idx: int | None = None, dtype: torch.dtype = torch.float64
) -> Tensor:
    """The oracle: autograd's gradient of the table for every example alone, ``[N, V, D]``."""
    table = torch.zeros(V, g.shape[-1], dtype=dtype, device=g.device, requires_grad=True)
    grads = [
        torch.autograd.grad(F.embedding(row, table, padding_idx=padding_idx), table, output_grads)[0]
        for row, output_grads in zip(indices, g.to(dtype), strict=True)
    ]
    return torch.stack(grads) if grads else table.detach().new_zeros(0, *table.shape)


def one_by_one(*arguments, **options) -> Tensor:
    return grads_one_by_one(*arguments, **options).square().sum(0)


@pytest.mark.parametrize("padding_idx", [None, 0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_autograd_one_example_at_a_time(shape, padding_idx):
    indices, g = make(*shape, torch.float64)
    result = embedding_sum_grad_squared(indices, g, shape[-1], padding_idx=padding_idx)
    torch.testing.assert_close(result, one_by_one(indices, g, shape[-1], padding_idx))


@pytest.mark.parametrize("padding_idx", [None, 0])
@pytest.mark.parametrize("lengths", [(3, 7, 1), (0, 5, 0, 2), (4,), (0,)], ids=str)
def test_packed_examples(lengths, padding_idx):
    V = 5
    indices, g = make(1, sum(lengths), 3, V, torch.float64)
    offsets = F.pad(torch.tensor(lengths).cumsum(0), (1, 0))
    expected = torch.zeros(V, 3, dtype=torch.float64, device=DEVICE)
    for i, part in zip(indices.split(lengths, 1), g.split(lengths, 1), strict=True):
        expected += one_by_one(i, part, V, padding_idx)
    options = {"padding_idx": padding_idx, "offsets": offsets}
    torch.testing.assert_close(embedding_sum_grad_squared(indices[0], g[0], V, **options), expected)
    example, row, grads = embedding_rows(indices[0], g[0], **options)
    summed = torch.zeros(len(lengths), V, 3, dtype=torch.float64, device=DEVICE).index_put_((example, row), grads)
    torch.testing.assert_close(summed.square().sum(0), expected)


def test_packed_examples_that_do_not_fit():
    indices, g = make(1, 5, 3, 4)
    with pytest.raises(ValueError, match=r"\[S\] and output_grads \[S, D\]"):
        embedding_sum_grad_squared(indices, g, 4, offsets=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="offsets must ascend from 0 to the number of positions, 5"):
        embedding_sum_grad_squared(indices[0], g[0], 4, offsets=torch.tensor([0, 4]))


@pytest.mark.parametrize("padding_idx", [None, 0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_are_the_gradients_of_the_examples(shape, padding_idx):
    indices, g = make(*shape, torch.float64)
    example, row, grads = embedding_rows(indices, g, padding_idx=padding_idx)
    expected = grads_one_by_one(indices, g, shape[-1], padding_idx)
    torch.testing.assert_close(torch.zeros_like(expected).index_put_((example, row), grads), expected)
    pairs = list(zip(example.tolist(), row.tolist(), strict=True))
    assert pairs == sorted({(n, v) for n, rows in enumerate(indices.tolist()) for v in rows if v != padding_idx})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_accurate_as_float32(shape, dtype):
    indices, g = make(*shape, dtype)
    result = embedding_sum_grad_squared(indices, g, shape[-1])
    assert result.dtype is torch.float32
    plain = one_by_one(indices, g, shape[-1], dtype=torch.float32)
    assert_as_accurate(result, plain, one_by_one(indices, g, shape[-1]))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_any_strides_and_integers(dtype):
    indices, g = make(3, 8, 5, 4)
    expected = one_by_one(indices, g, 4)
    out = torch.zeros(5, 8, device=DEVICE)[:, ::2].mT
    embedding_sum_grad_squared(indices.to(dtype).mT.contiguous().mT, g.mT.contiguous().mT, 4, out=out)
    assert_as_accurate(out, one_by_one(indices, g, 4, dtype=torch.float32), expected)


@given(N=st.integers(0, 6), T=st.integers(0, 6), V=st.integers(1, 5), data=st.data())
def test_batch_size_invariance(N, T, V, data):
    """Splitting the examples over calls changes nothing."""
    indices, g = make(N, T, 3, V)
    cut = data.draw(st.integers(0, N))
    parts = embedding_sum_grad_squared(indices[:cut], g[:cut], V)
    assert embedding_sum_grad_squared(indices[cut:], g[cut:], V, out=parts) is parts
    torch.testing.assert_close(embedding_sum_grad_squared(indices, g, V), parts)


def test_repeated_rows_are_summed_before_the_square():
    indices = torch.tensor([[1, 1, 0], [1, 0, 0]])
    g = torch.tensor([[1.0, 2.0, 5.0], [10.0, 3.0, -3.0]])[..., None]
    assert embedding_sum_grad_squared(indices, g, 3).tolist() == [[25.0], [9.0 + 100.0], [0.0]]


def test_padding_invariance():
    indices, g = make(2, 6, 3, 5)
    padded = F.pad(indices, (0, 4), value=2), F.pad(g, (0, 0, 0, 4))
    torch.testing.assert_close(embedding_sum_grad_squared(*padded, 5), embedding_sum_grad_squared(indices, g, 5))


def test_loss_scale():
    """A loss c times as large has c^2 times the Fisher."""
    indices, g = make(3, 6, 4, 5)
    torch.testing.assert_close(
        embedding_sum_grad_squared(indices, 3 * g, 5), 9 * embedding_sum_grad_squared(indices, g, 5)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_squares_of_16_bit_gradients_do_not_vanish(dtype):
    """2e-5 squared is zero in float16."""
    g = torch.full((1, 2, 3), 2e-5, dtype=dtype)
    result = embedding_sum_grad_squared(torch.tensor([[0, 0]]), g, 1)
    torch.testing.assert_close(result, (2 * g[0, 0, 0].double()).square().float().expand(1, 3))


def test_a_large_vocabulary_is_never_made_dense_per_example():
    """Dense gradients of these 4096 examples would take 8 TB."""
    indices, g = make(4096, 2, 2, 250_000)
    out = embedding_sum_grad_squared(indices, g, 250_000)
    torch.testing.assert_close(out.sum(), embedding_rows(indices, g)[2].square().sum())


def test_bits_repeat_without_a_warning():
    indices, g = make(16, 64, 8, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = embedding_sum_grad_squared(indices, g, 9)
    assert torch.equal(first, embedding_sum_grad_squared(indices, g, 9))


@pytest.mark.parametrize("padding_idx", [None, 0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_sums_in_places_of_a_fixed_number_have_the_same_bits(shape, padding_idx, packed, monkeypatch):
    """A GPU's way, on any device."""
    N, T, D, V = shape
    indices, g = make(N, T, D, V)
    options = {"padding_idx": padding_idx}
    if packed:
        indices, g = indices.flatten(), g.flatten(0, 1)
        options["offsets"] = torch.arange(N + 1) * T
    results = []
    for may_wait in (True, False):
        monkeypatch.setattr(operation, "_may_wait", lambda indices, may_wait=may_wait: may_wait)
        results.append(embedding_sum_grad_squared(indices, g, V, **options, out=torch.ones(V, D, device=DEVICE)))
    assert torch.equal(*results)


def test_nothing_waits_for_values_on_a_gpu(monkeypatch):
    """Tensors without values refuse what depends on them: to wait for one, and sizes that follow them."""
    with FakeTensorMode():
        indices, g = torch.empty(3, 7, dtype=torch.int64), torch.empty(3, 7, 4)
        with pytest.raises(DataDependentOutputException):
            embedding_sum_grad_squared(indices, g, 11, padding_idx=0)
        monkeypatch.setattr(operation, "_may_wait", lambda indices: False)
        assert embedding_sum_grad_squared(indices, g, 11, padding_idx=0).shape == (11, 4)


def test_an_index_out_of_range_is_not_added_in_silence(monkeypatch):
    indices, g = torch.tensor([[1, 3]]), torch.ones(1, 2, 4)
    monkeypatch.setattr(operation, "_may_wait", lambda indices: False)
    with pytest.raises(RuntimeError, match="from 0 to num_rows - 1 = 2"):
        embedding_sum_grad_squared(indices, g, 3)


def test_nothing_is_recorded():
    indices, g = make(2, 3, 4, 5)
    assert not embedding_sum_grad_squared(indices, g.requires_grad_(), 5).requires_grad
    assert not embedding_rows(indices, g)[2].requires_grad


indices, g = torch.tensor([[0, 1], [2, 1]]), torch.ones(2, 2, 3)
REFUSED = {
    "one position missing": (indices, g[:, :1], {}, r"indices must be \[N, T\].* got \(2, 2\) and \(2, 1, 3\)"),
    "flat indices": (indices.flatten(), g, {}, r"indices must be \[N, T\]"),
    "floating indices": (indices.float(), g, {}, "int64 or int32"),
    "integer gradients": (indices, g.long(), {}, "output_grads floating"),
    "other devices": (indices, g.to("meta"), {}, "one device"),
    "negative indices": (indices - 1, g, {}, "not be negative, got -1"),
    "indices past the table": (indices + 1, g, {}, "below num_rows = 3, got 3"),
    "padding outside": (indices, g, dict(padding_idx=3), "padding_idx must be from 0 to num_rows - 1 = 2"),
    "negative padding": (indices, g, dict(padding_idx=-1), "padding_idx must be from 0"),
    "out of another shape": (indices, g, dict(out=torch.zeros(2, 3)), r"out must be \(3, 3\)"),
    "out in 16 bits": (indices, g.half(), dict(out=torch.zeros(3, 3).half()), "out must be .*float32"),
}


@pytest.mark.parametrize("indices, output_grads, options, message", REFUSED.values(), ids=REFUSED)
def test_refused(indices, output_grads, options, message):
    with pytest.raises(ValueError, match=message):
        embedding_sum_grad_squared(indices, output_grads, 3, **options)
