"""Seconds of a run by what they were spent on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class Stopwatch(dict[str, float]):
    """Seconds by name: of the process on a CPU, which other work does not stretch; of the clock on a GPU.

    Args:
        device: Where the work is done.
        names: What time is spent on.
    """

    def __init__(self, device: torch.device, *names: str) -> None:
        super().__init__(dict.fromkeys(names, 0.0))
        self._gpu = device.type == "cuda"

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = self._now()
        yield
        self[name] += self._now() - start

    def _now(self) -> float:
        if self._gpu:
            torch.cuda.synchronize()
        clock: Callable[[], float] = time.perf_counter if self._gpu else time.process_time
        return clock()
