"""``python -m benchmarks run``: red tests refuse to record, a missed goal does not, and nothing is lost or mixed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import _run
from benchmarks.provenance import machine

CASE = """
TESTS = [{tests}]

def test_one(record):
    record("{name}", {{"op": "{name}", "value": 1}})
    assert {goal}, "too slow"
"""
RECORD = "from benchmarks.conftest import *\n"


@pytest.fixture
def folder(tmp_path):
    """Case files and the tests that they name, one of which fails."""
    (tmp_path / "conftest.py").write_text(RECORD)
    for outcome in ("True", "False"):
        (tmp_path / f"check_{outcome}.py").write_text(f"def test():\n    assert {outcome}\n")

    def case(name: str, passing: bool = True, goal: str = "True") -> None:
        tests = repr(str(tmp_path / f"check_{passing}.py"))
        (tmp_path / f"test_{name}.py").write_text(CASE.format(name=name, tests=tests, goal=goal))

    tmp_path.joinpath("results").mkdir()
    case("good")
    case("red", passing=False)
    case("missed", goal="1 > 2")
    return tmp_path


def recorded(folder: Path) -> dict[str, list[dict]]:
    files = (folder / "results" / machine()["machine"]).glob("*.jsonl")
    return {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in files}


def test_red_tests_and_missed_goals(folder, capfd):
    """The case whose tests fail leaves no record, the others go on, and the status tells."""
    assert _run.run([], folder / "results", folder=folder) == 1
    assert {name: len(records) for name, records in recorded(folder).items()} == {"good": 1, "missed": 1}
    (record,) = recorded(folder)["good"]
    assert record.keys() >= {"value", "machine", "torch", "commit", "dirty", "time"}
    table = capfd.readouterr().out
    assert f"not recorded: {folder / 'check_False.py'} fails" in table
    assert "too slow" in table
    assert record["commit"][:7] in table
    assert ("with changes" in table) is record["dirty"]


def test_records_are_appended_or_replaced(folder, monkeypatch):
    monkeypatch.setattr(_run, "why_not", lambda *_: "")
    path = folder / "results" / machine()["machine"] / "good.jsonl"
    path.parent.mkdir()
    path.write_text('{"value": 0}\n')
    for expected, replace in ((2, False), (1, True)):
        assert _run.run(["good"], folder / "results", replace=replace, folder=folder) == 0
        assert len(recorded(folder)["good"]) == expected


def test_a_broken_case_leaves_nothing(folder, monkeypatch, capfd):
    """What is interrupted has recorded only a part."""
    monkeypatch.setattr(_run, "why_not", lambda *_: "")
    path = folder / "test_good.py"
    path.write_text(path.read_text().replace('assert True, "too slow"', "raise KeyboardInterrupt"))
    assert _run.run(["good"], folder / "results", folder=folder) == 1
    assert not recorded(folder)
    assert "pytest ended with status 2" in capfd.readouterr().out


def test_an_unknown_case_names_the_known_ones(folder, capsys):
    assert _run.run(["godo"], folder / "results", folder=folder) == 2
    assert capsys.readouterr().err.strip() == "no case is called godo; there are good, missed, red."


def test_every_case_names_tests_that_exist():
    for name, path in _run.cases([]).items():
        tests = _run.tests_of(path)
        assert tests, f"{name} has no TESTS"
        assert all((_run.ROOT / test).exists() for test in tests), name


def test_a_case_without_tests_is_refused():
    assert "has no TESTS" in _run.why_not("some", [], {})
    assert "does not exist" in _run.why_not("some", ["tests/nowhere.py"], {})
