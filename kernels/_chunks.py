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
    rows, firsts = _chunks(offsets, positions, BLOCK_T)
    even = torch.arange(parts + 1, device=offsets.device) * firsts[-1] // parts
    cuts = firsts[torch.searchsorted(firsts, even)]  # even cuts, moved to where the next example begins
    return _moved(rows, cuts, to, "pad the examples to one length [N, T, I], or call this outside of the graph.")


def expert_chunk_table(
    expert: Tensor, offsets: Tensor, positions: int, num_experts: int, BLOCK_T: int, to: torch.device
) -> tuple[Tensor, Tensor]:
    """Cut groups of rows into chunks, as :func:`chunk_table` does examples, with a part for each expert.

    Args:
        expert: Expert of each group, ``[U]``, ascending.
        offsets: ``[U + 1]``.
        positions: Rows of all groups together.
        num_experts: How many parts.
        BLOCK_T: Longest chunk.
        to: Device of the kernel.

    Returns:
        As :func:`chunk_table`.

    Raises:
        ValueError: As :func:`chunk_table`.
        RuntimeError: As :func:`chunk_table`.
    """
    rows, firsts = _chunks(offsets, positions, BLOCK_T)
    numbers = torch.arange(num_experts + 1, device=offsets.device)
    cuts = firsts[torch.searchsorted(expert.to(offsets).long(), numbers)]
    return _moved(rows, cuts, to, "call this outside of the graph.")


def _chunks(offsets: Tensor, positions: int, BLOCK_T: int) -> tuple[Tensor, Tensor]:
    """Compute position and remaining positions of each chunk, ``[C, 2]``, and the first chunk of each example."""
    if positions >= 2**31:
        raise ValueError(f"the kernel takes up to 2**31 - 1 packed positions, got {positions}: split the call.")
    offsets = offsets.long()
    lengths = offsets.diff()
    counts = (lengths + (BLOCK_T - 1)) // BLOCK_T
    firsts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])  # first chunk of each example
    most = positions // BLOCK_T + len(lengths) + 1  # the kernel reads one row ahead
    most += (
        most % 2
    )  # so that the cuts, which follow in one tensor, begin at 16 bytes: Triton compiles again for others
    chunk = torch.arange(most, device=offsets.device)
    example = torch.searchsorted(firsts, chunk, right=True).sub_(1).clamp_(max=len(lengths) - 1)
    before = (chunk - firsts[example]) * BLOCK_T  # positions of the example in earlier chunks
    return torch.stack([offsets[example] + before, lengths[example] - before], dim=1), firsts


def _moved(rows: Tensor, cuts: Tensor, to: torch.device, instead: str) -> tuple[Tensor, Tensor]:
    """Bring both tables to a device, as one tensor of int32."""
    table = torch.cat([rows.flatten(), cuts]).to(torch.int32)
    if table.device != to:  # else nothing is copied, also while a CUDA graph is captured
        table = to_gpu(table, to, instead)
    return table[: rows.numel()], table[rows.numel() :]
