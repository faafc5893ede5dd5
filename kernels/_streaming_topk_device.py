"""Device code of :mod:`fishkern.kernels.streaming_topk`.

One program takes one chunk of ``CHUNK`` scores. In all kernels::

    table_ptr           [4, tensors], int64, of the tensors of one dtype: number of its first chunk in this launch,
                        address, size, place of that chunk among those of all dtypes
    place               number of a chunk among all of them: results of chunks are in this order
    bits_ptr            [chunks, CHUNK / 32], int32: one bit for each score, set for those selected
    low, high           ends of the bracket; values are negated unless LARGEST, so the kernels select the largest only
"""

from __future__ import annotations

import triton
import triton.language as tl


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


@triton.jit(do_not_specialize=["num_tensors", "low", "high", "room"])
def select_kernel(
    table_ptr, bits_ptr,  # tensors; [chunks, CHUNK / 32], set above high
    counts_ptr,  # [4, chunks]: above high, at high, at low, NaN
    inside_ptr, slots_ptr, values_ptr,  # how many are inside; their slots, [room]; their values, [room]
    num_tensors, num_chunks, room,
    low, high,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, LARGEST: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Select the scores above the bracket, count those at its ends, and collect those inside."""
    address, first, left, place = _find_chunk(table_ptr, num_tensors, tl.program_id(0).to(tl.int64), CHUNK)
    values, exists = _load_scores(address, first, left, DTYPE, ALIGNED, LARGEST, CHUNK)
    above = exists & (values > high)
    at_high = exists & (values == high)
    at_low = exists & (values == low) & (values < high)
    inside = exists & (values > low) & (values < high)
    bits = tl.reshape(above.to(tl.int32), (CHUNK // 32, 32)) << tl.arange(0, 32)[None, :]
    tl.store(bits_ptr + place * (CHUNK // 32) + tl.arange(0, CHUNK // 32), tl.sum(bits, 1))
    tl.store(counts_ptr + place, tl.sum(above.to(tl.int32)))
    tl.store(counts_ptr + num_chunks + place, tl.sum(at_high.to(tl.int32)))
    tl.store(counts_ptr + 2 * num_chunks + place, tl.sum(at_low.to(tl.int32)))
    tl.store(counts_ptr + 3 * num_chunks + place, tl.sum((exists & (values != values)).to(tl.int32)))
    count = tl.sum(inside.to(tl.int32))
    if count > 0:
        # Which chunk comes first depends on scheduling: the host sorts the collected scores by their slots.
        ranks = tl.cumsum(inside.to(tl.int32), 0) - 1 + tl.atomic_add(inside_ptr, count.to(tl.int64))
        fits = inside & (ranks < room)
        tl.store(slots_ptr + ranks, place * CHUNK + tl.arange(0, CHUNK), mask=fits)
        tl.store(values_ptr + ranks, values, mask=fits)


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
        bits = tl.sum(tl.reshape(first_ones, (CHUNK // 32, 32)) << tl.arange(0, 32)[None, :], 1)
        ptrs = bits_ptr + place * (CHUNK // 32) + tl.arange(0, CHUNK // 32)
        tl.store(ptrs, tl.load(ptrs) | bits)


@triton.jit
def emit_kernel(
    bits_ptr, starts_ptr,  # [chunks, CHUNK / 32]; [chunks], where a chunk's indices begin in out
    offsets_ptr, out_ptr,  # [chunks], where it begins in its tensor; indices
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Write the indices of the scores whose bits are set."""
    place = tl.program_id(0).to(tl.int64)
    words = tl.load(bits_ptr + place * (CHUNK // 32) + tl.arange(0, CHUNK // 32))
    selected = tl.reshape((words[:, None] >> tl.arange(0, 32)[None, :]) & 1, (CHUNK,))
    if tl.sum(selected) > 0:
        ptrs = out_ptr + tl.load(starts_ptr + place) + tl.cumsum(selected, 0) - 1
        indices = tl.load(offsets_ptr + place) + tl.arange(0, CHUNK)
        tl.store(ptrs, indices.to(out_ptr.dtype.element_ty), mask=selected > 0)
