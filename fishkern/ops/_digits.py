"""The ``n``-th largest of values that can be read more than once, found by counting their digits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

_DIGIT = 16  # bits of a key that one histogram resolves

Walk = Callable[[], Iterable[Tensor]]
Total = Callable[[Callable[[], Tensor]], Tensor]
"""Counts, and adds up what every process that holds some of the values has counted."""


def alone(count: Callable[[], Tensor]) -> Tensor:
    """Count as the one process that holds all of the values.

    Args:
        count: Counts.

    Returns:
        The counts.
    """
    return count()


def nth_largest(walk: Walk, n: int, dtype: torch.dtype, *, total: Total = alone) -> float:
    """Find the ``n``-th largest of many values, using one histogram per 16 bits, without copying or sorting.

    Args:
        walk: Starts a pass over all values, tensors ``[any]`` without NaN; called twice, for float64 four times.
        n: Which, from 1 to their number.
        dtype: Of the values, float32 or float64.
        total: How histograms are counted, where each process walks over some of the values.

    Returns:
        The value.
    """
    value, _ = around_nth_largest(walk, n, dtype, bits=8 * dtype.itemsize, total=total)
    return value


def nth_smallest_index(walk: Walk, n: int, numel: int, *, total: Total = alone) -> int:
    """Find the ``n``-th smallest of many indices into a tensor.

    Args:
        walk: Starts a pass over all indices, tensors ``[any]``, int64; called once for every 16 bits of ``numel``.
        n: Which, from 1 to their number.
        numel: More than any index.
        total: As for :func:`nth_largest`.

    Returns:
        The index.
    """
    width = _DIGIT * -(-(numel.bit_length() + 1) // _DIGIT)
    return -1 - _leading_bits(lambda: (-1 - indices for indices in walk()), n, width, width, total)


def around_nth_largest(
    walk: Walk, n: int, dtype: torch.dtype, *, bits: int, total: Total = alone
) -> tuple[float, float]:
    """Find the smallest and the largest value that share their leading bits with the ``n``-th largest.

    Args:
        walk: As for :func:`nth_largest`; called once for every 16 of ``bits``.
        n: As for :func:`nth_largest`.
        dtype: As for :func:`nth_largest`.
        bits: A multiple of 16. Sign, exponent and 7 bits of the mantissa are the first 16 of a float32.
        total: As for :func:`nth_largest`.

    Returns:
        Both ends.
    """
    width = 8 * dtype.itemsize
    first = _leading_bits(lambda: map(ordered_keys, walk()), n, width, bits, total) << (width - bits)
    low, high = _value(first, dtype), _value(first + (1 << (width - bits)) - 1, dtype)
    return (-math.inf if math.isnan(low) else low), (math.inf if math.isnan(high) else high)  # beyond the infinities


def _leading_bits(walk: Walk, n: int, width: int, bits: int, total: Total) -> int:
    """Find the leading bits of the ``n``-th largest of signed keys of some width."""
    prefix = None
    for shift in range(width - _DIGIT, width - bits - 1, -_DIGIT):
        counts = total(partial(_counts, walk, shift, prefix))
        reached = counts.flip(0).cumsum(0)  # from the largest digit downwards
        place = int(torch.searchsorted(reached, n))
        n -= int(reached[place - 1]) if place else 0
        digit = 2**_DIGIT - 1 - place
        prefix = digit - 2 ** (_DIGIT - 1) if prefix is None else prefix * 2**_DIGIT + digit
    return prefix


def _counts(walk: Walk, shift: int, prefix: int | None) -> Tensor:
    """Count the keys that begin with ``prefix`` by their next digit, ``[2^16]``, on the CPU."""
    counts = torch.zeros(2**_DIGIT, dtype=torch.int64, device="cpu")
    for keys in walk():
        keys = keys >> shift
        # the first digit has the sign, so that its histogram begins at the most negative one
        digits = keys + 2 ** (_DIGIT - 1) if prefix is None else keys[keys >> _DIGIT == prefix] & (2**_DIGIT - 1)
        counts += torch.bincount(digits, minlength=2**_DIGIT).cpu()
    return counts


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
    bits = torch.tensor(key if key >= 0 else key ^ torch.iinfo(integer).max, dtype=integer, device="cpu")
    return bits.view(dtype).item()
