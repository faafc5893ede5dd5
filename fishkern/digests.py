"""Short digests of tensors, by which values are recognised: to rounding, or to the bit."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fishkern.steps import Step, in_one_step

# An SVD that another number of threads computes, or a cast to bfloat16, moves the digest less; other values move it by
# about the norm of the tensor.
_TOLERANCE = 1e-2
_PIECE = 2**20  # entries in float64 at a time


def _described(tensor: Tensor) -> Step:
    """Describe a call: the values and signs of a piece, and one of them once more."""
    return Step((0.0, 0.0), 3 * min(tensor.numel(), _PIECE) * torch.float64.itemsize, 0)


@in_one_step(_described)
@torch.no_grad()
def digest(tensor: Tensor) -> tuple[float, float]:
    """Compute the digest of a tensor: its norm, and its sum under fixed random signs.

    Args:
        tensor: Any floating tensor.

    Returns:
        Both, computed in float64 on the CPU.
    """
    return digest_of_pieces(tensor.detach().flatten().split(_PIECE))


def digest_of_pieces(pieces: Iterable[Tensor]) -> tuple[float, float]:
    """Compute the digest of a tensor that comes in pieces, such as one of which several ranks hold parts.

    Args:
        pieces: Its entries in row-major order, 2^20 of them in each piece but the last.

    Returns:
        What :func:`digest` gives for the tensor.
    """
    generator = torch.Generator().manual_seed(0)
    squares = signed = 0.0
    for piece in pieces:
        values = piece.double().cpu()
        signs = torch.randint(0, 2, values.shape, generator=generator).mul_(2).sub_(1)
        squares += values.square().sum().item()
        signed += (values @ signs.double()).item()
    return math.sqrt(squares), signed


def agree(actual: Sequence[float], recorded: Sequence[float]) -> bool:
    """Tell whether two digests are of the same values, up to rounding to 16 bits.

    Args:
        actual: A digest.
        recorded: The digest to compare with.

    Returns:
        Whether they differ by at most 1 % of the recorded norm.
    """
    return max(abs(actual[0] - recorded[0]), abs(actual[1] - recorded[1])) <= _TOLERANCE * recorded[0]


def difference(actual: Sequence[float], recorded: Sequence[float]) -> str:
    """Say how two digests differ, for the message about values that are not the recorded ones.

    Args:
        actual: A digest.
        recorded: The digest to compare with.

    Returns:
        ``"had norm 1.5 and has 2 (sums under random signs 0.5 and -0.25)"``.
    """
    return (
        f"had norm {recorded[0]:.6g} and has {actual[0]:.6g} (sums under random signs {recorded[1]:.6g} and "
        f"{actual[1]:.6g})"
    )


@torch.no_grad()
def exact_digest(tensor: Tensor) -> bytes:
    """Compute a digest of a tensor's dtype, shape and bits: any change of a value is another digest.

    Args:
        tensor: Dense, of any dtype and on any device; it is copied to the CPU.

    Returns:
        16 bytes.
    """
    values = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    hashed = hashlib.blake2b(repr((tensor.dtype, tuple(tensor.shape))).encode(), digest_size=16)
    hashed.update(values.flatten().view(torch.uint8).numpy())
    return hashed.digest()
