"""The step of a masked AdamW on a CPU against what people do today: time of the step, peak memory of training.

All providers take turns within each round, on one model whose gradients stay as they are.
"""

from __future__ import annotations

import time
from statistics import median

import pytest
import torch

from benchmarks.masked_cases import CASES, PROVIDERS, Step, peak_memory
from benchmarks.turns import spread

TESTS = ["tests/ops/test_masked_adamw.py", "tests/laws/test_optimizers.py", "tests/optim"]
ROUNDS = 9
COMPARED = {str(case): ["fishkern", "six_lines"] for case in CASES}  # by `python -m benchmarks compare`


def prepare(described: str, provider: str) -> Step:
    """Make one of :data:`COMPARED`."""
    (case,) = (case for case in CASES if str(case) == described)
    model = case.build()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return PROVIDERS[provider](model, case.selection(model))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_time(case, benchmark, record):
    """``host`` is the time that this thread computes, without what the others do for it."""
    model = case.build()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    selection = case.selection(model)
    steps = {name: provider(model, selection) for name, provider in PROVIDERS.items()}
    for step in steps.values():  # which makes its state
        step()
    seconds: dict[str, list[float]] = {name: [] for name in PROVIDERS}
    host: dict[str, list[float]] = {name: [] for name in PROVIDERS}

    def take_turns() -> None:
        for name, step in steps.items():
            start, own = time.perf_counter(), time.thread_time()
            step()
            seconds[name].append(time.perf_counter() - start)
            host[name].append(time.thread_time() - own)

    benchmark.pedantic(take_turns, rounds=ROUNDS)
    for name, values in seconds.items():
        record(
            "masked_step",
            {
                "op": "masked_adamw",
                "quantity": "time",
                "case": vars(case),
                "dtype": "float32",
                "provider": name,
                "seconds": spread(values),
                "host_seconds": {"median": median(host[name])},
                "rounds": ROUNDS,
            },
        )
        benchmark.extra_info[name] = round(1e3 * median(values), 3)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_peak_memory(case, provider, record):
    """Of forward, backward and step together."""
    figures = peak_memory(provider, case)
    record(
        "masked_step",
        {
            "op": "masked_adamw",
            "quantity": "memory",
            "case": vars(case),
            "dtype": "float32",
            "provider": provider,
            **figures,
        },
    )
