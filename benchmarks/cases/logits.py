"""Logits in chunks against logits as a whole, in a pass over LoRA on a LLaMA with a vocabulary of 128,256.

Such logits are the largest tensors of a pass. Memory is that of tensors in one whole estimate, its set-up included and
without the comparison with autograd; time that of a prepared pass of a smaller model over fewer tokens, so that all
ends in minutes. Positions without a label, which chunks leave out, there are next to none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import pytest

import fishkern as fk
from benchmarks.engine.memory import rounded, step_peak_mib
from benchmarks.engine.process import in_process
from benchmarks.engine.records import Record
from benchmarks.engine.turns import Run, in_turns, seconds_of, spread
from benchmarks.subjects.transformers import LLAMA_TINY, Shape, Workload

TESTS = {"run": ["tests/statistics/test_chunked_head.py"]}
SHAPE = Shape(layers=4, hidden=1024, intermediate=2752, vocabulary=128256, heads=8, key_heads=4)
CASE = Workload(SHAPE, T=512, N=8, batches=1, lora=8)
TIMED = replace(CASE, T=68, shape=replace(SHAPE, hidden=512, intermediate=1376))  # just above the limit
ROUNDS = 3
SECONDS = 150  # that a measurement in a process of its own may take
LESS = 4  # times less memory than with logits as a whole
SLOWER = 1.05  # times the time
PROVIDERS = ("fishkern", "whole")

pytestmark = pytest.mark.skipif(not hasattr(fk.CausalLM(), "logits_bytes"), reason="this fishkern forms logits whole")


def likelihood(provider: str, limit: int | None = None) -> fk.CausalLM:
    """The library's own limit, or another one; and none at all."""
    if provider == "whole":
        return fk.CausalLM(logits_bytes=None)
    return fk.CausalLM() if limit is None else fk.CausalLM(logits_bytes=limit)


def passing(provider: str, case: Workload, limit: int | None = None) -> Run:
    """A prepared pass."""
    model, data = case.model(), case.data()
    chosen = likelihood(provider, limit)
    prepared = fk.prepare(model, data[0], likelihood=chosen, check=False)
    return partial(fk.estimate, model, data, prepared=prepared)


def compared() -> dict[str, dict[str, Callable[[], Run]]]:
    """For ``python -m benchmarks compare``."""
    return {str(TIMED): {name: partial(passing, name, TIMED) for name in PROVIDERS}}


def description(case: Workload, provider: str, quantity: str) -> dict[str, Any]:
    """The fields of a record other than its figures."""
    shared = {"op": "logits", "quantity": quantity, "case": case.fields, "attention": "sdpa", "dtype": case.dtype}
    return {**shared, "provider": provider, "logits_bytes": likelihood(provider).logits_bytes}


def test_time(benchmark, record):
    passes = {name: passing(name, TIMED) for name in PROVIDERS}
    assert "logits" in passes["fishkern"]().provenance["runs"][0]  # they are above the limit
    timed = {name: partial(seconds_of, run) for name, run in passes.items()}
    seconds = in_turns(benchmark, timed, ROUNDS)
    for name, values in seconds.items():
        record("logits", {**description(TIMED, name, "time"), "seconds": spread(values), "rounds": ROUNDS})
    ratio = median(seconds["fishkern"]) / median(seconds["whole"])
    assert ratio <= SLOWER, f"{ratio:.2f} times the time of logits as a whole, at most {SLOWER}"


def test_peak_memory(record):
    peaks = {}
    for name in PROVIDERS:
        figures = in_process("benchmarks.cases.logits:memory", name, CASE, seconds=SECONDS)
        record("logits", {**description(CASE, name, "memory"), **figures})
        peaks[name] = figures["peak_mib"]
    ratio = peaks["whole"] / peaks["fishkern"]
    assert ratio >= LESS, f"{ratio:.2f} times less than with logits as a whole, at least {LESS}"


def memory(provider: str, case: Workload, limit: int | None = None) -> Record:
    """The peak of an estimate above the loaded model."""
    tiny = Workload(LLAMA_TINY, T=4, N=2, batches=1)
    fk.estimate(tiny.model(), tiny.data())  # libraries are loaded and allocate on first use
    model, data = case.model(), case.data()
    run = partial(fk.estimate, model, data, likelihood=likelihood(provider, limit), check=False)
    return rounded({"peak_mib": step_peak_mib(run)})
