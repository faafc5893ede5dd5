"""The first calls on a GPU, as ``benchmarks/gpu/README.md`` gives them, run with a device that is not there."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import session
from benchmarks.gpu.table import TESTS
from tests.benchmarks.pretended import gpu
from tests.kernels.mutants import MUTANTS

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "benchmarks" / "gpu" / "README.md").read_text()
CALLS = re.findall(r"```bash\n(.*?)```", README, re.S)
LONGEST = 2000  # characters that one command may have where machines are lent
MINUTES = 9
HELD = ("fishkern", "kernels", "benchmarks", "tests")
# In place of the tools of a machine with a GPU: it runs the command after its options.
TOOL = """#!/bin/sh
while [ $# -gt 0 ] && [ "$1" != python3 ]; do shift; done
exec "$@"
"""
SITE = """
import os, sys, traceback
sys.dont_write_bytecode = True
try:
    from tests.benchmarks.pretended.gpu import pretend
    pretend()
except BaseException:
    traceback.print_exc()
    os._exit(97)
"""


def copied(folder: Path) -> Path:
    """A copy of the checkout without git."""
    copy = folder / "copy"
    copy.mkdir()
    for name in HELD:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    return copy


def asked_for(call: str) -> list[set[str]]:
    """What each command of a call names after ``--only``."""
    words = [word for line in call.replace("\\\n", " ").splitlines() for word in [*shlex.split(line), "\n"]]
    named = []
    for place, word in enumerate(words):
        if word == "--only":
            rest = words[place + 1 :]
            end = next(n for n, other in enumerate(rest) if other in ("|", "\n") or other.startswith(("2>", "--")))
            named.append(set(rest[:end]))
    return named


def test_calls_fit_where_they_are_made():
    assert len(CALLS) == 3
    for call in CALLS:
        assert len(call) <= LONGEST
        lines = call.replace("\\\n", " ").splitlines()
        unlimited = [line for line in lines if not line.startswith(("timeout", "ONE="))]
        seconds = [int(number) for line in unlimited for number in re.findall(r"--seconds (\d+)", line)]
        seconds += [int(number) for number in re.findall(r"^timeout (\d+)", call, re.M)]
        assert 0 < sum(seconds) <= 60 * MINUTES


@pytest.mark.parametrize("number", range(len(CALLS)))
def test_calls_ask_for_what_there_is_and_what_fits(number, capsys, monkeypatch):
    """By the plan of each, everything that it names is measured within its own seconds."""
    modules = session.cases()
    (seconds, *_) = map(float, re.findall(r"--seconds (\d+)", CALLS[number]))
    wanted = asked_for(CALLS[number])
    assert wanted
    assert all(wanted)
    for only in wanted:
        parts = session.selected(modules, torch.device("cpu"), only)
        assert parts
    plan = list(session.plan(session.selected(modules, torch.device("cpu"), wanted[0]), seconds))
    assert "does not fit" not in plan[-1]


def test_values_that_are_not_compared_there_are_compared_elsewhere():
    """The tests that are skipped there exist, and the ordinary runs have them by the interpreter."""
    for file, names in gpu.VALUE_TESTS.items():
        source = (ROOT / file).read_text()
        for name in names:
            (marks,) = re.findall(rf"((?:^@.*\n(?:^[ )\]].*\n)*)*)^def {name}\(", source, re.M)
            assert "slow" not in marks, name
            assert name == "test_bits_repeat_at_the_size_of_a_layer" or "mark.gpu" not in marks, name


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device: make the calls themselves")
@pytest.mark.parametrize("number", range(len(CALLS)))
def test_calls_run_from_end_to_end(number, tmp_path):
    """From a copy without git and without an installed fishkern, every part that they name is recorded."""
    pytest.importorskip("triton")
    copy, tools, results = copied(tmp_path), tmp_path / "tools", tmp_path / "results"
    (copy / "sitecustomize.py").write_text(SITE)
    (copy / "conftest.py").write_text("from tests.benchmarks.pretended.gpu import pytest_collection_modifyitems\n")
    tools.mkdir()
    for name in ("nvidia-smi", "ncu", "compute-sanitizer"):
        (tools / name).write_text(TOOL)
        (tools / name).chmod(0o755)
    (tools / "python3").symlink_to(sys.executable)
    results.mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONPATH")}
    environment |= {
        "PATH": f"{Path(sys.executable).parent}:{tools}:{environment['PATH']}",
        "OUT": str(results),
        "REV": "a-copy",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }
    call = re.sub(r"^timeout \d+ ", "", CALLS[number], flags=re.M)  # times mean nothing here
    done = subprocess.run(["bash", "-c", call], cwd=copy, env=environment, capture_output=True, text=True)
    print(done.stdout[-20_000:], done.stderr[-20_000:])
    assert done.returncode == 0
    assert "Planned: " in done.stdout
    lines = [line for path in (results / "pretended-gpu").glob("*.jsonl") for line in path.read_text().splitlines()]
    records = [json.loads(line) for line in lines]
    assert all((record["commit"], record["machine"]) == ("a-copy", "pretended-gpu") for record in records)
    kept = {(record["op"], record["part"]) for record in records if not record.get("red")}
    parts = session.selected(session.cases(), torch.device("cpu"), asked_for(CALLS[number])[0])
    assert kept == set(parts)
    failed = [record for record in records if "failed" in record and record["part"] != TESTS]
    assert {record["provider"] for record in failed} <= {"bmm", "bmm_in_l2", "one_by_one_graphed"}  # products of CUDA


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter stands in for the device")
def test_a_wrong_kernel_makes_its_own_file_red_and_no_other(tmp_path):
    pytest.importorskip("triton")
    copy = copied(tmp_path)
    file, right, wrong = MUTANTS["streaming_topk"]["one tie too few"]
    (copy / file).write_text((copy / file).read_text().replace(right, wrong))
    only = ["streaming_topk/tests", "masked_adamw/tests"]
    code = (
        "import torch; from pathlib import Path; from benchmarks.gpu import session as s; "
        "s.Clock.limit = lambda self, planned: 900.0; "
        f"how = dict(revision='of a copy', only={only}, seconds=3600); "
        "print('status', s.run(s.cases(), torch.device('cpu'), Path('out'), **how))"
    )
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, env=environment, capture_output=True, text=True)
    print(done.stdout[-5000:], done.stderr[-5000:])
    assert "status 1" in done.stdout
    (path,) = (copy / "out").glob("*/*.jsonl")
    red = {record["op"]: record["red"] for record in map(json.loads, path.read_text().splitlines())}
    assert red["masked_adamw"] == []
    assert red["streaming_topk"]
    assert all("streaming_topk" in test for test in red["streaming_topk"])
