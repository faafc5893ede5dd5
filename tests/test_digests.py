"""Digests of tensors: what they are, and which differences they notice."""

from __future__ import annotations

import pytest
import torch

from fishkern import digests


@pytest.mark.parametrize("shape", [(3, 4), (1000, 1100)], ids=["one piece", "several pieces"])
def test_a_digest_is_the_norm_and_a_sum_under_signs(shape, monkeypatch):
    values = torch.randn(shape)
    signs = torch.randint(0, 2, (values.numel(),), generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = values.double().norm().item(), (values.double().flatten() @ signs.double()).item()
    assert digests.digest(values) == pytest.approx(expected, rel=1e-12)
    # signs go on from piece to piece, as files of older versions have them
    monkeypatch.setattr(digests, "_PIECE", values.numel() // 3)
    assert digests.digest(values) == pytest.approx(expected, rel=1e-12)


def test_rounding_agrees_and_other_values_do_not():
    values = torch.randn(64, 48)
    recorded = digests.digest(values)
    assert digests.agree(digests.digest(values.bfloat16()), recorded)
    assert not digests.agree(digests.digest(values.flip(0)), recorded)
    assert not digests.agree(digests.digest(1.02 * values), recorded)
    assert digests.agree(digests.digest(torch.zeros(3)), digests.digest(torch.zeros(5)))


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str
)
def test_an_exact_digest_is_that_of_bits_dtype_and_shape(dtype):
    values = torch.arange(12).view(3, 4).to(dtype)
    exact = digests.exact_digest(values)
    assert exact == digests.exact_digest(values.clone()) == digests.exact_digest(values.T.contiguous().T)
    changed = values.clone()
    changed[1, 2] = 0
    others = [changed, values.view(4, 3), values[:2], values.flatten()]
    others += [values.T.contiguous().view(3, 4), values.view(torch.uint8)] if dtype is not torch.bool else []
    assert all(digests.exact_digest(other) != exact for other in others)


def test_an_exact_digest_of_a_scalar_and_of_nothing():
    assert digests.exact_digest(torch.tensor(1.0)) != digests.exact_digest(torch.tensor(-1.0))
    assert digests.exact_digest(torch.zeros(0, 3)) != digests.exact_digest(torch.zeros(3, 0))


def test_a_difference_has_both_digests():
    words = digests.difference((2.0, -0.25), (1.5, 0.5))
    assert words == "had norm 1.5 and has 2 (sums under random signs 0.5 and -0.25)"
