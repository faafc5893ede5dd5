"""The step of a masked AdamW on a CPU against common practice: time of the step, peak memory of training.

All providers take turns within each round, on one model whose gradients stay as they are. On a GPU:
:mod:`benchmarks.cases.masked_adamw`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median

import pytest
import torch

from benchmarks.engine.memory import activations_mib, peak_mib, rounded, weights_mib
from benchmarks.engine.process import in_process
from benchmarks.engine.records import Record
from benchmarks.engine.turns import Run, spread
from benchmarks.rivals.providers import MASKED, runs
from benchmarks.subjects.masks import MODELS, MaskedStep

TESTS = {"run": ["tests/ops/test_masked_adamw.py", "tests/laws/test_optimizers.py", "tests/optim"]}
ROUNDS = 9
PROVIDERS = runs(MASKED)
CASES = [MaskedStep(model, density) for model in ("lora", "llama") for density in (0.001, 0.005, 0.05, 0.5)]


def compared() -> dict[str, dict[str, Callable[[], Run]]]:
    """For ``python -m benchmarks compare``."""

    def make(case: MaskedStep, provider: str) -> Run:
        trained = case.trained()
        return PROVIDERS[provider](trained, case.selection(trained))

    return {str(case): {name: partial(make, case, name) for name in ("fishkern", "six_lines")} for case in CASES}


def description(case: MaskedStep, provider: str, quantity: str) -> Record:
    """The fields of a record other than its figures."""
    shared = {"op": "masked_adamw", "quantity": quantity, "case": case.fields, "dtype": case.dtype}
    return {**shared, "provider": provider}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_time(case, benchmark, record):
    """``host`` is the time in which this thread computes, without that of the others."""
    trained = case.trained()
    selection = case.selection(trained)
    steps = {name: provider(trained, selection) for name, provider in PROVIDERS.items()}
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
        figures = {"seconds": spread(values), "host_seconds": {"median": median(host[name])}, "rounds": ROUNDS}
        record("masked_step", {**description(case, name, "time"), **figures})
        benchmark.extra_info[name] = round(1e3 * median(values), 3)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_peak_memory(case, provider, record):
    """Of forward, backward and step together."""
    figures = in_process("benchmarks.cases.masked_step:memory", provider, case)
    record("masked_step", {**description(case, provider, "memory"), **figures})


def memory(provider: str, case: MaskedStep) -> Record:
    """The peak of two training steps above the loaded model, selection included, and two parts of it."""
    model, trained = case.in_its_model()
    vocabulary = MODELS[case.model][0].vocabulary
    ids = torch.randint(0, vocabulary, (2, 32))
    batch = {"input_ids": ids, "labels": ids}

    def train() -> None:
        step = PROVIDERS[provider](trained, case.selection(trained))
        for _ in range(2):
            model(**batch, use_cache=False).loss.backward()
            step()
            model.zero_grad()

    figures = {"weights_mib": weights_mib(model), "activations_mib": activations_mib(model, batch)}
    return rounded({**figures, "peak_mib": peak_mib(train)})
