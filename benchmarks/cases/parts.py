"""A Fisher whose sums do not fit into memory, in parts: passes and peak, and that one pass alone runs out of it.

A LLaMA of 322 million parameters with random weights runs in a process of its own. Above the loaded model the process
may take half of the bytes of the float32 sums (RLIMIT_DATA, which counts what is reserved and not what is mapped from
files). ``fk.plan`` divides the parameters, and the results of each part go to files. An 8B shape is planned alone, on
the meta device: how many passes a budget needs, and what the largest of them takes.
"""

from __future__ import annotations

import gc
import os
import tempfile
import time
import traceback
from functools import partial

import pytest
from torch import nn

import fishkern as fk
from benchmarks.engine.memory import GIB, MIB, peak_mib, resident_mib, rounded, weights_mib
from benchmarks.engine.process import in_process, limit_memory
from benchmarks.engine.records import Record
from benchmarks.subjects.transformers import LLAMA_8B, LLAMA_322M, LLAMA_TINY, Workload

TESTS = {"run": ["tests/statistics/test_parts.py", "tests/statistics/test_plan.py"]}
CASE = Workload(LLAMA_322M, T=8, N=2, batches=2)
LARGE = Workload(LLAMA_8B, T=512, N=1, batches=1, dtype="bfloat16", device="meta")
BUDGETS = ("12GiB", "16GiB")  # above the weights, for the 8B shape
SHARE = 0.5  # of the bytes of the sums, for the measured one
MARGINS = (1.1, 1.3, 1.6)  # of the limit over the plan, tried in turn: a plan has no scratch of libraries
SECONDS = 1800  # that a measurement in a process of its own may take

pytestmark = pytest.mark.skipif(not hasattr(fk.PassPlan, "parts"), reason="this fishkern has no parts")


@pytest.fixture
def say(capsys):
    """Print a line also where pytest keeps back what is printed."""

    def line(text: str) -> None:
        with capsys.disabled():
            print(f"\n    {text}", flush=True)

    return line


def description(case: Workload, quantity: str) -> Record:
    """The fields of a record other than its figures."""
    shared = {"op": "parts", "quantity": quantity, "case": case.fields, "attention": "sdpa", "dtype": case.dtype}
    return {**shared, "provider": "fishkern", "estimator": "DiagonalFisher"}


def test_within_half_of_the_sums(record, say):
    figures = in_process("benchmarks.cases.parts:measured", CASE, seconds=SECONDS)
    record("parts", {**description(CASE, "memory"), **figures})
    say(f"sums of {figures['accumulators_mib']} MiB in {figures['passes']} passes within {figures['limit_mib']} MiB")
    assert figures["parameters"] >= 3e8
    assert "allocate" in figures["one_pass"]
    assert figures["plan_mib"] <= figures["limit_mib"] == pytest.approx(SHARE * figures["accumulators_mib"], abs=0.1)
    assert figures["finite"] == figures["parameters"]


def measured(case: Workload) -> Record:
    """What a pass takes in parts, and how one without parts ends under the same limit."""
    tiny = Workload(LLAMA_TINY, T=4, N=2, batches=1)
    fk.estimate(tiny.model(), tiny.data())  # libraries are loaded and allocate on first use
    model, data = case.model(), case.data()
    whole = fk.plan(model, data[0])
    limit = int(SHARE * whole.accumulator_bytes)
    limit_memory(limit / GIB)
    one_pass = ""
    try:
        fk.estimate(model, data)
    except (MemoryError, RuntimeError) as error:
        one_pass = next(iter(str(error).splitlines()), "")
    with tempfile.TemporaryDirectory(dir=os.getcwd()) as folder:
        for margin in MARGINS:
            gc.collect()
            parts, results = whole.parts(int(limit / margin)), []
            before, began = resident_mib("VmRSS"), time.perf_counter()
            try:
                peak = peak_mib(partial(_estimate, model, data, parts, folder, results))
                break
            except (MemoryError, RuntimeError):
                if margin == MARGINS[-1]:
                    raise
                traceback.print_exc()
        seconds = time.perf_counter() - began
        names = ("VmRSS", "RssAnon", "RssFile", "RssShmem")
        resident = {f"after_{name}_mib": resident_mib(name) for name in names}
        finite = sum(int(results[0][name].isfinite().sum()) for name in results[0])
        planned = fk.plan(model, data[0], parts=parts, results_on=folder)
    figures = {
        "weights_mib": weights_mib(model),
        "accumulators_mib": whole.accumulator_bytes / MIB,
        "limit_mib": limit / MIB,
        "one_pass_plan_mib": whole.peak_bytes / MIB,
        "plan_mib": planned.peak_bytes / MIB,
        "resident_before_mib": before,
        "resident_peak_above_mib": peak,
        **resident,
        "seconds": seconds,
    }
    counts = {"parameters": results[0].total, "finite": finite, "passes": planned.passes, "margin": margin}
    return {**rounded(figures), **counts, "one_pass": one_pass[:160]}


def _estimate(model: nn.Module, data: list, parts: list[list[str]], folder: str, results: list) -> None:
    results.append(fk.estimate(model, data, parts=parts, results_on=folder))


@pytest.mark.parametrize("budget", BUDGETS)
def test_large_shape_on_the_meta_device(budget, record, say):
    figures = in_process("benchmarks.cases.parts:planning", LARGE, budget, seconds=SECONDS)
    record("parts", {**description(LARGE, "planning"), "budget": budget, **figures})
    say(f"an 8B shape within {budget}: {figures['passes']} passes, the largest of {figures['plan_mib']} MiB")
    assert figures["plan_mib"] <= figures["budget_mib"]


def planning(case: Workload, budget: str) -> Record:
    """The passes that a budget needs, and the peak of the largest, rehearsed as it would run."""
    model = case.model()
    batch = Workload(case.shape, T=case.T, N=case.N, batches=1, dtype=case.dtype).data()[0]
    began = time.process_time()
    whole = fk.plan(model, batch)
    parts = whole.parts(budget)
    seconds = time.process_time() - began
    heaviest = max(parts, key=lambda part: sum(whole.state_bytes[name] for name in part))
    planned = fk.plan(model, batch, parameters=heaviest, parts=[heaviest])
    figures = {
        "budget_mib": float(budget.removesuffix("GiB")) * 1024,
        "planned_weights_mib": whole.weight_bytes / MIB,
        "accumulators_mib": whole.accumulator_bytes / MIB,
        "one_pass_plan_mib": whole.peak_bytes / MIB,
        "beside_mib": whole.beside_bytes / MIB,
        "plan_mib": planned.peak_bytes / MIB,
        "cpu_seconds": seconds,
    }
    return {**rounded(figures), "passes": len(parts), "parameters": sum(p.numel() for p in model.parameters())}
