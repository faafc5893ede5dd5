"""A matrix without the smaller part of its singular values."""

from __future__ import annotations

import torch
from torch import Tensor

PART = 8  # an approximation has an eighth of the ranks


def low_rank(matrix: Tensor) -> Tensor:
    """The best approximation of a matrix ``[m, n]`` by an eighth of its ranks, at least one, in its dtype."""
    U, S, Vh = torch.linalg.svd(matrix.detach().double(), full_matrices=False)
    rank = max(1, len(S) // PART)
    return ((U[:, :rank] * S[:rank]) @ Vh[:rank]).to(matrix.dtype)
