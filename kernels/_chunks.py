"""Packed examples, cut into chunks: the positions that a kernel multiplies at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from ._hardware import to_gpu


def chunk_table(offsets: Tensor, positions: int, parts: int, BLOCK_T: int, to: torch.device) -> tuple[Tensor, Tensor]:
    """Cut packed examples into chunks, and group the chunks of whole examples into parts of about equal work.

    It is computed on the device of the offsets and nothing is read back, so the host never waits for the device.

    Args:
        offsets: ``[N + 1]``.
        positions: Positions of all examples together.
        parts: Into how many parts.
        BLOCK_T: Longest chunk.
        to: Device of the kernel.

    Returns:
        ``[C, 2]``: position of each chunk, and how many positions its example has from there on; rows after the last
        chunk have no meaning. ``[parts + 1]``: the chunk at which each part begins. Both int32.

    Raises:
        ValueError: There are more positions than int32 can count.
        RuntimeError: The offsets are on the CPU, and a CUDA graph is being captured.
    """
    if positions >= 2**31:
        raise ValueError(f"the kernel takes up to 2**31 - 1 packed positions, got {positions}: split the call.")
    offsets = offsets.long()
    lengths = offsets.diff()
    counts = (lengths + (BLOCK_T - 1)) // BLOCK_T
    firsts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])  # first chunk of each example
    most = positions // BLOCK_T + len(lengths) + 1  # the kernel reads one row ahead
    chunk = torch.arange(most, device=offsets.device)
    example = torch.searchsorted(firsts, chunk, right=True).sub_(1).clamp_(max=len(lengths) - 1)
    before = (chunk - firsts[example]) * BLOCK_T  # positions of the example in earlier chunks
    rows = torch.stack([offsets[example] + before, lengths[example] - before], dim=1)
    even = torch.arange(parts + 1, device=offsets.device) * firsts[-1] // parts
    cuts = firsts[torch.searchsorted(firsts, even)]  # even cuts, moved to where the next example begins
    table = torch.cat([rows.flatten(), cuts]).to(torch.int32)
    if table.device != to:  # else nothing is copied, also while a CUDA graph is captured
        table = to_gpu(table, to, "pad the examples to one length [N, T, I], or call this outside of the graph.")
    return table[: 2 * most], table[2 * most :]
