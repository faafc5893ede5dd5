"""Index lists as bits, one for each coordinate: smaller than int32 indices above a density of 1/32."""

from __future__ import annotations

import torch
from torch import Tensor

from fishkern.files import PIECE


def packed(indices: Tensor, numel: int) -> Tensor:
    """Pack a list of indices.

    Args:
        indices: ``[K]``, distinct, below ``numel``.
        numel: How many bits.

    Returns:
        ``[ceil(numel / 8)]``, uint8; index ``i`` is bit ``i % 8`` (the lowest is 0) of byte ``i // 8``.
    """
    bits = torch.zeros(-(-numel // 8), dtype=torch.uint8)
    for part in indices.split(PIECE):
        for bit in range(8):  # within one bit, no byte comes twice
            places = part[part % 8 == bit].long() // 8
            bits[places] += 1 << bit
    return bits


def unpacked(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Undo :func:`packed`.

    Args:
        bits: ``[bytes]``, uint8.
        dtype: Of the indices.

    Returns:
        ``[K]``, ascending.
    """
    ones = 1 << torch.arange(8, dtype=torch.uint8)
    parts = [torch.empty(0, dtype=dtype)]
    for number, part in enumerate(bits.split(PIECE // 8)):
        places = (part[:, None] & ones).view(-1).nonzero().view(-1) + number * PIECE
        parts.append(places.to(dtype))
    return torch.cat(parts)
