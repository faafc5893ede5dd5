"""Scores in many tensors, read and sampled as if they were one."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, cycle

import numpy as np
import torch
from torch import Tensor

from fishkern.files import AnyTensor, StoredTensor
from fishkern.ops._threads import ALONE

# A piece takes two dozen calls, and at each of them threads may wait for Python's lock: one that exceeds the cache is
# quicker. One from a disk comes through the cache, and should still be there.
_PIECE, _PIECE_ON_DISK, _PIECE_ON_GPU = 2**22, 2**20, 2**26
# Small blocks, also stored ones, share a piece, so that 100 000 of them do not become 100 000 pieces.
_SMALL, _PACKED = 2**16, 2**20
# A sample consists of runs of neighbours: about what one random access to memory, or one to a disk, fetches.
_RUN, _RUN_ON_DISK, _MOST_RUNS_ON_DISK = 16, 1024, 4096


class NaNScoreError(ValueError):
    """A score is NaN, which has no rank.

    Args:
        block: Number of its block.
        index: Its flat index there.
    """

    def __init__(self, block: int, index: int) -> None:
        super().__init__(f"blocks[{block}] holds NaN at flat index {index}, which has no rank: clean the scores first.")
        self.block, self.index = block, index


@dataclass(frozen=True)
class Piece:
    """Some neighbouring scores.

    Attributes:
        block: Number of their block, or of the first one.
        offset: Flat index of the first score in that block.
        values: ``[n]``, of the dtype of the block, or of one that holds those of all its blocks.
        bounds: Where each of several whole blocks ends in ``values``, int64; ``None`` for a part of one block.
    """

    block: int
    offset: int
    values: Tensor
    bounds: np.ndarray | None = None

    def place(self, index: int) -> tuple[int, int]:
        """Locate one score: its block, and its flat index there.

        Args:
            index: Index into :attr:`values`.

        Returns:
            The number of the block and the index in it.
        """
        if self.bounds is None:
            return self.block, self.offset + index
        ends = self.bounds.tolist()
        number = bisect_right(ends, index)
        return self.block + number, index - (ends[number - 1] if number else 0)


def refuse_nan(piece: Piece) -> None:
    """Raise if a score has no rank.

    Args:
        piece: Some scores.

    Raises:
        NaNScoreError: One of them is NaN; the first is named.
    """
    if (nan := piece.values.isnan()).any():
        raise NaNScoreError(*piece.place(int(nan.nonzero()[0])))


class Scores:
    """Blocks of scores in a row.

    Attributes:
        numels: How many scores each block has.
        total: How many there are.
        on_disk: Whether any of them are on disk.
        in_memory: Whether all of them are in the memory of the CPU.
        dtype: float32 or float64, which holds every block's values exactly.

    Args:
        blocks: Floating tensors of any shapes, dtypes and devices, in memory or on disk.

    Raises:
        TypeError: A block is something else.
    """

    def __init__(self, blocks: Sequence[AnyTensor]) -> None:
        for number, block in enumerate(blocks):
            if not isinstance(block, Tensor | StoredTensor):
                raise TypeError(f"blocks must be tensors, in memory or stored; blocks[{number}] is {type(block)}.")
            if not block.dtype.is_floating_point or block.dtype.itemsize < 2:
                raise TypeError(
                    f"scores must be float64, float32, bfloat16 or float16; blocks[{number}] is {block.dtype}: cast it."
                )
        self.blocks = [block.detach() if isinstance(block, Tensor) else block for block in blocks]
        self.numels = [block.numel() for block in blocks]
        self.total = sum(self.numels)
        self.on_disk = any(isinstance(block, StoredTensor) for block in blocks)
        self.in_memory = not self.on_disk and all(block.device.type == "cpu" for block in blocks)
        double = any(block.dtype == torch.float64 for block in blocks)
        self.dtype = torch.float64 if double else torch.float32

    def pieces(self) -> Iterator[Piece]:
        """Go through all scores once, in order.

        Where a block is on disk, a piece is valid until the next one is requested; the next one is read meanwhile.

        Yields:
            The pieces.
        """
        yield from _read_ahead(self._pieces()) if self.on_disk else self._pieces()

    def _pieces(self) -> Iterator[Piece]:
        # One is filled while the other is worked on, across blocks; 8 bytes are the largest dtype.
        buffers = cycle([bytearray(8 * _PIECE_ON_DISK) for _ in range(2)] if self.on_disk else [])
        waiting: list[Tensor] = []  # small neighbours on one device
        first = joined = 0  # number of the first of them, and the scores in all
        for number, block in enumerate(self.blocks):
            size = _PIECE if block.device.type == "cpu" else _PIECE_ON_GPU
            small = block.numel() <= _SMALL
            if waiting and (not small or joined + block.numel() > _PACKED or waiting[0].device != block.device):
                yield self._joined(first, waiting)
                waiting = []
            if small:
                first, joined = (first, joined) if waiting else (number, 0)
                waiting.append((block.read() if isinstance(block, StoredTensor) else block).reshape(-1))
                joined += block.numel()
                continue
            offset = 0
            if isinstance(block, StoredTensor):
                parts = block.pieces(_PIECE_ON_DISK, buffers=buffers)
            else:
                parts = _split(block, size)
            for part in parts:
                yield Piece(number, offset, part)
                offset += len(part)
        if waiting:
            yield self._joined(first, waiting)

    def _joined(self, first: int, flats: list[Tensor]) -> Piece:
        bounds = np.array(list(accumulate(map(len, flats))))
        return Piece(first, 0, torch.cat(flats), bounds)

    def sample(self, size: int) -> Tensor:
        """Read runs of neighbours, spread evenly over all scores; the same ones whenever it is called.

        Args:
            size: About how many scores.

        Returns:
            ``[runs, length]``, one run in a row, on the CPU; shorter runs end in NaN.
        """
        on_disk = self.on_disk
        length = _RUN_ON_DISK if on_disk else _RUN
        runs = max(1, min(size, self.total) // length)
        runs = min(runs, _MOST_RUNS_ON_DISK) if on_disk else runs
        cpu = torch.device("cpu")  # which need not be the default
        generator = torch.Generator(cpu).manual_seed(0)
        stride = self.total / runs
        offsets = torch.rand(runs, generator=generator, dtype=torch.float64, device=cpu)
        starts = (torch.arange(runs, device=cpu) + offsets) * stride
        starts = starts.long().clamp_(max=self.total - 1)
        ends = torch.tensor(list(accumulate(self.numels)), device=cpu)
        numbers = torch.searchsorted(ends, starts, right=True)
        rows = torch.full((runs, length), torch.nan, dtype=self.dtype, device=cpu)
        row = 0
        for number, count in zip(*(t.tolist() for t in numbers.unique_consecutive(return_counts=True)), strict=True):
            inside = starts[row : row + count] - (ends[number] - self.numels[number])
            width = min(length, self.numels[number])
            inside.clamp_(max=self.numels[number] - width)
            rows[row : row + count, :width] = _runs(self.blocks[number], inside, width)
            row += count
        return rows


def floats(values: Tensor, dtype: torch.dtype) -> np.ndarray | Tensor:
    """Widen scores, in the caller's thread alone where they are on the CPU.

    Args:
        values: ``[n]``, on any device.
        dtype: float32 or float64.

    Returns:
        An array for what is on the CPU, which is a view where the dtype is that already, and a tensor for the rest.
    """
    if values.device.type != "cpu":
        return values.to(dtype)
    if values.dtype is dtype and not values.is_neg():
        return values.numpy()
    wide = torch.empty(len(values), dtype=dtype, device="cpu")
    for part, own in zip(wide.split(ALONE), values.split(ALONE), strict=True):
        part.copy_(own)
    return wide.numpy()


def _read_ahead(pieces: Iterator[Piece]) -> Iterator[Piece]:
    with ThreadPoolExecutor(1, "fishkern-read") as reader:
        coming = reader.submit(next, pieces, None)
        while (piece := coming.result()) is not None:
            coming = reader.submit(next, pieces, None)
            yield piece


def _split(block: Tensor, size: int) -> Iterator[Tensor]:
    if block.numel():
        yield from block.reshape(-1).split(size)


def _runs(block: AnyTensor, starts: Tensor, width: int) -> Tensor:
    """Read ``width`` neighbours from each start."""
    if isinstance(block, StoredTensor):
        return torch.stack([next(block.pieces(width, start=start)) for start in starts.tolist()])
    places = (starts[:, None] + torch.arange(width, device=starts.device)).to(block.device)
    if block.is_contiguous():
        return block.view(-1)[places].cpu()
    return block[torch.unravel_index(places, block.shape)].cpu()
