"""In which dtype the operations add up and square."""

from __future__ import annotations

from functools import cache

import torch


@cache
def accumulates_in(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which values of a dtype are multiplied, summed and squared.

    Squares of 16-bit values would underflow, and long sums of them would stop growing.

    Args:
        dtype: A floating dtype.

    Returns:
        float64 for float64, float32 for all others.
    """
    return torch.promote_types(dtype, torch.float32)
