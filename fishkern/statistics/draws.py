"""Random numbers that belong to an example, whatever batch it comes in and whatever device it lies on."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor


def stream(*key: Any) -> torch.Generator:
    """Start the stream of random numbers that a key stands for, the same on every machine.

    Args:
        key: What the numbers belong to, such as a seed and an example's place in the data.

    Returns:
        The generator, on the CPU.
    """
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big", signed=True))


def uniform(seed: int, draw: int, examples: range, size: int) -> Tensor:
    """Draw numbers that belong to an example, whatever batch it comes in and whatever device it lies on.

    Args:
        seed: Seed of the estimator.
        draw: Which draw.
        examples: Places of the examples in the whole data.
        size: How many numbers for each example; a longer row of numbers begins with a shorter one.

    Returns:
        Uniform in [0, 1), ``[N, size]``, float64 on the CPU.
    """
    rows = []
    for example in examples:
        rows.append(torch.rand(size, generator=stream(seed, draw, example), dtype=torch.float64))
    return torch.stack(rows)
