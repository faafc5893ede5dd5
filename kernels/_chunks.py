"""Packed examples, cut into chunks of positions that a kernel multiplies at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from ._hardware import to_gpu


def chunk_table(offsets: Tensor, positions: int, parts: int, BLOCK_T: int, to: torch.device) -> tuple[Tensor, Tensor]:
    """Cut packed examples into chunks, and the chunks into parts of about equal work between examples.

    It is computed where the offsets lie and nothing is read back, so that nobody waits for the device.

    Args:
        offsets: ``[N + 1]``.
        positions: Where they end.
        parts: Into how many parts.
        BLOCK_T: Longest chunk.
        to: Device of the kernel.

    Returns:
        ``[C, 2]``: position of each chunk, and how many positions its example has from there on; rows behind the last
        chunk mean nothing. ``[parts + 1]``: the chunk at which each part begins. Both int32.

    Raises:
        ValueError: The positions pass what int32 counts.
        RuntimeError: The offsets lie on the CPU, and a CUDA graph is being captured.
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
    done = (chunk - firsts[example]) * BLOCK_T
    rows = torch.stack([offsets[example] + done, lengths[example] - done], dim=1)
    even = torch.arange(parts + 1, device=offsets.device) * firsts[-1] // parts
    cuts = firsts[torch.searchsorted(firsts, even)]
    table = torch.cat([rows.flatten(), cuts]).to(torch.int32)
    if table.device != to:  # else there is no copy
        table = to_gpu(table, to, "pad the examples to one length [N, T, I], or call this outside of the graph.")
    return table[: 2 * most], table[2 * most :]
