"""The case of parts: its figures, in small."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("transformers")
from benchmarks.cases import parts
from benchmarks.engine.process import in_process
from benchmarks.subjects.transformers import LLAMA_TINY, Shape, Workload

SMALL = Workload(LLAMA_TINY, T=7, N=2, batches=1)


@pytest.mark.slow
def test_figures_of_planning():
    figures = parts.planning(replace(SMALL, device="meta"), "1GiB")
    assert figures["passes"] == 1
    # a single pass also follows entries for its precision, 52 bytes for each
    followed = 52 * figures["parameters"] / 2**20
    assert figures["one_pass_plan_mib"] == pytest.approx(figures["plan_mib"] + followed, abs=0.1)
    assert figures["one_pass_plan_mib"] <= figures["budget_mib"] == 1024


@pytest.mark.slow
def test_a_limit_that_ends_one_pass():
    shape = Shape(layers=16, hidden=512, intermediate=1376, vocabulary=2000, heads=8, key_heads=4)
    figures = in_process("benchmarks.cases.parts:measured", Workload(shape, T=4, N=2, batches=1), seconds=600)
    assert "allocate" in figures["one_pass"]
    assert figures["passes"] > 1
    assert figures["finite"] == figures["parameters"]
