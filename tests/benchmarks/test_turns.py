"""Providers take turns, ours last in each round; cases in the records are those that are measured."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from benchmarks.cases import host_time, masked_step, rivals, streaming_topk, whole_pass
from benchmarks.engine import RESULTS
from benchmarks.engine.records import read
from benchmarks.engine.turns import in_turns, seconds_of, spread, there_and_back


def test_everyone_runs_once_in_each_round():
    ran = []

    def timed(name: str, seconds: float) -> float:
        ran.append(name)
        return seconds * len(ran)

    def pedantic(run, setup, rounds) -> None:
        for _ in range(rounds):
            setup()
            run()

    benchmark = SimpleNamespace(pedantic=pedantic, extra_info={"kept": 1})
    providers = {"fishkern": lambda: timed("fishkern", 1.0), "loop": lambda: timed("loop", 10.0)}
    seconds = in_turns(benchmark, providers, rounds=2)
    assert ran == ["loop", "fishkern"] * 2
    assert seconds == {"fishkern": [2.0, 4.0], "loop": [10.0, 30.0]}
    assert benchmark.extra_info == {"kept": 1, "fishkern": 3.0, "loop": 20.0}


def test_the_order_of_a_round_is_that_of_the_one_before_backwards():
    order = []
    values = there_and_back({"a": "a", "b": "b"}, 3, lambda provider: order.append(provider) or len(order))
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert values == {"a": [1, 4, 5], "b": [2, 3, 6]}


def test_seconds_and_what_is_recorded_of_them():
    ran = []
    assert 0 < seconds_of(lambda: ran.append(1)) < 60
    assert ran == [1]
    assert spread([3.0, 1.0, 8.0]) == {"median": 3.0, "min": 1.0, "max": 8.0}


@pytest.mark.parametrize(
    ("name", "cases"),
    [
        ("whole_pass", [whole_pass.fields(case) for case in whole_pass.CPU_CASES]),
        ("rivals", [one.fields for case in rivals.ON_CPU for one in (case, case.small())]),
        ("masked_step", [case.fields for case in masked_step.CASES]),
        ("streaming_topk", [vars(case) for case in streaming_topk.IN_MEMORY + streaming_topk.IN_FILE]),
        ("host_time", [{"parameters": name, "examples": 4, "tokens": 4} for name in host_time.CASES]),
    ],
)
def test_cases_of_the_records(name, cases):
    """A case that changes must be recorded again: `plot` and the pages would otherwise mix two cases."""
    recorded = [record["case"] for record in read(RESULTS / "cpu-2-cores" / f"{name}.jsonl")]
    assert recorded
    assert all(case in cases for case in recorded)
