"""Groups of a parameter's entries: rows, columns, the whole; their shapes, and sums over them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fishkern.ops.dtypes import accumulates_in

Groups = Literal["row", "column", "tensor"]
"""Entries of a parameter that are summed: those of one index of the first axis; those of one index of all other axes;
all. Each entry of a vector is a row and a column of its own."""

_PIECE = 2**20  # entries of a gradient that are squared at once: 4 MiB, which stay in the caches


def group_shape(shape: torch.Size, by: Groups) -> torch.Size:
    """Shape of the sums over groups of a parameter's entries.

    Args:
        shape: Of the parameter.
        by: Which entries make up a group.

    Returns:
        ``shape[:1]`` by row, ``shape[1:]`` by column, ``[]`` by tensor; the shape of a vector by row and by column.
    """
    if by == "tensor":
        return torch.Size()
    if len(shape) < 2:
        return shape
    return shape[:1] if by == "row" else shape[1:]


def group_sums(squares: Tensor, by: Groups) -> Tensor:
    """Sum a tensor of a parameter's shape over groups of its entries.

    Args:
        squares: Of the parameter's shape.
        by: Which entries make up a group.

    Returns:
        Of :func:`group_shape`.
    """
    if by == "tensor":
        return squares.sum()
    if squares.ndim < 2:
        return squares
    return squares.flatten(1).sum(1) if by == "row" else squares.sum(0)


def group_squares(grad: Tensor, by: Groups) -> Tensor:
    """Sum the squares of a gradient over groups of its entries, one piece at a time.

    Args:
        grad: Of the parameter's shape.
        by: Which entries make up a group.

    Returns:
        Of :func:`group_shape`, float32 (float64 for float64).
    """
    if grad.ndim < 2 or not grad.numel():
        return group_sums(grad.to(accumulates_in(grad.dtype)).square(), by)
    pieces = grad.split(max(1, _PIECE // grad[0].numel()))
    sums = [group_sums(piece.to(accumulates_in(grad.dtype)).square(), by) for piece in pieces]
    return torch.cat(sums) if by == "row" else torch.stack(sums).sum(0)
