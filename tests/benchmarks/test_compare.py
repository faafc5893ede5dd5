"""``python -m benchmarks compare``: which revision is measured, what noise is, and that nothing stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from benchmarks import _compare, _run
from benchmarks.worker import Worker, WorkerError

# Tells which fishkern it runs on by where that lies, and takes its time for it.
CASE = """
import time
import fishkern

COMPARED = {"nap": ["fishkern", "rival"]}

def prepare(what, provider):
    old = "fishkern-compare" in fishkern.__file__
    return lambda: time.sleep(0.08 if old and provider == "fishkern" else 0.02)
"""
HEAVY = """
def prepare(mib):
    import torch
    return lambda: torch.ones(mib * 2**18)
"""

pytestmark = pytest.mark.skipif(
    subprocess.run(["git", "rev-parse", "HEAD"], cwd=_run.ROOT, capture_output=True).returncode != 0,
    reason="there is no git here",
)


def worktrees() -> str:
    done = subprocess.run(["git", "worktree", "list"], cwd=_run.ROOT, capture_output=True, text=True, check=True)
    return done.stdout


def test_both_revisions_take_turns(tmp_path, capsys):
    """The other one's fishkern comes from its own checkout, which is gone afterwards; rivals are the control."""
    (tmp_path / "test_naps.py").write_text(CASE)
    before = worktrees()
    assert _compare.compare("HEAD", [], rounds=3, folder=tmp_path) == 0
    assert worktrees() == before
    table = capsys.readouterr().out
    assert "naps: not a case of HEAD" in table
    ours, rival, peak = (line for line in table.splitlines() if line.startswith("naps  "))
    assert ours.endswith("faster")
    assert float(ours.split(" ms ")[2].split()[0]) < 0.9
    assert rival.endswith("control")
    assert " MiB " in peak


def test_an_interrupt_leaves_no_worktree(tmp_path):
    (tmp_path / "test_naps.py").write_text(CASE.replace("0.02", "60"))
    before = worktrees()
    code = "import sys, pathlib; from benchmarks import _compare; "
    code += "_compare.compare('HEAD', [], rounds=3, folder=pathlib.Path(sys.argv[1]))"
    running = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=_run.ROOT, env=os.environ | {"TMPDIR": str(tmp_path)},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("fishkern-compare-*/tree/fishkern")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert str(tmp_path) in worktrees()
    running.send_signal(signal.SIGINT)
    assert running.wait(60) != 0
    assert worktrees() == before
    assert not list(tmp_path.glob("fishkern-compare-*"))


@pytest.mark.parametrize(
    ("ratios", "said"),
    [([1.1, 1.3, 1.2], "slower"), ([0.9, 0.8, 0.7], "faster"), ([0.9, 1.1, 1.0], "within the noise"),
     ([0.5, 0.5], "too few rounds to tell")],
)  # fmt: skip
def test_verdict(ratios, said):
    assert _compare.verdict(ratios) == said


def test_what_is_unknown_is_said(capsys):
    assert _compare.compare("no-such-revision", [], rounds=3) == 2
    assert "no-such-revision" in capsys.readouterr().err
    assert _compare.compare("HEAD", ["nowhere"], rounds=3) == 2
    assert "whole_pass" in capsys.readouterr().err


def test_a_worker_runs_out_of_its_memory_and_goes_on(tmp_path):
    """In fact, and the next smaller thing still runs; other failures keep their own words."""
    path = tmp_path / "heavy.py"
    path.write_text(HEAVY)
    worker = Worker(path, _run.ROOT, limit_gib=0.25, memory=True)
    try:
        worker.prepare(64)
        assert worker.peak_mib() == pytest.approx(64, abs=8)
        worker.prepare(512)
        with pytest.raises(WorkerError, match=r"^out of memory above 0\.25 GiB$"):
            worker.seconds()
        worker.prepare(64)
        assert worker.seconds() > 0
        with pytest.raises(WorkerError, match="TypeError"):
            worker.prepare()
    finally:
        worker.close()
