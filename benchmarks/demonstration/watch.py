"""Wall time and peak memory of the stages of one process."""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.memory import MIB, _resident


class Watch:
    """Writes one JSON line for each stage, when it is over.

    On a GPU a peak is what torch has allocated at most. On a CPU it is the most resident memory above that of the
    process with its libraries, before the first stage. Both include what was there when the stage began, such as the
    weights.

    Args:
        lines: File to append to.
        arm: What the process does.
        device: Where it computes.
    """

    def __init__(self, lines: Path, arm: str, device: str) -> None:
        self._lines, self._arm, self._cuda = lines, arm, device == "cuda"
        self.current = ""
        self._forget_peak()
        self._before = 0.0 if self._cuda else _resident("VmRSS")

    @contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """Watch what runs inside the ``with`` block, whose findings go into the mapping that it is given."""
        self.current = name
        print(f"{self._arm}: {name} ...", file=sys.stderr, flush=True)
        self._forget_peak()
        found: dict[str, Any] = {}
        start = time.perf_counter()
        yield found
        if self._cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        self.write({"seconds": round(seconds, 4), "peak_mib": round(self._peak(), 1), **found})

    def write(self, line: dict[str, Any]) -> None:
        """Append a line about the current stage."""
        with self._lines.open("a") as file:
            file.write(json.dumps({"arm": self._arm, "stage": self.current, **line}) + "\n")

    def _forget_peak(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        else:
            ctypes.CDLL(None).malloc_trim(0)  # what an earlier stage has freed goes back to the system
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from what is resident

    def _peak(self) -> float:
        return torch.cuda.max_memory_allocated() / MIB if self._cuda else _resident("VmHWM") - self._before
