"""Where the time of one batch goes, by PyTorch's profiler: which kernels, and how long the device waits for the host.

The trace of each case becomes a file in the folder of the records, for ``chrome://tracing`` or Perfetto.
"""

from __future__ import annotations

import gzip
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import profile, supported_activities

import fishkern as fk
from benchmarks.cases.whole_pass import CASES
from benchmarks.gpu import Part, Record
from benchmarks.subjects.transformers import Workload

TESTS: dict[str, list[str]] = {"gpu": []}  # those of whole_pass, which measures the same
TRACED = ("1B 8x128", "1B 8x512")
LISTED = 25  # names of kernels; the rest is one line


def parts(device: torch.device) -> list[Part]:
    return [Part(name, partial(_trace, replace(CASES[name], device=str(device))), seconds=30) for name in TRACED]


def _trace(case: Workload) -> Iterator[Record]:
    model, batches = case.model(), case.data()
    fk.estimate(model, batches[:2], check=False, backend="triton")  # compiles
    with profile(activities=supported_activities()) as profiler:
        fk.estimate(model, batches[:3], check=False, backend="triton")
    events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(str(path := Path(folder) / "trace.json"))
        trace = gzip.compress(path.read_bytes())
    spans = [(event.time_range.start, event.time_range.end, event.name) for event in events]
    yield {"provider": "fishkern", "case": case.fields, "batches": 3, **summary(spans), "trace.json.gz": trace}


def summary(spans: list[tuple[float, float, str]]) -> dict[str, Any]:
    """Add up what ran on the device.

    Args:
        spans: Begin and end of each kernel in microseconds, and its name.

    Returns:
        ``busy_us``, in which at least one ran; ``idle_us`` between the first and the last; ``kernels``, how often and
        how long each name ran, the longest first.
    """
    busy, idle, reached = 0.0, 0.0, min((start for start, _, _ in spans), default=0.0)
    for start, end, _ in sorted(spans):
        idle += max(0.0, start - reached)
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    took, calls = Counter[str](), Counter[str]()
    for start, end, name in spans:
        took[name] += end - start
        calls[name] += 1
    kernels = [{"name": name[:100], "calls": calls[name], "us": round(us, 1)} for name, us in took.most_common(LISTED)]
    rest = sum(took.values()) - sum(us for _, us in took.most_common(LISTED))
    return {"busy_us": round(busy, 1), "idle_us": round(idle, 1), "kernels": kernels, "other_us": round(rest, 1)}
