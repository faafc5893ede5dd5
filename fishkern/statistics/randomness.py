"""Random numbers during a pass: a stream of the pass's own, which goes on from batch to batch, beside the user's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class OwnRandomness:
    """The state of torch's generators inside a pass. It begins where the user's stands, and leaves that as found.

    Args:
        device: Where the model lies.
    """

    def __init__(self, device: torch.device) -> None:
        self._devices = [device] if device.type == "cuda" else []
        self._states: list[torch.Tensor] | None = None

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Draw from the pass's own stream; what the data draws between two such blocks comes from the user's.

        Yields:
            Nothing.
        """
        found = self._current()
        if self._states is not None:
            self._set(self._states)
        try:
            yield
        finally:
            self._states = self._current()
            self._set(found)

    def _current(self) -> list[torch.Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self._devices)]

    def _set(self, states: list[torch.Tensor]) -> None:
        torch.set_rng_state(states[0])
        for device, state in zip(self._devices, states[1:], strict=True):
            torch.cuda.set_rng_state(state, device)
