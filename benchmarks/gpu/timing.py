"""Times by device events, in interleaved rounds with a cold L2 cache, and peaks of device memory."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch

from benchmarks.engine.process import in_short
from benchmarks.engine.turns import Run, spread, there_and_back

# Seconds for all rounds of one provider, and the fewest and the most rounds; the fewest where one takes so long that it
# is a large part of a call (milliseconds).
SECONDS = 0.5
ROUNDS = (5, 50)
FEWEST, LONG = 3, 300.0
# Several times the L2 cache of any GPU so far.
FLUSHED_BYTES = 512 * 2**20


def time_providers(
    providers: Mapping[str, Run], *, ours: str, device: torch.device, flush: bool = True
) -> dict[str, dict]:
    """Time providers in turns: a device that slows down slows all of them.

    A rival that fails is left out and says why; ours must not fail.

    Args:
        providers: What to time; each allocates its own result.
        ours: Name of the one that is not a rival.
        device: A CUDA device.
        flush: Whether each run starts without its inputs in the L2 cache.

    Returns:
        For each provider ``ms`` (median, min, max), ``rounds`` and ``peak_mib``, the most that it allocated on
        top of its inputs; or ``failed``.
    """
    figures: dict[str, dict] = {}
    alive: dict[str, Run] = {}
    rounds, slowest = ROUNDS[1], 0.0
    cache = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device=device) if flush else None
    time = partial(_milliseconds, cache)
    for name, provider in providers.items():
        try:
            time(provider)  # compiles, and lets libraries make their workspaces
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            once = min(time(provider), time(provider))
            peak = torch.cuda.max_memory_allocated(device) - before
        except Exception as error:
            if name == ours:
                raise
            torch.cuda.empty_cache()
            figures[name] = {"failed": in_short(error)}
            continue
        alive[name] = provider
        figures[name] = {"peak_mib": round(peak / 2**20, 1)}
        slowest = max(slowest, once)
        rounds = min(rounds, round(1000 * SECONDS / max(once, 1e-3)))
    rounds = max(FEWEST if slowest > LONG else ROUNDS[0], rounds)
    for name, values in there_and_back(alive, rounds, time).items():
        figures[name] |= {"ms": spread(values), "rounds": len(values), "cold_l2": flush}
    return figures


def _milliseconds(cache: torch.Tensor | None, run: Run) -> float:
    """The time of one run on the device, after the cache is overwritten."""
    if cache is not None:
        cache.zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    result = run()
    end.record()
    end.synchronize()
    del result
    return start.elapsed_time(end)
