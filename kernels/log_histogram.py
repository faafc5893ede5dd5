"""Triton kernel of :func:`fishkern.ops.log_histogram`, for values on one GPU.

Each program takes every so many chunks of the values, finds the bin of each value by bisection in a table of magnitudes
and adds its counts to the result at the end. The counts are integers, so that the order of the programs makes no
difference. Magnitudes are compared by their bit patterns, which have the same order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._hardware import hardware, to_gpu

# Values that a program takes at a time: of float32, four loads of 16 bytes for each of 128 threads.
_CHUNK = 2048
_PROGRAMS = 8  # for each processor
_OPTIONS = {"enable_fp_fusion": True}  # there is nothing to fuse, but Triton 3.9 warns if this is left out
_LAST = 2**31 - 1  # of the bit patterns of magnitudes


@triton.jit(do_not_specialize=["size", "bins"])
def log_histogram_kernel(
    values_ptr, bounds_ptr, counts_ptr,  # [size]; [2**STEPS - 1], ascending bit patterns; [bins], added to
    size, bins,
    STEPS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Count the values between neighbouring bounds."""
    counts = tl.zeros((2**STEPS,), dtype=tl.int32)
    offs = tl.arange(0, CHUNK)
    first = tl.program_id(0).to(tl.int64) * CHUNK
    step = tl.num_programs(0).to(tl.int64) * CHUNK
    while first < size:
        exists = offs < size - first
        # Loads are wide only where nothing is masked.
        ptrs = values_ptr + first + offs
        values = tl.load(ptrs) if size - first >= CHUNK else tl.load(ptrs, mask=exists, other=0.0)
        keys = values.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
        places = tl.zeros((CHUNK,), dtype=tl.int32)  # how many bounds are not above a value
        for bit in tl.static_range(STEPS):
            half = 2 ** (STEPS - 1 - bit)
            bounds = tl.load(bounds_ptr + places + (half - 1))
            places = tl.where(bounds <= keys, places + half, places)
        counts += tl.histogram(tl.where(exists, places, 0), 2**STEPS)
        first += step
    places = tl.arange(0, 2**STEPS)
    inside = (places > 0) & (places <= bins)
    tl.atomic_add(counts_ptr + (places - 1), counts.to(tl.int64), mask=inside)


def log_histogram(values: Tensor, edges: Tensor) -> Tensor:
    """Launch the kernel; arguments as in :func:`fishkern.ops.log_histogram`, already checked, the edges on the CPU."""
    flat, bins = values.contiguous().view(-1), len(edges) - 1
    counts = torch.zeros(bins, dtype=torch.int64, device=values.device)
    if not flat.numel():
        return counts
    steps = (bins + 1).bit_length()
    bounds = torch.full((2**steps - 1,), _LAST, dtype=torch.int32)
    bounds[: bins + 1] = _bounds(edges)
    bounds = to_gpu(bounds, values.device, "compute the histogram outside of the graph.")
    programs = min(triton.cdiv(flat.numel(), _CHUNK), _PROGRAMS * hardware(values.device).processors)
    with torch.cuda.device_of(flat):  # Triton launches on the current device
        log_histogram_kernel[(programs,)](
            flat, bounds, counts,
            flat.numel(), bins,
            STEPS=steps, CHUNK=_CHUNK,
            **_OPTIONS,
        )  # fmt: skip
    return counts


def _bounds(edges: Tensor) -> Tensor:
    """Find the bit patterns of the smallest magnitudes that reach the edges, or exceed the last one, by bisection."""
    # As keys_reaching and log_magnitude of fishkern/ops do, 1e-12 included, since kernels import nothing of fishkern:
    # the operation's tests compare the two.
    last = torch.arange(len(edges)) == len(edges) - 1
    low = torch.zeros(len(edges), dtype=torch.int32)
    high = torch.full_like(edges, torch.inf, dtype=torch.float32).view(torch.int32) + 1  # what nothing reaches
    while bool((low < high).any()):
        middle = low + (high - low) // 2
        logs = (middle.view(torch.float32).double() + 1e-12).log10()
        reached = torch.where(last, logs > edges, logs >= edges)
        low, high = torch.where(reached, low, (middle + 1).minimum(high)), torch.where(reached, middle, high)
    return high
