"""The case of plans: its figures, in small."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

pytest.importorskip("transformers")
import fishkern as fk
from benchmarks.cases import plan
from benchmarks.engine.process import in_process
from benchmarks.subjects.transformers import LLAMA_TINY, Workload

SMALL = Workload(LLAMA_TINY, T=7, N=3, batches=3)

pytestmark = pytest.mark.skipif(not hasattr(fk, "plan"), reason="this fishkern has no plan")


@pytest.mark.slow
def test_figures_of_memory_and_planning():
    planned = {"accumulators_mib", "bases_mib", "activations_mib", "plan_mib", "peak_mib"}
    figures = plan.memory("DirectionEnergy", SMALL)
    assert figures.keys() == planned | {"weights_mib", "ratio"}
    # so small a pass may fit into memory that the process has already
    assert figures["ratio"] == pytest.approx(figures["peak_mib"] / figures["plan_mib"], abs=0.2)
    assert plan.planning("DiagonalFisher", replace(SMALL, device="meta")).keys() == planned | {
        "planned_weights_mib", "seconds", "cpu_seconds"
    }  # fmt: skip


@pytest.mark.slow
def test_figures_of_each_rank(tmp_path):
    with ThreadPoolExecutor(plan.RANKS) as threads:
        every = [
            threads.submit(in_process, "benchmarks.cases.plan:memory_of_rank", rank, str(tmp_path), SMALL, seconds=300)
            for rank in range(plan.RANKS)
        ]
    first, second = (one.result() for one in every)
    assert first["plan_mib"] == second["plan_mib"]
    least = first["accumulators_mib"] + first["activations_mib"]
    most = least + first["blocks_mib"] + first["gathered_mib"]
    assert least - 0.15 < first["plan_mib"] < most + 0.25  # each figure is rounded to a tenth
    assert min(first["peak_mib"], second["peak_mib"]) > 0


def test_times_are_of_the_batches_after_the_first():
    seconds = plan.of_later_batches(SMALL.model(), SMALL.data(), plan.Captured())
    assert len(seconds) == SMALL.batches - 1
    assert min(seconds) > 0


@pytest.mark.slow
def test_the_pass_without_projections_captures_the_same():
    model, data = SMALL.model(), SMALL.data()
    captured = fk.estimate(model, data, plan.Captured(), check=False)
    projected = fk.estimate(model, data, fk.DirectionEnergy(), check=False)
    assert captured.keys() == projected.keys()
    flops = fk.plan(model, data[0], fk.DirectionEnergy(), check=False).flops
    without = fk.plan(model, data[0], plan.Captured(), check=False).flops
    assert without["estimator"] == 0
    assert without["pass"] == flops["pass"] - flops["estimator"]
