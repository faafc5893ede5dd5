"""One call of the measurements on a GPU: its plan, its records, and the cost of a part or a test that goes wrong."""

from __future__ import annotations

import json
import re
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.engine import ROOT
from benchmarks.gpu import Part, device_tests, limits, table, worker
from benchmarks.gpu import session as gpu_session

CPU = torch.device("cpu")
COPY = {"provider": "torch", "bytes": 4e12, "ms": {"median": 2000.0}}  # 2 TB/s
GEMM = {"provider": "torch", "dtype": "bfloat16", "flops": 5e14, "ms": {"median": 1000.0}}


class Here:
    """In place of a worker, where a test is not about its process: measures in this one."""

    def __init__(self, module: str, device: torch.device) -> None:
        self._case = (module, str(device))

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def measure(self, part: str, seconds: float) -> worker.Outcome:
        return worker.measured_by_name(*self._case, part)


def outcome_by_name(tests: list[str], seconds: float) -> dict:
    """In place of pytest, where a test is not about it: what is called red is red."""
    red = [path for path in tests if "red" in Path(path).stem]
    return {"passed": len(tests) - len(red), "failed": len(red), "skipped": 0, "red": red, "seconds": 0.1}


@pytest.fixture
def session(processes, monkeypatch):
    """Runs cases, given as texts, on a machine of which only the name is known; all in this process."""
    monkeypatch.setattr(gpu_session, "Worker", Here)
    monkeypatch.setattr(gpu_session, "on_device", outcome_by_name)
    return processes


@pytest.fixture
def processes(monkeypatch, tmp_path, plant):
    """A session with the tests and the parts of a case in processes of their own, as they really are."""
    origin = {"commit": "abc", "dirty": False}
    sources = ["the first"]
    monkeypatch.setattr(gpu_session, "machine", lambda: {"machine": "some-gpu"})
    monkeypatch.setattr(gpu_session, "gpu_state", dict)
    monkeypatch.setattr(gpu_session, "software", lambda revision: {**origin, "commit": revision or origin["commit"]})
    monkeypatch.setattr(gpu_session, "sources", lambda: sources[0])
    monkeypatch.setattr(gpu_session, "RESULTS", tmp_path / "committed")
    package = plant()

    def plant_cases(**files: str) -> None:
        plant(**{name: HEAD + textwrap.dedent(text) for name, text in files.items()})

    def run(**options) -> int:
        return gpu_session.run(gpu_session.cases(package), CPU, tmp_path / "results", **options)

    def records() -> dict[tuple[str, str], list[dict]]:
        grouped: dict[tuple[str, str], list[dict]] = {}
        for record in gpu_session.recorded(folder):
            grouped.setdefault((record["op"], record["part"]), []).append(record)
        return grouped

    folder = tmp_path / "results" / "some-gpu"
    return SimpleNamespace(plant=plant_cases, run=run, records=records, folder=folder, origin=origin, sources=sources)


HEAD = f"""
import os, pathlib, signal, time, torch
from functools import partial
from benchmarks.gpu import Part
TESTS = {{"gpu": []}}
COPY = {COPY}
def good(*records):
    yield from records or [COPY]
def fails(error):
    raise error
    yield
def dies():
    os.kill(os.getpid(), signal.SIGSEGV)
    yield
def hangs():
    time.sleep(1000)
    yield
"""


def a_test(tmp_path: Path, name: str, body: str) -> str:
    path = tmp_path / f"test_{name}.py"
    path.write_text(f"import time\ndef test_{name}():\n    {body}\n")
    return str(path)


@pytest.mark.slow
def test_what_goes_wrong_costs_its_own_part(processes, tmp_path, capfd):
    """A red test, a test without an end, a signal, a hang and memory that runs out: all other parts are recorded."""
    session = processes
    red, endless = a_test(tmp_path, "red", "assert False"), a_test(tmp_path, "endless", "time.sleep(1000)")
    green = a_test(tmp_path, "green", "pass")
    session.plant(
        unwell="""
            full = torch.OutOfMemoryError("2 TiB are missing")
            parts = lambda d: [
                Part("before", good), Part("full", partial(fails, full)), Part("after that", good), Part("dies", dies),
                Part("hangs", hangs, seconds=1), Part("after", good),
            ]
        """,
        endless=f'TESTS, TESTED_IN = {{"gpu": ["{endless}"]}}, 3\nparts = lambda d: [Part("never", good)]',
        red=f'TESTS = {{"gpu": ["{green}", "{red}"]}}\nparts = lambda d: [Part("never", good)]',
    )
    assert session.run(seconds=600, patience=1) == 1
    said = capfd.readouterr()
    kept = session.records()
    green = {key for key, records in kept.items() if not records[0].get("red")}
    assert green == {("unwell", part) for part in ("before", "after that", "after")}
    assert (kept["red", "tests"][0]["passed"], kept["red", "tests"][0]["failed"]) == (1, 1)
    assert kept["red", "tests"][0]["red"][0].endswith("test_red.py::test_red")
    assert kept["endless", "tests"][0]["stopped"] == "stopped after 3 s"
    for why in (
        "unwell/dies: its process ended: SIGSEGV", "unwell/hangs: it hangs: stopped after 1 s",
        "unwell/full: OutOfMemoryError: 2 TiB are missing", "red/never: tests of it are red",
        "endless/never: tests of it are red",
    ):  # fmt: skip
        assert why in said.err


def test_only_repaired_parts_are_measured_again(session, tmp_path):
    red, green = a_test(tmp_path, "red", "assert False"), a_test(tmp_path, "green", "pass")
    failing = 'parts = lambda d: [Part("before", good), Part("fails", partial(fails, ValueError("no")))]'
    never = 'parts = lambda d: [Part("never", good)]'
    session.plant(part=failing, red=f'TESTS = {{"gpu": ["{green}", "{red}"]}}\n{never}')
    assert session.run() == 1
    kept = session.records()
    session.plant(part='parts = lambda d: [Part("before", good), Part("fails", good)]', red=never)
    assert session.run() == 0
    assert session.records().keys() - kept.keys() == {("part", "fails"), ("red", "never")}
    assert all(len(session.records()[key]) == len(records) for key, records in kept.items())


def test_one_line_for_each_measurement_one_file_for_each_call(session, capfd):
    session.plant(
        op='parts = lambda d: [Part("first", lambda: good(COPY, COPY)), Part("rival", lambda: good({"provider": "x", '
        '"failed": "OutOfMemoryError: 1 TiB"})), Part("a trace", lambda: good({"trace.gz": b"bytes"}))]'
    )
    assert session.run() == 0
    (path,) = session.folder.glob("*.jsonl")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(r["op"], r["part"]) for r in records] == [
        ("op", "first"), ("op", "first"), ("op", "rival"), ("op", "a trace"),
    ]  # fmt: skip
    assert all({"commit", "sources", "machine", "time", "tested"} <= r.keys() for r in records)
    assert (session.folder / records[-1]["trace.gz"]).read_bytes() == b"bytes"
    assert re.fullmatch(r"[\w.-]+", records[-1]["trace.gz"])
    said = capfd.readouterr().out
    assert "failed: OutOfMemoryError: 1 TiB" in said
    assert "Planned: 1.2 of 8.7 minutes." in said
    assert "0.9  op: 3 parts" in said


def test_what_is_recorded_is_not_measured_again(session, tmp_path):
    """Of the same sources, whether its records are in the folder of results or committed already."""
    green = a_test(tmp_path, "green", "pass")
    session.plant(op=f'TESTS = {{"gpu": ["{green}"]}}\nparts = lambda d: [Part("a", good), Part("b", good)]')
    assert session.run(only=["op/a"]) == 0
    assert session.run() == 0
    assert {key: len(records) for key, records in session.records().items()} == {
        ("op", "tests"): 1, ("op", "a"): 1, ("op", "b"): 1,
    }  # fmt: skip
    committed = tmp_path / "committed" / "some-gpu"
    committed.parent.mkdir()
    session.folder.rename(committed)
    assert session.run() == 0
    assert not session.folder.exists()
    session.sources[0] = "others"
    assert session.run(only=["op/tests"]) == 0
    assert session.records().keys() == {("op", "tests")}


def test_a_folder_named_in_two_ways_is_read_once(session, tmp_path, monkeypatch, capfd):
    session.plant(op='parts = lambda d: [Part("a", good)]')
    assert session.run() == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(gpu_session, "RESULTS", tmp_path / "elsewhere" / ".." / "results")
    capfd.readouterr()
    assert session.run() == 0
    assert capfd.readouterr().out.count("op/a ") == 1


def test_begins_nothing_that_does_not_fit(session, capfd):
    session.plant(op='parts = lambda d: [Part("short", good, 5), Part("long", good, 500), Part("short too", good, 1)]')
    assert session.run(seconds=100) == 3
    assert session.records().keys() == {("op", "short")}
    said = capfd.readouterr().out
    assert "does not fit: op/long, op/short too" in said
    assert "Left for the next call, which finds what is recorded: op/long, op/short too." in said


def test_records_say_whether_the_tests_ran(session, tmp_path, capfd):
    session.plant(
        op=f'TESTS = {{"gpu": ["{a_test(tmp_path, "red", "assert False")}"]}}\nparts = lambda d: [Part("a", good)]'
    )
    assert session.run(skip_tests=True) == 0
    assert "Recorded without the tests (--tested): op/a." in capfd.readouterr().out
    assert session.records()["op", "a"][0]["tested"] is False


def test_what_cannot_be_asked_for(session):
    session.plant(one='parts = lambda d: [Part("a", good)]')
    with pytest.raises(ValueError, match="there is nothing called one/c; there are one"):
        session.run(only=["one/c"])
    session.origin["commit"] = ""
    with pytest.raises(ValueError, match="name the revision with --revision"):
        session.run()


def test_a_device_that_no_longer_answers_is_left(monkeypatch):
    """Every later call of the process would raise the same: the part is lost, and the parts after it need another."""

    def fails():
        raise RuntimeError("an illegal memory access was encountered\nand a long trace")
        yield

    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    outcome = worker.measured(Part("a", fails), device)
    assert (outcome.failed, outcome.usable) == ("RuntimeError: an illegal memory access was encountered", True)

    def poisoned(device):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", poisoned)
    assert not worker.measured(Part("a", fails), device).usable


def test_shares_of_the_machines_own_roofs():
    """2e14 flops take 400 ms at 5e14 a second, 1e12 bytes 500 ms at 2e12: the larger is the floor."""
    ours = {"provider": "fishkern", "dtype": "bfloat16", "flops": 2e14, "bytes": 1e12, "ms": {"median": 1000.0}}
    named = {"op": "op", "part": "a", **ours, "tested": True}
    roofs = [{"op": "roofs", "part": part, **roof, "tested": True} for part, roof in
             (("copy", COPY), ("gemm bfloat16", GEMM))]  # fmt: skip
    line = next(line for line in table.table([*roofs, named]) if line.startswith("op/a  "))
    assert re.split(r"\s+", line.strip()) == ["op/a", "fishkern", "1000.000", "200.0", "1.00", "0.50"]
    assert table.share_of_roof(named, {}) is None


def test_cases_join_by_being_there():
    cases = gpu_session.cases()
    assert tuple(cases) == gpu_session.ORDER
    for module in cases.values():
        assert all((ROOT / path).is_file() for path in module.TESTS["gpu"])
        parts = module.parts(CPU)
        assert len({part.name for part in parts}) == len(parts)
        assert table.TESTS not in {part.name for part in parts}


@pytest.mark.slow
def test_tests_that_all_skip_gate_nothing_open(tmp_path):
    """A file whose tests are skipped, or that cannot be imported, has shown nothing."""
    skipped = tmp_path / "test_skipped.py"
    skipped.write_text("import pytest\n@pytest.mark.skip\ndef test():\n    pass\n")
    broken = tmp_path / "test_broken.py"
    broken.write_text("import nothing_of_this_name\n")
    counts = device_tests.on_device([str(skipped)], 60)
    assert (counts["passed"], counts["skipped"], counts["red"]) == (0, 1, [str(skipped)])
    assert device_tests.on_device([str(broken)], 60)["red"]


def test_nothing_outlives_a_command(tmp_path):
    """Not the processes that it started either."""
    started = tmp_path / "started"
    grandchild = (
        f"import os, pathlib, time; pathlib.Path({str(started)!r}).write_text(str(os.getpid())); time.sleep(60)"
    )
    command = [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"]
    assert limits.run_within(command, 2.0, tmp_path) == (None, "stopped after 2 s")
    deadline = time.monotonic() + 10  # whoever inherits an orphan may take a moment to bury it
    while runs(int(started.read_text())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not runs(int(started.read_text()))


def runs(pid: int) -> bool:
    """Whether there is such a process, and it has not ended."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"
