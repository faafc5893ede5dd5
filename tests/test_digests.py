"""Digests of tensors, by which a file recognises its values."""

from __future__ import annotations

import torch

from fishkern.digests import agree, digest


def test_a_digest_is_the_norm_and_the_sum_under_signs_however_the_tensor_is_stored():
    """More entries than are read at a time, in an order that is not that of the memory."""
    matrix = torch.randn(2100, 2001).T
    signs = torch.randint(0, 2, (matrix.numel(),), generator=torch.Generator().manual_seed(0)) * 2 - 1
    values = matrix.double().flatten()
    norm, signed = digest(matrix)
    assert abs(norm - values.norm().item()) <= 1e-9 * norm
    assert abs(signed - (values * signs).sum().item()) <= 1e-9 * norm
    assert digest(torch.empty(0)) == (0.0, 0.0)


def test_digests_agree_up_to_rounding_to_16_bits_and_not_for_other_values():
    values = torch.randn(300, 200, generator=torch.Generator().manual_seed(1))
    recorded = digest(values)
    assert agree(digest(values.bfloat16()), recorded)
    assert not agree(digest(values.flip(0)), recorded)
    assert not agree(digest(1.02 * values), recorded)
    assert agree(digest(torch.zeros(3)), digest(torch.zeros(5)))
