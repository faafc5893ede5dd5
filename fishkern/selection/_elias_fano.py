"""Index lists in the code of Elias and Fano: about ``2 + log2(P / K)`` bits for each of K ascending indices below P.

The ``low`` bits of an index stand as they are. What is above them hardly grows from one index to the next, so it is
written as steps: in a row of bits the one of index number ``i`` is at ``(index >> low) + i``. See P. Elias, "Efficient
Storage and Retrieval by Content and Address of Static Files", J. ACM 21 (1974).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fishkern.files import PIECE
from fishkern.ops.streaming_topk import index_dtype
from fishkern.selection._packed import packed, unpacked


def low_bits(count: int, numel: int) -> int:
    """Choose how many bits of an index stand as they are.

    Args:
        count: K, at least 1.
        numel: P.

    Returns:
        ``floor(log2(P / K))``, with which the code is smallest up to a small part of a bit.
    """
    return (numel // count).bit_length() - 1


def coded_size(count: int, numel: int, low: int) -> int:
    """Give the length of the code.

    Args:
        count: K.
        numel: P.
        low: How many bits of an index stand as they are.

    Returns:
        Bytes.
    """
    return _steps_size(count, numel, low) + low * -(-count // 8)


def coded(indices: Tensor, numel: int, low: int) -> Tensor:
    """Code a list of indices.

    Args:
        indices: ``[K]``, ascending and distinct, below ``numel``.
        numel: P.
        low: How many bits of an index stand as they are.

    Returns:
        ``[coded_size]``, uint8: the row of steps, then ``low`` rows of K bits, the lowest bit of all indices first. In
        every row, bit ``i`` is bit ``i % 8`` (the lowest is 0) of byte ``i // 8``.
    """
    code = torch.empty(coded_size(len(indices), numel, low), dtype=torch.uint8)
    steps, rows = _parts(code, len(indices), numel, low)
    bits = (numel >> low) + len(indices) + 1
    steps.copy_(packed((indices >> low).to(index_dtype(bits)) + _numbers(indices, bits), bits))
    for start in range(0, len(indices), PIECE):
        piece = indices[start : start + PIECE]
        for bit, row in enumerate(rows):
            ones = torch.nn.functional.pad((piece >> bit) & 1, (0, -len(piece) % 8)).to(torch.uint8)
            row[start // 8 :][: len(ones) // 8] = (ones.view(-1, 8) << _shifts()).sum(1, dtype=torch.uint8)
    return code


def decoded(code: Tensor, count: int, numel: int, low: int) -> Tensor:
    """Undo :func:`coded`.

    Args:
        code: ``[coded_size]``, uint8.
        count: K.
        numel: P.
        low: As it was coded.

    Returns:
        ``[K]``, ascending, of the smallest dtype for indices below P.

    Raises:
        ValueError: It is not the code of that many ascending indices below P.
    """
    steps, rows = _parts(code, count, numel, low)
    bits = (numel >> low) + count + 1
    high = unpacked(steps, index_dtype(bits))
    if len(high) != count:
        raise ValueError(f"{len(high)} steps are coded for {count} indices")
    dtype = index_dtype(numel)
    indices = (high - _numbers(high, bits)).to(dtype) << low
    for bit, row in enumerate(rows):
        for number, piece in enumerate(row.split(PIECE)):
            ones = ((piece[:, None] >> _shifts()) & 1).view(-1).to(dtype)
            part = indices[number * PIECE * 8 :][: len(ones)]
            if ones[len(part) :].any():
                raise ValueError(f"more than {count} indices are coded")
            part |= ones[: len(part)] << bit
    if count and not (bool((indices[1:] > indices[:-1]).all()) and 0 <= int(indices[0]) <= int(indices[-1]) < numel):
        raise ValueError(f"what is coded is no list of ascending indices below {numel}")
    return indices


def _steps_size(count: int, numel: int, low: int) -> int:
    return -(-((numel >> low) + count + 1) // 8)


def _parts(code: Tensor, count: int, numel: int, low: int) -> tuple[Tensor, Tensor]:
    """Give the steps ``[bytes]`` and the rows of single bits ``[low, bytes]``, as views."""
    steps = _steps_size(count, numel, low)
    return code[:steps], code[steps:].view(low, -(-count // 8))


def _numbers(indices: Tensor, bits: int) -> Tensor:
    return torch.arange(len(indices), dtype=index_dtype(bits))


def _shifts() -> Tensor:
    return torch.arange(8, dtype=torch.uint8)
