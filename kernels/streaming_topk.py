"""Launcher of the Triton kernels of :func:`fishkern.ops.streaming_topk`, for blocks on one GPU.

The scores are cut into chunks, one program each; a table of addresses makes all tensors of one dtype one launch
(:mod:`fishkern.kernels._streaming_topk_device`). A sample gives a bracket, two values that should enclose the ``k``-th
largest. One kernel reads every score once: it writes one bit for each score above the bracket, lists which words of 32
scores have one inside, and counts those equal to its ends, which may be very many (zeros). The next reads the scores
inside once more, a small part of all. The host decides among them; another kernel selects the first of those equal to
an end; the last one writes the indices of all bits that are set. Only the order of the list depends on scheduling, and
no result on this order: of equal scores, that of the smaller index is selected.

Beside the result it takes one bit for each score, and less than 60 bytes for each one inside the bracket,
most of them to sort these.
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
_WORDS = device.WORDS.value
_OPTIONS = {"enable_fp_fusion": True}  # there is nothing to fuse, but Triton 3.9 warns if this is left out
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# The sample: scores from the beginning of evenly spread chunks.
_SAMPLED_CHUNKS, _SAMPLED_SCORES = 8192, 256
# Standard errors between the sample's estimate and either end of the bracket.
_DEVIATIONS = 6.0
# Room for the words with scores inside the bracket: so many times those expected of the sample, and at least so many.
_ROOM, _SMALLEST_ROOM = 1.5, 2**13
# Up to so many scores no bracket is needed. Words that one program collects.
_FEW_SCORES, _COLLECTED_WORDS = 2**16, 32


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
        bits, selected = pool.select(k)
        indices, counts = pool.emit(bits, selected, torch.int64 if torch.int64 in dtypes else torch.int32)
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
        if self.chunks * _WORDS > 2**31:
            raise ValueError(
                f"the kernel numbers up to 2**31 words of 32 scores, got {self.total} scores: use 'torch'."
            )
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

    def select(self, k: int) -> tuple[Tensor, Tensor]:
        """Select the ``k`` first scores: their bits, ``[chunks, WORDS]``, and their number in each chunk."""
        low, high, expected = self._bracket(k)
        read = self._pass(low, high, self._room(expected))
        slots, values = self._collected(read)
        if not self._encloses(read, len(values), k):
            del read, slots, values  # their memory is for the next
            low = high = self._bisect(k)  # the sample was not like the scores
            read = self._pass(low, high, self._room(0))
            slots, values = self._collected(read)
        # Largest first: those above the bracket are selected already, then its upper end, inside, its lower end.
        bits, counts, need = read.bits, read.above, k - read.sums[0]
        need -= self._take_ties(bits, counts, read.at_high, min(need, read.sums[1]), high)
        largest = _first(slots, values, min(need, len(values)))
        word, bit = _word_and_bit(largest)
        bits.view(-1).index_add_(0, word, (1 << bit).to(torch.int32))  # no slot comes twice: adding sets the bits
        counts.index_add_(0, largest // _CHUNK, torch.ones_like(largest, dtype=torch.int32))
        need -= len(largest)
        self._take_ties(bits, counts, read.at_low, need, low)
        return bits, counts

    def _room(self, expected: float) -> int:
        """Return how many words may have scores inside the bracket, of which so many are expected."""
        return min(self.chunks * _WORDS, max(_SMALLEST_ROOM, int(_ROOM * expected)))

    @staticmethod
    def _encloses(read: _Pass, inside: int, k: int) -> bool:
        above, at_high, at_low, found = read.sums
        return found <= len(read.listed) and above <= k <= above + at_high + inside + at_low

    def emit(self, bits: Tensor, counts: Tensor, dtype: torch.dtype) -> tuple[Tensor, list[int]]:
        """Return the indices in their blocks of all bits that are set, and their number in each block."""
        ends = counts.cumsum(0)
        chunks_of = torch.tensor(self.chunks_of, device=self.device)
        last = chunks_of.cumsum(0)
        firsts = torch.repeat_interleave(last - chunks_of, chunks_of)
        offsets = (torch.arange(self.chunks, device=self.device) - firsts) * _CHUNK
        before = torch.cat([ends.new_zeros(1), ends])
        out = torch.empty(int(ends[-1]), dtype=dtype, device=self.device)
        device.emit_kernel[(self.chunks,)](bits, ends - counts, offsets, out, CHUNK=_CHUNK, **_OPTIONS)
        return out, (before[last] - before[last - chunks_of]).tolist()

    def _pass(self, low: float, high: float, room: int) -> _Pass:
        """Read every score once."""
        bits = torch.empty(self.chunks, _WORDS, dtype=torch.int32, device=self.device)
        above, at_ends = torch.zeros(2, self.chunks, dtype=torch.int32, device=self.device)
        listed, words = torch.empty(2, room, dtype=torch.int32, device=self.device)
        found = torch.zeros(1, dtype=torch.int32, device=self.device)
        until = []
        for launch in self.launches:
            device.select_kernel[(launch.chunks,)](
                launch.table, bits,
                above, at_ends,
                listed, words,
                found,
                launch.table.shape[1], room,
                low, high,
                **launch.constants,
            )  # fmt: skip
            until.append(found.clone())
        at_high, at_low = at_ends & 0xFFFF, at_ends >> 16
        if low == high:
            at_low.zero_()  # they are counted as those at the upper end
        sums = [count.sum(dtype=torch.int64)[None] for count in (above, at_high, at_low)]
        figures = torch.cat([*sums, *until]).tolist()
        return _Pass(above, at_high, at_low, [*figures[:3], figures[-1]], bits, listed, words, figures[3:])

    def _collected(self, read: _Pass) -> tuple[Tensor, Tensor]:
        """Read the scores inside the bracket, and give their slots and values, in no fixed order."""
        until = [min(number, len(read.listed)) for number in read.until]
        sizes = _popcount(read.words[: until[-1]])
        count = int(sizes.sum())
        starts = sizes.cumsum(0, dtype=torch.int32 if count < 2**31 else torch.int64) - sizes
        slots = torch.empty(count, dtype=torch.int64, device=self.device)
        values = torch.empty(count, dtype=torch.float32, device=self.device)
        for launch, begin, end in zip(self.launches, [0, *until], until, strict=False):
            if end > begin:
                num_tensors = launch.table.shape[1]
                device.collect_kernel[(cdiv(end - begin, _COLLECTED_WORDS),)](
                    launch.table, read.listed, read.words, starts,
                    slots, values,
                    num_tensors, (num_tensors - 1).bit_length(),
                    begin, end,
                    **launch.constants, BLOCK=_COLLECTED_WORDS,
                )  # fmt: skip
        if values.isnan().any():
            raise ArithmeticError("a score is NaN")
        return slots, values

    def _take_ties(self, bits: Tensor, counts: Tensor, ties: Tensor, take: int, end: float) -> int:
        """Set the bits of the first ``take`` scores that equal an end of the bracket, count them, and return take."""
        if take > 0:
            before = ties.cumsum(0) - ties
            quotas = (take - before).clamp_(min=0).minimum(ties).to(torch.int32)
            for launch in self.launches:
                device.take_ties_kernel[(launch.chunks,)](
                    launch.table, bits, quotas, launch.table.shape[1], end, **launch.constants
                )
            counts += quotas
        return take

    def _bracket(self, k: int) -> tuple[float, float, float]:
        """Estimate two values around the ``k``-th largest, and how many scores are between them."""
        if self.total <= _FEW_SCORES:
            return -math.inf, math.inf, self.total
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
            (min(low, len(values)) - max(high, 0)) / max(len(values), 1) * self.total,
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
            read = self._pass(value, value, self._room(0))
            self._collected(read)  # nothing is inside but NaN
            low, high = (middle, high) if read.sums[0] + read.sums[1] >= k else (low, middle - 1)
        return _value(low)


@dataclass(frozen=True)
class _Pass:
    """The result of reading every score once.

    Attributes:
        above: ``[chunks]``, int32: how many are above the bracket.
        at_high: ``[chunks]``, int32: how many are at its upper end.
        at_low: ``[chunks]``, int32: how many are at its lower end.
        sums: These three of all chunks together; and how many words have scores inside the bracket or NaN.
        bits: ``[chunks, WORDS]``, int32: set for those above the bracket.
        listed: ``[room]``, int32: numbers of the words with scores inside or NaN; in no fixed order.
        words: ``[room]``, int32: the bits of these scores.
        until: For each launch the end of its part of the list.
    """

    above: Tensor
    at_high: Tensor
    at_low: Tensor
    sums: list[int]
    bits: Tensor
    listed: Tensor
    words: Tensor
    until: list[int]


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
    """Return the slots of the ``count`` largest values, of equal ones the smaller slots; in no fixed order."""
    if count == 0:
        return slots[:0]
    # On a GPU kthvalue is one block, 100 times slower, and refused by torch.use_deterministic_algorithms.
    last = values.sort(descending=True).values[count - 1]
    above = slots[values > last]
    return torch.cat([above, slots[values == last].sort().values[: count - len(above)]])


def _word_and_bit(slots: Tensor) -> tuple[Tensor, Tensor]:
    """Say where the bits of slots are: word among those of all chunks, bit in it."""
    place = slots % _CHUNK
    return slots // _CHUNK * _WORDS + place // 4 % _WORDS, place // (4 * _WORDS) * 4 + place % 4


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
