"""The order in which training sees its rows: the same for all arms of a seed."""

from __future__ import annotations

import torch


def shuffled(count: int, batch_size: int, epochs: int, seed: int) -> list[list[int]]:
    """The numbers of the rows of each step; each pass over them has an order of its own.

    Args:
        count: Training rows.
        batch_size: Rows in a step; the last one of a pass may have fewer.
        epochs: Passes.
        seed: Of the orders.
    """
    draws = torch.Generator().manual_seed(seed)
    passes = [torch.randperm(count, generator=draws) for _ in range(epochs)]
    return [rows.tolist() for order in passes for rows in order.split(batch_size)]
