"""The rank-one directions of a matrix, against the singular value decomposition of torch and explicit formulas."""

from __future__ import annotations

import pytest
import torch

from fishkern.statistics.bases import power_directions, svd_directions

SHAPES = [(5, 9), (9, 5), (6, 6), (1, 4), (4, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_they_are_the_singular_vectors(shape, dtype):
    matrix = torch.randn(shape).to(dtype)
    U, V, values = svd_directions(matrix)
    M = matrix.double()
    torch.testing.assert_close(values, torch.linalg.svdvals(M))
    torch.testing.assert_close(U * values @ V.T, M)
    for vectors in (U, V):
        torch.testing.assert_close(vectors.T @ vectors, torch.eye(min(shape), dtype=torch.float64))
    largest = V.gather(0, V.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()


@pytest.mark.parametrize("shape", [(8, 6), (6, 8)], ids=str)
@pytest.mark.parametrize("rank", [0, 3])
def test_directions_of_no_singular_value_complete_the_others(shape, rank):
    matrix = torch.randn(shape[0], rank) @ torch.randn(rank, shape[1])
    U, V, values = svd_directions(matrix)
    assert (values[rank:] <= 1e-6 * values[:1].clamp_min(1)).all()
    for vectors in (U, V):
        torch.testing.assert_close(vectors.T @ vectors, torch.eye(6, dtype=torch.float64))


def test_they_stay_orthonormal_where_singular_values_span_nine_digits():
    left, right = (torch.linalg.qr(torch.randn(60, 60, dtype=torch.float64)).Q for _ in range(2))
    matrix = left * torch.logspace(0, -9, 60, dtype=torch.float64) @ right.T
    U, V, values = svd_directions(matrix)
    torch.testing.assert_close(U.T @ U, torch.eye(60, dtype=torch.float64))
    assert (U * values @ V.T - matrix).abs().max() < 1e-8


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_power_step_gives_the_columns_of_the_published_code(shape):
    W = torch.randn(shape, dtype=torch.float64)
    V = W.T @ W
    V = V / V.norm(dim=0)
    U = W @ V
    U = U / U.norm(dim=0)
    basis = power_directions(W)
    chosen = torch.arange(shape[1]).flip(0)
    found = basis.columns(chosen)
    torch.testing.assert_close(found.U, U[:, chosen])
    torch.testing.assert_close(found.V, V[:, chosen])
    h = torch.randn(shape[1], dtype=torch.float64)
    torch.testing.assert_close((W @ h) @ basis.scaled_W, h @ V)  # the projection without V


def test_a_column_of_zeros_has_no_power_direction():
    W = torch.randn(4, 6)
    W[:, 2] = 0
    basis = power_directions(W)
    assert not basis.U[:, 2].any()
    assert not basis.scaled_W[:, 2].any()
    assert torch.isfinite(basis.U).all()
    assert torch.isfinite(basis.scaled_W).all()
