"""Device code of :mod:`fishkern.kernels.streaming_topk`.

One program takes one chunk of ``CHUNK`` scores. In all kernels::

    table_ptr           [4, tensors], int64, of the tensors of one dtype: number of its first chunk in this launch,
                        address, size, place of that chunk among those of all dtypes
    place               number of a chunk among all of them: results of chunks are in this order
    bits_ptr            [chunks, WORDS], int32: one bit for each score, set for those selected
    low, high           ends of the bracket; values are negated unless LARGEST, so the kernels select the largest only

A thread loads four neighbours at a time, and the bits of its own scores are one word, which it makes without the
others: of a chunk seen as ``[CHUNK / 512, WORDS, 4]``, word ``c`` has the scores ``[:, c, :]``, in their order.
"""

from __future__ import annotations

import triton
import triton.language as tl

WORDS = tl.constexpr(128)  # of a chunk, 32 scores each


@triton.jit
def _find_chunk(table_ptr, num_tensors, number, CHUNK: tl.constexpr):
    """Locate a chunk: address of its tensor, its first score there, how many follow, its place among all chunks."""
    low = num_tensors * 0
    high = num_tensors - 1
    while low < high:  # the last tensor whose first chunk is not after this one
        middle = (low + high + 1) // 2
        after = tl.load(table_ptr + middle) > number
        low = tl.where(after, low, middle)
        high = tl.where(after, middle - 1, high)
    inside = number - tl.load(table_ptr + low)
    address = tl.load(table_ptr + num_tensors + low)
    left = tl.load(table_ptr + 2 * num_tensors + low) - inside * CHUNK
    return address, inside * CHUNK, left, tl.load(table_ptr + 3 * num_tensors + low) + inside


@triton.jit
def _load_scores(address, first, left, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, LARGEST: tl.constexpr,
                 COUNT: tl.constexpr):  # fmt: skip
    """Load the first ``COUNT`` scores of a chunk: values, negated unless LARGEST; which exist."""
    # The hint counts only after the cast, and loads are wide only where nothing is masked.
    ptr = address.to(tl.pointer_type(DTYPE)) + first
    if ALIGNED:
        ptr = tl.multiple_of(ptr, 16)
    offs = tl.arange(0, COUNT)
    exists = offs < left
    values = tl.load(ptr + offs) if left >= COUNT else tl.load(ptr + offs, mask=exists, other=0.0)
    values = values.to(tl.float32)
    return values if LARGEST else -values, exists


@triton.jit(do_not_specialize=["num_tensors"])
def sample_kernel(
    table_ptr, numbers_ptr, out_ptr,  # tensors; which chunks; [chunks, COUNT], NaN where a chunk is shorter
    num_tensors,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, LARGEST: tl.constexpr, CHUNK: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Copy the first scores of some chunks."""
    number = tl.load(numbers_ptr + tl.program_id(0))
    address, first, left, _ = _find_chunk(table_ptr, num_tensors, number, CHUNK)
    values, exists = _load_scores(address, first, left, DTYPE, ALIGNED, LARGEST, COUNT)
    offs = tl.program_id(0).to(tl.int64) * COUNT + tl.arange(0, COUNT)
    tl.store(out_ptr + offs, tl.where(exists, values, float("nan")))


@triton.jit
def _places_in_chunk(CHUNK: tl.constexpr):
    """Give the place of each score in its chunk, ``[CHUNK / 512, WORDS, 4]``; its bit in its word, ``[.., 1, 4]``."""
    row = tl.arange(0, CHUNK // (4 * WORDS))[:, None, None]
    word = tl.arange(0, WORDS)[None, :, None]
    neighbour = tl.arange(0, 4)[None, None, :]
    return row * (4 * WORDS) + word * 4 + neighbour, row * 4 + neighbour


@triton.jit
def _folded(flags, bit):
    """Make the words of a chunk, ``[WORDS]``, of ones and zeros ``[CHUNK / 512, WORDS, 4]``."""
    return tl.sum(tl.sum(flags.to(tl.int32) << bit, 2), 0)


@triton.jit
def _count_bits(words):
    """Count the bits of int32 words."""
    words = words - ((words >> 1) & 0x55555555)
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F
    words = words + (words >> 8)
    return (words + (words >> 16)) & 0x3F


@triton.jit(do_not_specialize=["num_tensors", "low", "high", "room"])
def select_kernel(
    table_ptr, bits_ptr,  # tensors; set above high
    counts_ptr, ends_ptr,  # [chunks]: how many are above high; at high, and at low in the upper 16 bits
    listed_ptr, words_ptr,  # [room]: which words have a score inside or NaN (number of the word in this launch); they
    found_ptr,  # how many there are
    num_tensors, room,
    low, high,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, LARGEST: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Select the scores above the bracket, count those at its ends, and list the words with undecided ones."""
    number = tl.program_id(0).to(tl.int64)
    address, first, left, place = _find_chunk(table_ptr, num_tensors, number, CHUNK)
    ptr = address.to(tl.pointer_type(DTYPE)) + first
    if ALIGNED:
        ptr = tl.multiple_of(ptr, 16)  # counts only after the cast, and loads are wide only where nothing is masked
    offs, bit = _places_in_chunk(CHUNK)
    none = float("-inf") if LARGEST else float("inf")
    values = tl.load(ptr + offs) if left >= CHUNK else tl.load(ptr + offs, mask=offs < left, other=none)
    values = values.to(tl.float32)
    values = values if LARGEST else -values  # what does not exist is -inf

    above = _folded(values > high, bit)
    lane = tl.arange(0, WORDS)
    tl.store(bits_ptr + place * WORDS + lane, above)
    tl.store(counts_ptr + place, tl.sum(_count_bits(above), 0))
    ends = tl.sum(tl.sum((values == high).to(tl.int32) + ((values == low).to(tl.int32) << 16), 2), 0)
    missing = tl.maximum(CHUNK - left, 0).to(tl.int32)  # those are at an end that is -inf
    missing = tl.where(high == float("-inf"), missing, 0) + (tl.where(low == float("-inf"), missing, 0) << 16)
    tl.store(ends_ptr + place, tl.sum(ends, 0) - missing)
    undecided = _folded(((values <= low) | (values >= high)) == 0, bit)
    listed = (undecided != 0).to(tl.int32)
    count = tl.sum(listed, 0)
    if count > 0:
        # Which chunk comes first depends on scheduling, and no result on the order of the list.
        ranks = tl.cumsum(listed, 0) - 1 + tl.atomic_add(found_ptr, count)
        fits = (listed > 0) & (ranks < room)
        tl.store(listed_ptr + ranks, (number * WORDS).to(tl.int32) + lane, mask=fits)
        tl.store(words_ptr + ranks, undecided, mask=fits)


@triton.jit(do_not_specialize=["num_tensors", "steps", "begin", "end"])
def collect_kernel(
    table_ptr, listed_ptr, words_ptr, starts_ptr,  # as of select_kernel; where the scores of each word begin
    slots_ptr, values_ptr,  # slots and values of the undecided scores
    num_tensors, steps,  # rounds of the search, log2(num_tensors) rounded up
    begin, end,  # of the words of this launch
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, LARGEST: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Read the undecided scores once more. A slot is its place if all chunks have CHUNK scores."""
    at = begin + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = at < end
    listed = tl.load(listed_ptr + at, mask=exists, other=0)
    words = tl.load(words_ptr + at, mask=exists, other=0)
    number = listed // WORDS
    low = tl.zeros((BLOCK,), dtype=tl.int32)
    high = low + (num_tensors - 1)
    for _ in range(steps):  # as in _find_chunk, for each word
        middle = (low + high + 1) // 2
        after = tl.load(table_ptr + middle) > number
        low = tl.where(after, low, middle)
        high = tl.where(after, middle - 1, high)
    inside = number - tl.load(table_ptr + low)
    ptrs = tl.load(table_ptr + num_tensors + low).to(tl.pointer_type(DTYPE)) + inside * CHUNK
    place = tl.load(table_ptr + 3 * num_tensors + low) + inside

    bit = tl.arange(0, 32)[None, :]
    offs = (bit // 4) * (4 * WORDS) + (listed % WORDS)[:, None] * 4 + bit % 4
    ones = (words[:, None] >> bit) & 1
    values = tl.load(ptrs[:, None] + offs, mask=ones > 0, other=0.0).to(tl.float32)
    ranks = tl.load(starts_ptr + at, mask=exists, other=0)[:, None] + tl.cumsum(ones, 1) - 1
    tl.store(slots_ptr + ranks, place[:, None] * CHUNK + offs, mask=ones > 0)
    tl.store(values_ptr + ranks, values if LARGEST else -values, mask=ones > 0)


@triton.jit(do_not_specialize=["num_tensors", "end"])
def take_ties_kernel(
    table_ptr, bits_ptr, quotas_ptr,  # tensors; bits to be set; [chunks] how many of each chunk
    num_tensors,
    end,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, LARGEST: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Select the first scores of each chunk that equal an end of the bracket, as many as its quota."""
    address, first, left, place = _find_chunk(table_ptr, num_tensors, tl.program_id(0).to(tl.int64), CHUNK)
    quota = tl.load(quotas_ptr + place)
    if quota > 0:  # checked before the scores are read: mostly few chunks have one
        values, exists = _load_scores(address, first, left, DTYPE, ALIGNED, LARGEST, CHUNK)
        equal = (exists & (values == end)).to(tl.int32)
        first_ones = equal * (tl.cumsum(equal, 0) <= quota).to(tl.int32)
        _, bit = _places_in_chunk(CHUNK)
        words = _folded(tl.reshape(first_ones, (CHUNK // (4 * WORDS), WORDS, 4)), bit)
        ptrs = bits_ptr + place * WORDS + tl.arange(0, WORDS)
        tl.store(ptrs, tl.load(ptrs) | words)


@triton.jit
def emit_kernel(
    bits_ptr, starts_ptr,  # [chunks, WORDS]; [chunks], where a chunk's indices begin in out
    offsets_ptr, out_ptr,  # [chunks], where it begins in its tensor; indices
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Write the indices of the scores whose bits are set."""
    place = tl.program_id(0).to(tl.int64)
    words = tl.load(bits_ptr + place * WORDS + tl.arange(0, WORDS))
    if tl.sum((words != 0).to(tl.int32), 0) > 0:
        offs, bit = _places_in_chunk(CHUNK)
        ones = (words[None, :, None] >> bit) & 1
        # How many are set in all fours of neighbours before a score's, and before it among these.
        fours = tl.reshape(tl.sum(ones, 2), (CHUNK // 4,))
        before = tl.reshape(tl.cumsum(fours, 0) - fours, (CHUNK // (4 * WORDS), WORDS))
        ranks = before[:, :, None] + tl.cumsum(ones, 2) - ones
        indices = tl.load(offsets_ptr + place) + offs
        tl.store(out_ptr + tl.load(starts_ptr + place) + ranks, indices.to(out_ptr.dtype.element_ty), mask=ones > 0)
