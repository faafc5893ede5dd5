"""Rank-one directions of a matrix: its singular vectors, or one power step from each coordinate."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fishkern.ops.dtypes import accumulates_in


class Directions(NamedTuple):
    """Rank-one directions ``u_k v_k^T`` of a matrix ``M [O, I]``, as the columns of two matrices.

    Args:
        U: ``[O, K]``, unit columns.
        V: ``[I, K]``, unit columns.
        singular_values: ``[K]``, float64, descending; ``None`` for directions that are not singular vectors.
    """

    U: Tensor
    V: Tensor
    singular_values: Tensor | None


class PowerBasis(NamedTuple):
    """The directions of :func:`power_directions` in a form that needs no matrix ``[I, I]``.

    With ``W [O, I]`` and ``y = W h``, the projections are ``v_k . h = (y . scaled_W[:, k])`` and ``u_k . d = d .
    U[:, k]``.

    Args:
        U: ``[O, I]``, unit columns (zero where a column of ``W`` is zero).
        scaled_W: ``[O, I]``, the columns ``w_k / |W^T w_k|``.
        matrix: ``W`` itself.
    """

    U: Tensor
    scaled_W: Tensor
    matrix: Tensor

    def columns(self, chosen: Tensor) -> Directions:
        """Form some of the directions.

        Args:
            chosen: Their numbers, ``[R]``.

        Returns:
            ``U [O, R]``, ``V [I, R]``.
        """
        return Directions(self.U[:, chosen], self.matrix.T @ self.scaled_W[:, chosen], None)


@torch.no_grad()
def svd_directions(matrix: Tensor) -> Directions:
    """Compute the singular vectors of a matrix, by one eigenproblem of its smaller side.

    ``M = sum_k s_k u_k v_k^T``. The Gram matrix of the smaller side is decomposed in float64, and the other vectors are
    ``M v / s``, kept orthonormal by a QR, which also completes them where ``s`` is zero. Signs are fixed: the entry of
    ``v_k`` with the largest magnitude is positive. So equal matrices give equal directions.

    Args:
        matrix: ``M [O, I]``, floating.

    Returns:
        ``K = min(O, I)`` directions by descending singular value, in float64 on the matrix's device.
    """
    M = matrix.detach().double()
    if M.shape[0] < M.shape[1]:
        V, U, values = _by_gram(M.T)
    else:
        U, V, values = _by_gram(M)
    signs = V.gather(0, V.abs().argmax(0, keepdim=True)).sign()
    return Directions(U * signs, V * signs, values)


def _by_gram(tall: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decompose a matrix with at least as many rows as columns: left and right vectors, and singular values."""
    right = torch.linalg.eigh(tall.T @ tall).eigenvectors
    scaled = tall @ right  # left vectors times singular values, whose norms are more exact than roots of eigenvalues
    values, order = scaled.norm(dim=0).sort(descending=True, stable=True)
    # Householder's QR leaves orthogonal columns as they are but for signs, and completes those that are zero
    left, triangle = torch.linalg.qr(scaled[:, order])
    signs = torch.where(triangle.diagonal() < 0, -1.0, 1.0).to(left)
    return left * signs, right[:, order], values


@torch.no_grad()
def power_directions(matrix: Tensor) -> PowerBasis:
    """Compute one power step from each coordinate axis: FILet's directions, as its published code has them.

    ``V`` are the columns of ``W^T W`` and ``U`` those of ``W V``, each scaled to length 1: ``K = I`` candidates, which
    are not orthogonal. Nothing of size ``[I, I]`` is formed where ``O < I``.

    Args:
        matrix: ``W [O, I]``, floating.

    Returns:
        The basis, in float32 (float64 for a float64 matrix) on the matrix's device.
    """
    W = matrix.detach().to(accumulates_in(matrix.dtype))
    O, I = W.shape
    if O <= I:
        gram = W @ W.T
        products = gram @ W  # W W^T W
        lengths = (W * products).sum(0)  # |W^T w_k|^2 = w_k^T W W^T w_k
    else:
        gram = W.T @ W
        products = W @ gram
        lengths = gram.square().sum(0)
    return PowerBasis(_unit(products), W * _inverse(lengths.clamp_min(0).sqrt()), W)


def _unit(columns: Tensor) -> Tensor:
    return columns * _inverse(columns.norm(dim=0))


def _inverse(lengths: Tensor) -> Tensor:
    """Invert, with zero for zero: a column of zeros has no direction."""
    return torch.where(lengths > 0, 1 / lengths, torch.zeros_like(lengths))
