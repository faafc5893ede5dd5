"""The ``n``-th largest of values that can be read more than once, found by counting their digits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

_DIGIT = 16  # bits of a key that one histogram resolves

Walk = Callable[[], Iterable[Tensor]]


def nth_largest(walk: Walk, n: int, dtype: torch.dtype) -> float:
    """Find the ``n``-th largest of many values, using one histogram per 16 bits, without copying or sorting.

    Args:
        walk: Starts a pass over all values, tensors ``[any]`` without NaN; called twice, for float64 four times.
        n: Which, from 1 to their number.
        dtype: Of the values, float32 or float64.

    Returns:
        The value.
    """
    value, _ = around_nth_largest(walk, n, dtype, bits=8 * dtype.itemsize)
    return value


def around_nth_largest(walk: Walk, n: int, dtype: torch.dtype, *, bits: int) -> tuple[float, float]:
    """Find the smallest and the largest value that share their leading bits with the ``n``-th largest.

    Args:
        walk: As for :func:`nth_largest`; called once for every 16 of ``bits``.
        n: As for :func:`nth_largest`.
        dtype: As for :func:`nth_largest`.
        bits: A multiple of 16. Sign, exponent and 7 bits of the mantissa are the first 16 of a float32.

    Returns:
        Both ends.
    """
    prefix, width = None, 8 * dtype.itemsize
    for shift in range(width - _DIGIT, width - bits - 1, -_DIGIT):
        counts = torch.zeros(2**_DIGIT, dtype=torch.int64)
        for values in walk():
            counts += _histogram(values, shift, prefix).cpu()
        reached = counts.flip(0).cumsum(0)  # from the largest digit downwards
        place = int(torch.searchsorted(reached, n))
        n -= int(reached[place - 1]) if place else 0
        digit = 2**_DIGIT - 1 - place
        # keys are signed, and the histogram of the first digit begins at the most negative one
        prefix = digit - 2 ** (_DIGIT - 1) if prefix is None else prefix * 2**_DIGIT + digit
    first = prefix << (width - bits)
    low, high = _value(first, dtype), _value(first + (1 << (width - bits)) - 1, dtype)
    return (-math.inf if math.isnan(low) else low), (math.inf if math.isnan(high) else high)  # beyond the infinities


def _histogram(values: Tensor, shift: int, prefix: int | None) -> Tensor:
    """Count the keys that begin with ``prefix`` by their next digit."""
    keys = ordered_keys(values) >> shift
    if prefix is None:
        return torch.bincount(keys + 2 ** (_DIGIT - 1), minlength=2**_DIGIT)
    return torch.bincount(keys[keys >> _DIGIT == prefix] & (2**_DIGIT - 1), minlength=2**_DIGIT)


def ordered_keys(values: Tensor) -> Tensor:
    """Map floats to integers of the same order, and both zeros to one.

    Args:
        values: float32 or float64, without NaN.

    Returns:
        int32 or int64, of the same shape.
    """
    integer = torch.int64 if values.dtype == torch.float64 else torch.int32
    bits = (values + 0.0).view(integer)
    # of two negative floats the one with the larger bits is smaller: all bits but the sign are flipped
    return bits ^ (bits >> (8 * integer.itemsize - 1) & torch.iinfo(integer).max)


def _value(key: int, dtype: torch.dtype) -> float:
    integer = torch.int64 if dtype == torch.float64 else torch.int32
    bits = torch.tensor(key if key >= 0 else key ^ torch.iinfo(integer).max, dtype=integer)
    return bits.view(dtype).item()
