"""How time and peak memory grow with examples, positions, layers, tensors, scores and selected entries.

Each operation and the whole pass stand beside the simple ways to the same result, on a geometric row of sizes. Every
provider has a process of its own, which may take :data:`LIMIT_GIB` of memory beside its imports (RLIMIT_DATA, so what
is reserved counts); they take turns within each round. Memory is measured in further processes, above the inputs. Who
runs out of memory or fails does so in fact: that size is recorded with the reason, and larger ones as not tried.

The sizes suit two cores, and are far from where a GPU is busy. Exponents are the picture's, not the records'.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks import scaling_cases
from benchmarks.scaling_cases import PROVIDERS, SWEEPS, Sweep
from benchmarks.turns import spread
from benchmarks.worker import Worker, WorkerError

TESTS = [
    "tests/benchmarks/test_scaling.py",
    "tests/ops/test_sum_grad_squared.py",
    "tests/ops/test_streaming_topk.py",
    "tests/ops/test_masked_adamw.py",
    "tests/laws/test_layers.py",
]
LIMIT_GIB = 2
ROUNDS = 3
MORE_ROUNDS, SHORT = 9, 0.1  # of what takes less than so many seconds
ROOT = Path(__file__).parents[1]


# What `compare` runs: the middle of each row of sizes.
COMPARED = {str(sweep): ["fishkern", list(PROVIDERS[sweep.op])[1]] for sweep in SWEEPS}


def prepare(described: str, provider: str) -> scaling_cases.Run:
    """Make one of :data:`COMPARED`."""
    (sweep,) = (sweep for sweep in SWEEPS if str(sweep) == described)
    middle = sweep.sizes[len(sweep.sizes) // 2]
    return scaling_cases.prepare(sweep.op, provider, {**sweep.others, sweep.grows: middle})


@pytest.mark.parametrize("sweep", SWEEPS, ids=str)
def test_scaling(sweep, record):
    figures = {quantity: measure(sweep, quantity) for quantity in ("time", "memory")}
    for quantity, found in figures.items():
        for provider, size, figure in found:
            record(
                "scaling",
                {
                    "op": sweep.op,
                    "quantity": quantity,
                    "grows": sweep.grows,
                    "case": {**sweep.others, sweep.grows: size},
                    "dtype": "float32",
                    "provider": provider,
                    "limit_gib": LIMIT_GIB,
                    **figure,
                },
            )
    ours = [figure for found in figures.values() for provider, _, figure in found if provider == "fishkern"]
    assert not [figure["left out"] for figure in ours if "left out" in figure]


def measure(sweep: Sweep, quantity: str) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Measure all providers at all sizes.

    Yields:
        Provider, size, and its figures or the reason that there are none.
    """
    stopped: dict[str, str] = {}
    figures = {"time": times, "memory": peaks}[quantity]
    with workers(sweep.op, memory=quantity == "memory") as running:
        if quantity == "memory":
            peaks(running, sweep.op, {**sweep.others, sweep.grows: sweep.sizes[0]})  # libraries allocate on first use
        for size in sweep.sizes:
            ready = {provider: worker for provider, worker in running.items() if provider not in stopped}
            found = figures(ready, sweep.op, {**sweep.others, sweep.grows: size})
            for provider in running:
                if provider in stopped:
                    yield provider, size, {"left out": f"not tried: {stopped[provider]}"}
                    continue
                yield provider, size, found[provider]
                if reason := found[provider].get("left out"):
                    stopped[provider] = f"{reason} at {sweep.grows} = {size}"


@contextmanager
def workers(op: str, memory: bool) -> Iterator[dict[str, Worker]]:
    """Hold one process for each provider."""
    with ExitStack() as stack:
        file = Path(scaling_cases.__file__)
        running = {}
        for provider in PROVIDERS[op]:
            running[provider] = Worker(file, ROOT, limit_gib=LIMIT_GIB, memory=memory)
            stack.callback(running[provider].close)
        yield running


def times(running: dict[str, Worker], op: str, sizes: dict[str, int]) -> dict[str, dict[str, Any]]:
    """Let providers take turns, after a warm-up, which also tells how many rounds there are."""
    seconds: dict[str, list[float]] = {}
    failed: dict[str, dict[str, Any]] = {}
    rounds = ROUNDS
    for turn in range(1 + MORE_ROUNDS):
        if turn > rounds:
            break
        for provider, worker in running.items():
            if provider in failed:
                continue
            try:
                if turn == 0:
                    worker.prepare(op, provider, sizes)
                seconds.setdefault(provider, []).append(worker.seconds())
            except WorkerError as error:
                failed[provider] = {"left out": str(error)}
        if turn == 0:
            slowest = max((values[0] for name, values in seconds.items() if name not in failed), default=0.0)
            rounds = MORE_ROUNDS if slowest < SHORT else ROUNDS
            seconds = {name: [] for name in seconds}
    return failed | {
        name: {"seconds": spread(v), "rounds": len(v)} for name, v in seconds.items() if name not in failed
    }


def peaks(running: dict[str, Worker], op: str, sizes: dict[str, int]) -> dict[str, dict[str, Any]]:
    """One run each, which makes what it keeps."""
    found = {}
    for provider, worker in running.items():
        try:
            worker.prepare(op, provider, sizes)
            found[provider] = {"peak_mib": round(worker.peak_mib(), 2)}
        except WorkerError as error:
            found[provider] = {"left out": str(error)}
    return found
