"""Exact sums of scores, which do not depend on the order of adding."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from fishkern.files import AnyTensor, pieces
from fishkern.selection.shards import Shards

# A float64 is an integer of 53 bits times a power of two; its two halves are added up as integers by their exponent,
# which 2^36 summands do not overflow.
_BITS, _LOW = 53, 27
_LEAST_EXPONENT, _MOST_EXPONENT = -1074, 1024


def exact_sum(name: str, score: AnyTensor, indices: Tensor, *, shards: Shards | None = None) -> Fraction:
    """Add up some scores of a parameter.

    Args:
        name: Of the parameter, for the message.
        score: In memory or on disk; read once, in pieces.
        indices: Flat indices of the scores to add, ascending, ``[K]``.
        shards: The scores, if each rank holds a part and lists its own indices; then this is a collective operation.

    Returns:
        The exact sum.

    Raises:
        ValueError: A score is negative or infinite.
    """
    if shards is None:
        return _fraction(_sums(name, score, indices, indices))
    region = shards.regions[name]
    own = indices if region.counted else indices[:0]
    return _fraction(shards.summed(lambda: _sums(name, shards.part(name), region.in_part(own), own)))


def _sums(name: str, score: AnyTensor, places: Tensor, indices: Tensor) -> Tensor:
    """Add up the upper and the lower halves of scores by their exponents.

    Args:
        name: As for :func:`exact_sum`.
        score: Likewise.
        places: Where to read it, ascending, ``[K]``.
        indices: What an error calls these places.

    Returns:
        ``[2, exponents]``.

    Raises:
        ValueError: As there.
    """
    sums = torch.zeros(2, _MOST_EXPONENT - _LEAST_EXPONENT + 1, dtype=torch.int64)
    first = done = 0
    for piece in pieces(score):
        end = int(torch.searchsorted(places, first + len(piece)))
        values = piece[(places[done:end] - first).to(piece.device)].cpu().double()
        if wrong := [*(values < 0).nonzero()[:1], *values.isinf().nonzero()[:1]]:
            at = int(wrong[0])
            raise ValueError(
                f"share='sum' adds up scores, which must be finite and not negative; {name} holds {values[at]:g} at "
                f"flat index {int(indices[done + at])}: take share='count'."
            )
        mantissas, exponents = torch.frexp(values)
        integers = (mantissas * 2.0**_BITS).long()
        places = exponents.long() - _LEAST_EXPONENT
        sums[0].index_add_(0, places, integers >> _LOW)
        sums[1].index_add_(0, places, integers & (1 << _LOW) - 1)
        first, done = first + len(piece), end
    return sums


def _fraction(sums: Tensor) -> Fraction:
    present = sums.any(0).nonzero().view(-1).tolist()
    high, low = sums[:, present].tolist()
    return sum(
        ((h << _LOW) + l) * Fraction(2) ** (place + _LEAST_EXPONENT - _BITS)
        for place, h, l in zip(present, high, low, strict=True)
    ) + Fraction(0)
