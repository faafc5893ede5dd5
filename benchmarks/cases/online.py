"""A training step that is also read for the Fisher, against the same step alone.

A small LLaMA trains with torch's fused AdamW on every parameter; both take turns on a model of their own, with the same
weights and batch. The context is open all the while, and its set-up is not timed: it is paid once for a whole training.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from statistics import median

import pytest
import torch

import fishkern as fk
from benchmarks.engine.turns import Run, in_turns, seconds_of, spread
from benchmarks.subjects.transformers import Workload, small_llama

TESTS = {"run": ["tests/statistics/test_online.py"]}
CASES = [Workload(small_llama(4, 256), T, batches=1) for T in (16, 64, 256)]
ROUNDS = 15
WARM_UP = 3
MOST = 1.6  # times a step alone, due from T = DUE_FROM
DUE_FROM = 64
PROVIDERS = ("fishkern", "step_alone")

pytestmark = pytest.mark.skipif(not hasattr(fk, "OnlineFisher"), reason="this fishkern has no OnlineFisher")


def label(case: Workload) -> str:
    return f"N={case.N},T={case.T},layers={case.shape.layers},hidden={case.shape.hidden}"


def stepper(provider: str, case: Workload, opened: ExitStack) -> Run:
    """Forward, backward and step on the only batch; the context is closed with the stack."""
    model, (batch,) = case.model().train(), case.data()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    if provider == "fishkern":
        online = opened.enter_context(fk.OnlineFisher(model, decay=0.95))

        def read() -> None:
            step()
            online.step()  # within the time of its own step, not of the next

        return read
    return step


def compared() -> dict[str, dict[str, Callable[[], Run]]]:
    """For ``python -m benchmarks compare``."""
    opened = ExitStack()  # until the process ends
    return {label(case): {name: partial(stepper, name, case, opened) for name in PROVIDERS} for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=label)
def test_online(case, benchmark, record):
    with ExitStack() as opened:
        steps = {name: stepper(name, case, opened) for name in PROVIDERS}
        for step in steps.values():
            for _ in range(WARM_UP):
                step()
        seconds = in_turns(benchmark, {name: partial(seconds_of, step) for name, step in steps.items()}, ROUNDS)
    for name, values in seconds.items():
        record(
            "online",
            {
                "op": "online",
                "quantity": "time",
                "case": {"N": case.N, "T": case.T},
                "model": {"layers": case.shape.layers, "hidden": case.shape.hidden},
                "dtype": "float32",
                "attention": "sdpa",
                "optimizer": "torch.optim.AdamW(fused=True)",
                "provider": name,
                "seconds": spread(values),
                "rounds": ROUNDS,
            },
        )
    if case.T >= DUE_FROM:
        assert median(seconds["fishkern"]) <= MOST * median(seconds["step_alone"])
