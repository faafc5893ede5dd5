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

    conftest = "from benchmarks.conftest import *\n"
    return plant(
        conftest=conftest, good=case("good"), red=case("red", passing=False), missed=case("missed", goal="1 > 2")
    )


def recorded(folder: Path) -> dict[str, list[dict]]:
    files = (folder / "results" / machine()["machine"]).glob("*.jsonl")
    return {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in files}


def test_red_tests_and_missed_goals(package, tmp_path, capfd):
    """The case whose tests fail leaves no record, the others go on, and the status tells."""
    assert command.run([], tmp_path / "results", package=package) == 1
    assert {name: len(records) for name, records in recorded(tmp_path).items()} == {"good": 1, "missed": 1}
    (record,) = recorded(tmp_path)["good"]
    assert record.keys() >= {"value", "machine", "torch", "commit", "dirty", "time"}
    table = capfd.readouterr().out
    assert f"not recorded: {tmp_path / 'check_False.py'} fails" in table
    assert "too slow" in table
    assert record["commit"][:7] in table
    assert ("with changes" in table) is record["dirty"]


def test_records_are_appended_or_replaced(package, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "why_not", lambda *_: "")
    path = tmp_path / "results" / machine()["machine"] / "good.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text('{"value": 0}\n')
    for expected, replace in ((2, False), (1, True)):
        assert command.run(["good"], tmp_path / "results", replace=replace, package=package) == 0
        assert len(recorded(tmp_path)["good"]) == expected


def test_a_broken_case_leaves_nothing(package, tmp_path, monkeypatch, capfd):
    """An interrupted case has recorded only a part."""
    monkeypatch.setattr(command, "why_not", lambda *_: "")
    path = tmp_path / package / "good.py"
    path.write_text(path.read_text().replace('assert True, "too slow"', "raise KeyboardInterrupt"))
    assert command.run(["good"], tmp_path / "results", package=package) == 1
    assert not recorded(tmp_path)
    assert "pytest ended with status 2" in capfd.readouterr().out


def test_an_unknown_case_names_the_known_ones(package, tmp_path, capsys):
    assert command.run(["godo"], tmp_path / "results", package=package) == 2
    assert capsys.readouterr().err.strip() == "no case is called godo; there are good, missed, red."


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
