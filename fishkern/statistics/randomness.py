"""Random numbers of a pass: a stream of its own, which continues from batch to batch, apart from the user's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class OwnRandomness:
    """The state of torch's generators inside a pass. It starts as a copy of the user's, which is left as found.

    Args:
        device: The model's device.
    """

    def __init__(self, device: torch.device) -> None:
        self._devices = [device] if device.type == "cuda" else []
        self._states: list[torch.Tensor] | None = None

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Draw from the pass's own stream. Draws of the data, between two such blocks, come from the user's stream.

        Yields:
            Nothing.
        """
        users = self._current()
        if self._states is not None:
            self._set(self._states)
        try:
            yield
        finally:
            self._states = self._current()
            self._set(users)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Draw without moving the pass's own stream on: what comes once before a pass changes no draw of its batches.

        Yields:
            Nothing.
        """
        states = self._states
        try:
            with self.drawing():
                yield
        finally:
            self._states = states

    def now(self) -> list[torch.Tensor]:
        """Return the states of the pass's own stream: of the CPU's generator, and on a GPU also of its own.

        Returns:
            For each generator ``[S]``, uint8.
        """
        return self._current() if self._states is None else list(self._states)

    def go_on(self, states: list[torch.Tensor]) -> None:
        """Let the pass's own stream go on from other states.

        Args:
            states: From :meth:`now`.
        """
        self._states = list(states)

    def _current(self) -> list[torch.Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self._devices)]

    def _set(self, states: list[torch.Tensor]) -> None:
        torch.set_rng_state(states[0])
        for device, state in zip(self._devices, states[1:], strict=True):
            torch.cuda.set_rng_state(state, device)
