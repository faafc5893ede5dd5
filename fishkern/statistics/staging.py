"""Sums on their way from an accelerator to the CPU, while the accelerator goes on.

What a backward pass adds to a parameter's sum is copied into pinned memory by a stream of its own, and added on the CPU
when the next sums need the room. So copying and adding overlap with the rest of the backward pass. The order of the
additions is that in which they came, so the bits are those of a copy that waits.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

IN_FLIGHT = 2  # sums of parameters that are being copied while the next one is computed


class _Sent(NamedTuple):
    """A sum that is under way.

    Args:
        total: What it will be added to.
        staged: Its copy on the CPU, complete after ``arrived``.
        arrived: Event of the copy; ``None`` where the copy has waited.
        buffer: The memory of ``staged``.
    """

    total: Tensor
    staged: Tensor
    arrived: torch.Event | None
    buffer: Tensor


class Staging:
    """Add tensors of one device to tensors of the CPU.

    Args:
        device: Where the tensors come from. Of a CPU nothing overlaps.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._overlaps = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._overlaps else None
        self._free = [torch.empty(0, dtype=torch.uint8) for _ in range(IN_FLIGHT)]
        self._sent: deque[_Sent] = deque()

    def send(self, added: Tensor, total: Tensor) -> None:
        """Let a tensor be added to another, by :meth:`drain` at the latest.

        Args:
            added: On the device; it may be dropped at once.
            total: On the CPU, of the same shape and dtype.
        """
        if not self._free:
            self._arrive()
        buffer = self._with_room(self._free.pop(), added.nbytes)
        staged = buffer[: added.nbytes].view(added.dtype).view(added.shape)
        self._sent.append(_Sent(total, staged, self._copy(added, staged), buffer))

    def drain(self) -> None:
        """Wait until all that was sent is added."""
        while self._sent:
            self._arrive()

    def _copy(self, added: Tensor, staged: Tensor) -> torch.Event | None:
        if self._stream is None:
            staged.copy_(added)
            return None
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            staged.copy_(added, non_blocking=True)
            added.record_stream(self._stream)  # else its memory could be given away before it is copied
            arrived = torch.cuda.Event()
            arrived.record(self._stream)
        return arrived

    def _arrive(self) -> None:
        """Add what was sent first."""
        sent = self._sent.popleft()
        if sent.arrived is not None:
            sent.arrived.synchronize()
        sent.total.add_(sent.staged)
        self._free.append(sent.buffer)

    def _with_room(self, buffer: Tensor, size: int) -> Tensor:
        """Return the buffer, or a larger one in its place; pinned memory takes long to make."""
        if buffer.nbytes >= size:
            return buffer
        return torch.empty(size, dtype=torch.uint8, pin_memory=self._overlaps)
