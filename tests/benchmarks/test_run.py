"""``python -m benchmarks run``: red tests refuse to record, a missed goal does not, and nothing is lost or mixed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.engine import ROOT, discover
from benchmarks.engine import run as command
from benchmarks.engine.origin import machine
from benchmarks.engine.records import Records, read

CASE = """
TESTS = {{"run": [{tests!r}]}}

def test_one(record):
    record("{name}", {{"op": "{name}", "value": 1}})
    assert {goal}, "too slow"
"""


@pytest.fixture
def package(tmp_path, plant):
    """Cases and the tests that they name, one of which fails."""
    for outcome in ("True", "False"):
        (tmp_path / f"check_{outcome}.py").write_text(f"def test():\n    assert {outcome}\n")

    def case(name: str, passing: bool = True, goal: str = "True") -> str:
        return CASE.format(tests=str(tmp_path / f"check_{passing}.py"), name=name, goal=goal)

    return plant(
        conftest="from benchmarks.conftest import *\n",
        good=case("good"),
        red=case("red", passing=False),
        missed=case("missed", goal="1 > 2"),
        broken=case("broken").replace('assert True, "too slow"', "raise KeyboardInterrupt"),
    )


def earlier(folder: Path, name: str) -> None:
    """A record of an earlier run."""
    path = folder / "results" / machine()["machine"] / f"{name}.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text('{"value": 0}\n')


def recorded(folder: Path) -> dict[str, list[dict]]:
    files = (folder / "results" / machine()["machine"]).glob("*.jsonl")
    return {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in files}


@pytest.mark.slow
def test_red_tests_missed_goals_and_broken_cases(package, tmp_path, capfd):
    """Cases whose tests fail and interrupted ones leave no record, the others go on, and the status tells."""
    earlier(tmp_path, "missed")
    assert command.run(["red", "broken", "missed"], tmp_path / "results", package=package) == 1
    records = recorded(tmp_path)
    assert {name: len(lines) for name, lines in records.items()} == {"missed": 2}  # appended
    record = records["missed"][1]
    assert record.keys() >= {"value", "machine", "torch", "commit", "dirty", "time"}
    table = capfd.readouterr().out
    assert f"not recorded: {tmp_path / 'check_False.py'} fails" in table
    assert "pytest ended with status 2" in table
    assert "too slow" in table
    assert record["commit"][:7] in table
    assert ("with changes" in table) is record["dirty"]


@pytest.mark.parametrize("replace, values", [(False, [0, 1]), (True, [1])])
def test_records_are_appended_or_replaced(package, tmp_path, monkeypatch, replace, values):
    """And the status is 0, where nothing went wrong; what is measured is given here."""

    def measure(module, results: Path, outcome: command.Outcome, *, replace: bool) -> None:
        measured = tmp_path / "good.jsonl"
        measured.write_text('{"value": 1, "commit": "abcdef0123", "dirty": false}\n')
        command._add(measured, results / machine()["machine"] / "good.jsonl", outcome, replace=replace)

    monkeypatch.setattr(command, "why_not", lambda *_: "")
    monkeypatch.setattr(command, "_measure", measure)
    earlier(tmp_path, "good")
    assert command.run(["good"], tmp_path / "results", replace=replace, package=package) == 0
    assert [record["value"] for record in recorded(tmp_path)["good"]] == values


def test_an_unknown_case_names_the_known_ones(package, tmp_path, capsys):
    assert command.run(["godo"], tmp_path / "results", package=package) == 2
    assert capsys.readouterr().err.strip() == "no case is called godo; there are broken, good, missed, red."


def test_every_case_names_tests_that_exist():
    cases = discover.discover("run")
    assert cases.keys() >= {"whole_pass", "masked_step", "streaming_topk", "host_time"}
    for name, module in cases.items():
        assert module.TESTS["run"], f"{name} has no TESTS"
        assert all((ROOT / test).exists() for test in module.TESTS["run"]), name


def test_a_case_without_tests_is_refused():
    assert "has no TESTS" in command.why_not("some", [], {})
    assert "does not exist" in command.why_not("some", ["tests/nowhere.py"], {})


def test_records_are_found_by_their_fields(tmp_path):
    """Lists in a file are the tuples of a setting; records of another setting are no part of these."""
    path = tmp_path / "machine" / "some.jsonl"
    records = Records(path, origin=lambda: {"commit": "abc"}, setting={"sizes": (1, 2)})
    assert records.find() == []
    records.append({"n": 1}, {"n": 2})
    Records(path, origin=dict, setting={"sizes": (3,)}).append({"n": 1})
    assert records.find(n=2) == [{"setting": {"sizes": [1, 2]}, "n": 2, "commit": "abc"}]
    assert len(Records(path, setting={"sizes": [1, 2]}).find()) == 2
    assert len(read(path)) == 3
