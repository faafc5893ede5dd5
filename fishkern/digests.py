"""Short digests of tensors, by which files recognise the values that they belong to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# An SVD that another number of threads computes, or a cast to bfloat16, moves the digest less; other values move it by
# about the norm of the tensor.
_TOLERANCE = 1e-2
_PIECE = 2**22  # entries at a time, so that the copy in float64 of a large matrix takes no memory


@torch.no_grad()
def digest(tensor: Tensor) -> tuple[float, float]:
    """Compute the digest of a tensor: its norm, and its sum under fixed random signs.

    Args:
        tensor: Any floating tensor.

    Returns:
        Both, computed in float64 on the CPU.
    """
    generator = torch.Generator().manual_seed(0)
    squares = signed = torch.zeros((), dtype=torch.float64)
    for piece in tensor.detach().flatten().split(_PIECE):
        values = piece.to("cpu", torch.float64)
        signs = torch.randint(0, 2, values.shape, generator=generator, dtype=torch.float64).mul_(2).sub_(1)
        squares, signed = squares + values.square().sum(), signed + values @ signs
    return squares.sqrt().item(), signed.item()


def agree(found: Sequence[float], recorded: Sequence[float]) -> bool:
    """Tell whether two digests are of the same values, up to rounding to 16 bits.

    Args:
        found: A digest.
        recorded: The digest to compare with.

    Returns:
        Whether they differ by at most 1 % of the recorded norm.
    """
    return max(abs(found[0] - recorded[0]), abs(found[1] - recorded[1])) <= _TOLERANCE * recorded[0]
