"""Random numbers of an example, independent of its batch and device."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor


def stream(*key: Any) -> torch.Generator:
    """Start the stream of random numbers of a key, the same on every machine.

    Args:
        key: Values that identify the stream, such as a seed and an example's index in the data.

    Returns:
        The generator, on the CPU.
    """
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big", signed=True))


def uniform(seed: int, draw: int, examples: range, size: int) -> Tensor:
    """Draw numbers for each example, independent of its batch and device.

    Args:
        seed: Seed of the estimator.
        draw: Number of the draw.
        examples: Indices of the examples in the whole data.
        size: Count of numbers for each example; with a larger size the first numbers stay the same.

    Returns:
        Uniform in [0, 1), ``[N, size]``, float64 on the CPU.
    """
    rows = []
    for example in examples:
        rows.append(torch.rand(size, generator=stream(seed, draw, example), dtype=torch.float64))
    return torch.stack(rows)
