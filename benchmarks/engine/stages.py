"""Wall-clock time and peak memory of the stages of a process."""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.engine.memory import MIB, forget_peak, resident_mib
from benchmarks.engine.records import Record


class Stages:
    """Measures stages, and writes a JSON line for each when it is over.

    On a GPU a peak is the most that torch has allocated. On a CPU it is the most resident memory above that of the
    process before its first stage. Both include what was there when the stage began, such as the weights.
    """

    def __init__(self, lines: Path, arm: str, device: str) -> None:
        self._lines, self._arm, self._cuda = lines, arm, device == "cuda"
        self._stage = "start"
        self._forget_peak()
        self._before = 0.0 if self._cuda else resident_mib("VmRSS")

    @contextmanager
    def measured(self, name: str) -> Iterator[Record]:
        """Measure the ``with`` block, which adds figures of its own to the mapping that it gets."""
        self._stage = name
        print(f"{self._arm}: {name} ...", file=sys.stderr, flush=True)
        self._forget_peak()
        figures: Record = {}
        start = time.perf_counter()
        yield figures
        if self._cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated() / MIB if self._cuda else resident_mib("VmHWM") - self._before
        self.write({"seconds": round(seconds, 4), "peak_mib": round(peak, 1), **figures})

    def write(self, figures: Record) -> None:
        """Append a line about the stage that was begun last."""
        with self._lines.open("a") as file:
            file.write(json.dumps({"arm": self._arm, "stage": self._stage, **figures}) + "\n")

    def _forget_peak(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        else:
            ctypes.CDLL(None).malloc_trim(0)  # memory that an earlier stage has freed goes back to the system
            forget_peak()
