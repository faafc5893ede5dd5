"""Launcher of the Triton kernels of :func:`fishkern.ops.streaming_topk`, for blocks on one GPU.

The scores are cut into chunks, one program each; a table of addresses makes all tensors of one dtype one launch
(:mod:`fishkern.kernels._streaming_topk_device`). A sample gives a bracket, two values that should enclose the ``k``-th
largest. One kernel reads every score once: it writes one bit for each score above the bracket, collects the ones
inside, and counts those equal to its ends, which may be very many (zeros). The host decides among the collected ones;
another kernel selects the first of those equal to an end; the last one writes the indices of all bits that are set.
Only the order of the collected ones in memory depends on scheduling, and they are sorted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import triton.language as tl
from torch import Tensor
from triton import cdiv

from . import _streaming_topk_device as device

# Scores that one program takes: of float32, eight loads of 16 bytes for each of 128 threads.
_CHUNK = 4096
_OPTIONS = {"enable_fp_fusion": True}  # there is nothing to fuse, but Triton 3.9 warns if this is left out
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# The sample: scores from the beginning of evenly spread chunks.
_SAMPLED_CHUNKS, _SAMPLED_SCORES = 8192, 256
# Standard errors between the sample's estimate and either end of the bracket.
_DEVIATIONS = 6.0
# Room for the scores inside the bracket: one place for each so many scores of the call, and at least so many places.
_SCORES_FOR_A_PLACE, _SMALLEST_ROOM = 128, 2**16


@dataclass(frozen=True)
class _OneDtype:
    """The tensors of one dtype, which one launch of a kernel covers.

    Attributes:
        table: ``[4, tensors]``, int64: number of its first chunk in this launch, address, size, place of that chunk
            among all.
        chunks: Number of programs.
        constants: What the kernels are compiled for, and how.
    """

    table: Tensor
    chunks: int
    constants: dict[str, object]


def streaming_topk(blocks: Sequence[Tensor], k: int, *, order: str = "largest") -> list[Tensor]:
    """Launch the kernels; arguments as in :func:`fishkern.ops.streaming_topk`, already checked but for NaN."""
    flats = [block.detach().contiguous().view(-1) for block in blocks]  # reshape(-1) would keep a stride
    dtypes = [torch.int32 if flat.numel() <= 2**31 else torch.int64 for flat in flats]
    if k == 0:
        return [flat.new_empty(0, dtype=dtype) for flat, dtype in zip(flats, dtypes, strict=True)]
    with torch.cuda.device_of(flats[0]):  # Triton launches on the current device
        pool = _Pool(flats, largest=order == "largest")
        bits = pool.select(k)
        indices, counts = pool.emit(bits, torch.int64 if torch.int64 in dtypes else torch.int32)
    parts = indices.split(counts)
    return [part.to(dtype) for part, dtype in zip(parts, dtypes, strict=True)]


class _Pool:
    """The scores of one call, cut into chunks."""

    def __init__(self, flats: list[Tensor], *, largest: bool) -> None:
        self.flats = flats
        self.device = flats[0].device
        self.chunks_of = [cdiv(flat.numel(), _CHUNK) for flat in flats]
        self.chunks = sum(self.chunks_of)
        self.total = sum(flat.numel() for flat in flats)
        self.room = min(self.total, max(_SMALLEST_ROOM, self.total // _SCORES_FOR_A_PLACE))
        self.launches = list(self._launches(largest))

    def _launches(self, largest: bool) -> Iterator[_OneDtype]:
        places = [0, *accumulate(self.chunks_of)]
        for dtype in dict.fromkeys(flat.dtype for flat in self.flats):
            numbers = [n for n, flat in enumerate(self.flats) if flat.dtype == dtype and flat.numel()]
            if not numbers:
                continue
            chunks = [self.chunks_of[n] for n in numbers]
            rows = [
                [0, *accumulate(chunks)][:-1],
                [self.flats[n].data_ptr() for n in numbers],
                [self.flats[n].numel() for n in numbers],
                [places[n] for n in numbers],
            ]
            aligned = all(address % 16 == 0 for address in rows[1])
            constants = {"DTYPE": _DTYPES[dtype], "ALIGNED": aligned, "LARGEST": largest, "CHUNK": _CHUNK}
            yield _OneDtype(torch.tensor(rows, device=self.device), sum(chunks), constants | _OPTIONS)

    def select(self, k: int) -> Tensor:
        """Return the bits of the ``k`` first scores, ``[chunks, CHUNK / 32]``."""
        low, high = self._bracket(k)
        read = self._pass(low, high)
        above, at_high, at_low, nan, inside = read.sums
        if nan:
            raise ArithmeticError("a score is NaN")
        if above > k or above + at_high + inside + at_low < k or inside > self.room:
            low = high = self._bisect(k)  # the sample was not like the scores
            read = self._pass(low, high)
            above, at_high, at_low, _, inside = read.sums
        # Largest first: those above the bracket are selected already, then its upper end, inside, its lower end.
        bits, need = read.bits, k - above
        self._take_ties(bits, read.counts[1], min(need, at_high), high)
        need -= min(need, at_high)
        largest = _first(read.slots[:inside], read.values[:inside], min(need, inside))
        ones = (1 << (largest % 32)).to(torch.int32)  # no slot comes twice, so that adding sets the bits
        bits.view(-1).index_add_(0, largest // 32, ones)
        need -= len(largest)
        self._take_ties(bits, read.counts[2], need, low)
        return bits

    def emit(self, bits: Tensor, dtype: torch.dtype) -> tuple[Tensor, list[int]]:
        """Return the indices in their blocks of all bits that are set, and their number in each block."""
        counts = _popcount(bits).sum(1)
        ends = counts.cumsum(0)
        chunks_of = torch.tensor(self.chunks_of, device=self.device)
        last = chunks_of.cumsum(0)
        firsts = torch.repeat_interleave(last - chunks_of, chunks_of)
        offsets = (torch.arange(self.chunks, device=self.device) - firsts) * _CHUNK
        before = torch.cat([ends.new_zeros(1), ends])
        out = torch.empty(int(ends[-1]), dtype=dtype, device=self.device)
        device.emit_kernel[(self.chunks,)](bits, ends - counts, offsets, out, CHUNK=_CHUNK, **_OPTIONS)
        return out, (before[last] - before[last - chunks_of]).tolist()

    def _pass(self, low: float, high: float) -> _Pass:
        bits = torch.empty(self.chunks, _CHUNK // 32, dtype=torch.int32, device=self.device)
        counts = torch.zeros(4, self.chunks, dtype=torch.int32, device=self.device)
        inside = torch.zeros(1, dtype=torch.int64, device=self.device)
        slots = torch.empty(self.room, dtype=torch.int64, device=self.device)
        values = torch.empty(self.room, dtype=torch.float32, device=self.device)
        for launch in self.launches:
            device.select_kernel[(launch.chunks,)](
                launch.table, bits,
                counts,
                inside, slots, values,
                launch.table.shape[1], self.chunks, self.room,
                low, high,
                **launch.constants,
            )  # fmt: skip
        sums = torch.cat([counts.sum(1, dtype=torch.int64), inside]).tolist()
        return _Pass(counts, sums, bits, slots, values)

    def _take_ties(self, bits: Tensor, ties: Tensor, take: int, end: float) -> None:
        """Set the bits of the first ``take`` scores that equal an end of the bracket."""
        if take == 0:
            return
        before = ties.cumsum(0) - ties
        quotas = (take - before).clamp_(min=0).minimum(ties).to(torch.int32)
        for launch in self.launches:
            device.take_ties_kernel[(launch.chunks,)](
                launch.table, bits, quotas, launch.table.shape[1], end, **launch.constants
            )

    def _bracket(self, k: int) -> tuple[float, float]:
        if self.total <= _SMALLEST_ROOM:
            return -math.inf, math.inf
        rows = []
        for launch in self.launches:
            numbers = self._sampled_chunks(launch)
            out = torch.empty(len(numbers), _SAMPLED_SCORES, device=self.device)
            device.sample_kernel[(len(numbers),)](
                launch.table, numbers, out, launch.table.shape[1], **launch.constants, COUNT=_SAMPLED_SCORES
            )
            rows.append(out)
        values, low, high = _ranked(torch.cat(rows), k / self.total)
        return (
            values[low].item() if low < len(values) else -math.inf,
            values[high].item() if high >= 0 else math.inf,
        )

    def _sampled_chunks(self, launch: _OneDtype) -> Tensor:
        """Return the numbers of the chunks to sample, evenly spread over a launch: all of them where there are few."""
        count = min(max(1, _SAMPLED_CHUNKS * launch.chunks // self.chunks), launch.chunks)
        return torch.arange(count, device=self.device) * launch.chunks // count

    def _bisect(self, k: int) -> float:
        """Find the ``k``-th largest value by counting, one bit of its key for each pass."""
        low, high = _key(-math.inf), _key(math.inf)
        while low < high:
            middle = (low + high + 1) // 2
            value = _value(middle)
            above, at_value, *_ = self._pass(value, value).sums
            low, high = (middle, high) if above + at_value >= k else (low, middle - 1)
        return _value(low)


@dataclass(frozen=True)
class _Pass:
    """The result of reading every score once.

    Attributes:
        counts: ``[4, chunks]``, int32: how many are above the bracket, at its upper end, at its lower end, NaN.
        sums: The same of all chunks together; and, last, how many are inside the bracket.
        bits: ``[chunks, CHUNK / 32]``, int32: set for those above the bracket.
        slots: ``[room]``, int64: of those inside, their places if all chunks have ``CHUNK`` scores; in no fixed order.
        values: ``[room]``, float32: their values, in the same order.
    """

    counts: Tensor
    sums: list[int]
    bits: Tensor
    slots: Tensor
    values: Tensor


def _ranked(rows: Tensor, share: float) -> tuple[Tensor, int, int]:
    """Sort a sample, and find two ranks in it around the last score of this share of all, counted from the largest."""
    # A copy of the function in fishkern/ops/streaming_topk.py, since kernels import nothing of fishkern:
    # tests/kernels/test_streaming_topk.py compares the two.
    values = rows[~rows.isnan()].sort(descending=True).values
    if len(values) == 0:
        return values, 0, -1
    rank = share * len(values)
    above = (rows > values[min(int(rank), len(values) - 1)]).sum(1).double()
    # Neighbours may resemble each other: then whole rows differ by more than independent draws would.
    variance = max(len(rows) * above.var().item() if len(rows) > 1 else 0.0, len(values) * share * (1 - share))
    margin = _DEVIATIONS * math.sqrt(variance) + _DEVIATIONS**2
    return values, math.ceil(rank + margin), min(math.floor(rank - margin), len(values) - 1)


def _first(slots: Tensor, values: Tensor, count: int) -> Tensor:
    """Return the slots of the ``count`` largest values, of equal ones the smaller slots."""
    slots, order = slots.sort()
    return slots[values[order].sort(descending=True, stable=True).indices[:count]]


def _popcount(words: Tensor) -> Tensor:
    """Count the bits of int32 words."""
    words = words - ((words >> 1) & 0x55555555)
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F
    words = words + (words >> 8)
    return (words + (words >> 16)) & 0x3F


def _key(value: float) -> int:
    """Map a float32 to an integer of the same order."""
    bits = int(torch.tensor(value, dtype=torch.float32).view(torch.int32))
    return bits if bits >= 0 else bits ^ 0x7FFFFFFF


def _value(key: int) -> float:
    """Map a key back to its float32."""
    bits = torch.tensor(key if key >= 0 else key ^ 0x7FFFFFFF, dtype=torch.int32)
    return bits.view(torch.float32).item()
