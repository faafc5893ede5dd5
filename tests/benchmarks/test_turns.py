"""Providers take turns, ours last in each round; cases in the records are those that are measured."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.cases import CPU_CASES, SHAPES_CPU
from benchmarks.turns import in_turns, seconds_of, spread

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "cpu-2-cores"


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
    found = in_turns(benchmark, providers, rounds=2)
    assert ran == ["loop", "fishkern"] * 2
    assert found == {"fishkern": [2.0, 4.0], "loop": [10.0, 30.0]}
    assert benchmark.extra_info == {"kept": 1, "fishkern": 3.0, "loop": 20.0}


def test_seconds_and_what_is_recorded_of_them():
    ran = []
    assert 0 < seconds_of(lambda: ran.append(1)) < 60
    assert ran == [1]
    assert spread([3.0, 1.0, 8.0]) == {"median": 3.0, "min": 1.0, "max": 8.0}


@pytest.mark.parametrize(
    ("name", "cases"),
    [
        ("whole_pass", [vars(case) for case in CPU_CASES]),
        ("rivals", [one.fields for case in SHAPES_CPU for one in (case, case.small())]),
    ],
)
def test_cases_of_the_records(name, cases):
    """A case that changes must be recorded again, and `plot` and the README would join what is not the same."""
    lines = (RESULTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    recorded = [json.loads(line)["case"] for line in lines]
    assert recorded
    assert all(case in cases for case in recorded)
