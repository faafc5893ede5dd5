"""Magnitudes of floating values as integers of the same order: bounds on them, and how many lie below each.

The key of a value is the bit pattern of its magnitude. Infinity has the largest key but for NaN's, which are larger.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

NOT_FINITE = "a value is NaN or infinite, which no histogram has a place for: look at the loss of the model."

_PIECE, _PIECE_ON_GPU = 2**20, 2**26  # values that are worked on at once
_FEW = 2**16  # values that are compared with every bound, rather than counted by cells first
_CELL_BITS = 15  # leading bits of a key, the sign left out, that all values of a cell share: 128 cells for a power of 2
_MARGIN = 1e-6  # relative error of a first guess, more than the rounding of float32


def key_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the keys of values of a dtype.

    Args:
        dtype: Floating.

    Returns:
        int64 for float64, else int32: narrower values are keyed as float32, which holds them exactly.
    """
    return torch.int64 if dtype == torch.float64 else torch.int32


def keys_of(values: Tensor) -> Iterator[Tensor]:
    """Go through the keys of values, piece by piece.

    Args:
        values: Floating, any shape.

    Yields:
        ``[n]``, int32 or int64, the keys of neighbouring values.
    """
    integer = key_dtype(values.dtype)
    floating = torch.float64 if integer == torch.int64 else torch.float32
    flat = values.detach().reshape(-1)
    for part in flat.split(_PIECE if flat.device.type == "cpu" else _PIECE_ON_GPU) if len(flat) else ():
        yield part.to(floating).view(integer) & torch.iinfo(integer).max


def values_of(keys: Tensor) -> Tensor:
    """Return the magnitudes of keys.

    Args:
        keys: int32 or int64.

    Returns:
        The same shape, float32 or float64.
    """
    return keys.view(torch.float64 if keys.dtype == torch.int64 else torch.float32)


def keys_reaching(
    edges: Tensor, of: Callable[[Tensor], Tensor], about: Tensor, integer: torch.dtype, *, closed: bool = True
) -> Tensor:
    """Find the smallest keys whose magnitudes a rising function brings to some edges.

    With them, values are compared with edges without evaluating the function for each, and exactly as if it were.

    Args:
        edges: ``[E]``, float64, on the CPU.
        of: From magnitudes to float64, elementwise.
        about: ``[E]``, float64: magnitudes which it brings close to the edges. They only make it faster.
        integer: Of the keys.
        closed: Whether to find for the last edge what exceeds it, as for the last bin of a histogram.

    Returns:
        ``[E]``; one above infinity's where that does not reach the edge either.
    """
    exceeds = torch.zeros(len(edges), dtype=torch.bool)
    exceeds[-1] = closed

    def reached(keys: Tensor) -> Tensor:
        values = of(values_of(keys))
        return torch.where(exceeds, values > edges, values >= edges)

    floating = torch.float64 if integer == torch.int64 else torch.float32
    beyond = torch.full_like(edges, torch.inf, dtype=floating).view(integer) + 1
    low, high = ((about * factor).to(floating).view(integer) for factor in (1 - _MARGIN, 1 + _MARGIN))
    low, high = torch.where(reached(low), 0, low), torch.where(reached(high), high, beyond)
    while bool((low < high).any()):
        middle = low + (high - low) // 2
        yes = reached(middle)
        low, high = torch.where(yes, low, (middle + 1).minimum(high)), torch.where(yes, middle, high)
    return high


def count_below(values: Tensor, keys: Tensor) -> Tensor:
    """Count the values whose keys lie below some keys.

    Values are counted by the leading bits of their keys, in one histogram. Only those whose leading bits are those of
    one of ``keys`` are compared with them.

    Args:
        values: Floating, any shape.
        keys: ``[E]``, ascending, of the dtype of the values' keys.

    Returns:
        ``[E]``, int64.
    """
    below = torch.zeros(len(keys) + 1, dtype=torch.int64, device=keys.device)
    if values.numel() <= _FEW:
        for part in keys_of(values):
            below += _places(part, keys)
        return below.cumsum(0)[:-1]
    cells, shift = 2**_CELL_BITS, 8 * keys.dtype.itemsize - 1 - _CELL_BITS
    cell_of_keys = (keys >> shift).long()
    in_cells = torch.zeros(cells, dtype=torch.int64, device=keys.device)
    shared = torch.zeros(cells, dtype=torch.bool, device=keys.device)
    shared[cell_of_keys] = True
    for part in keys_of(values):
        cell = part >> shift
        in_cells += torch.bincount(cell, minlength=cells)
        below += _places(part[shared[cell]], keys)
    return in_cells.masked_fill_(shared, 0).cumsum(0)[cell_of_keys] + below.cumsum(0)[:-1]


def _places(part: Tensor, keys: Tensor) -> Tensor:
    """Count by how many of ``keys`` are not above a value's."""
    return torch.bincount(torch.bucketize(part, keys, right=True), minlength=len(keys) + 1)


def magnitudes_at(pool: Sequence[Tensor], places: Sequence[int]) -> list[float]:
    """Find the magnitudes that stand at some places when those of all values are in ascending order.

    Few values are sorted. Of many, the keys are counted by 16 bits at a time: exact as well, in two reads of float32
    values and in bounded memory.

    Args:
        pool: Floating, any shapes, of one dtype, which together are the values.
        places: From 0, below the number of values.

    Returns:
        The magnitude at each place.

    Raises:
        ValueError: A value is NaN or infinite, or dtypes differ, whose keys cannot be compared.
    """
    if len(dtypes := {values.dtype for values in pool}) > 1:
        raise ValueError(f"values must be of one dtype, got {' and '.join(sorted(map(str, dtypes)))}: cast them.")
    integer = key_dtype(pool[0].dtype)
    infinity = torch.full((), torch.inf, dtype=torch.float64 if integer == torch.int64 else torch.float32)
    if sum(values.numel() for values in pool) <= _FEW:
        keys = torch.cat([part.cpu() for values in pool for part in keys_of(values)]).sort().values
        if int(keys[-1]) >= int(infinity.view(integer)):
            raise ValueError(NOT_FINITE)
        return values_of(keys[torch.tensor(places)]).tolist()
    below, prefixes = list(places), [0] * len(places)  # the place among the keys that begin with a prefix
    first = 8 * integer.itemsize - 16
    for shift in range(first, -1, -16):
        counts = {prefix: torch.zeros(2**16, dtype=torch.int64, device=pool[0].device) for prefix in prefixes}
        for part in (part for values in pool for part in keys_of(values)):
            for prefix, count in counts.items():
                own = part if shift == first else part[part >> shift >> 16 == prefix]
                count += torch.bincount(own >> shift & 0xFFFF, minlength=2**16)
        sums = {prefix: count.cpu().cumsum(0) for prefix, count in counts.items()}
        if shift == first:
            digit = int(infinity.view(integer)) >> shift
            if int(sums[0][-1]) > int(sums[0][digit - 1]):
                raise ValueError(NOT_FINITE)
        for n, prefix in enumerate(prefixes):
            digit = int(torch.searchsorted(sums[prefix], below[n], right=True))
            below[n] -= int(sums[prefix][digit - 1]) if digit else 0
            prefixes[n] = prefix << 16 | digit
    return values_of(torch.tensor(prefixes, dtype=integer)).tolist()
