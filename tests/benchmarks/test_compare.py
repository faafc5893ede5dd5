"""``python -m benchmarks compare``: the right revision is measured, noise is called noise, nothing is left over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time

import pytest

from benchmarks.engine import ROOT
from benchmarks.engine.compare import compare, verdict
from benchmarks.engine.process import Process, ProcessError

# Tells which fishkern it would import by the folder, and takes its time for it; the older one cannot run "walk".
CASE = """
import functools, time
from importlib.util import find_spec

TESTS = {"run": ["tests/test_cli.py"]}
OLD = "fishkern-compare" in find_spec("fishkern").origin

def make(provider):
    return lambda: time.sleep(0.08 if OLD and provider == "fishkern" else 0.02)

def compared():
    nap = {name: functools.partial(make, name) for name in ("fishkern", "rival")}
    return {"nap": nap} if OLD else {"nap": nap, "walk": nap}
"""
# Needs no fishkern, so that its processes start at once.
ONLY_A_WALK = """
TESTS = {"run": ["tests/test_cli.py"]}

def compared():
    return {"walk": {"fishkern": lambda: lambda: None}}
"""
# So does this one.
ENDLESS = """
import time

TESTS = {"run": ["tests/test_cli.py"]}

def compared():
    time.sleep(60)
"""

pytestmark = pytest.mark.skipif(
    subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True).returncode != 0,
    reason="there is no git here",
)


def worktrees() -> str:
    done = subprocess.run(["git", "worktree", "list"], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout


def test_both_revisions_take_turns(plant, tmp_path, monkeypatch, capsys):
    """The other one's fishkern is that of its own checkout, which is gone afterwards; rivals are the control.

    A run that the other revision lacks is named, and so is a text that no run has.
    """
    package = plant(naps=CASE, walks=ONLY_A_WALK)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert compare("HEAD", [], rounds=3, only="nap", package=package) == 0
    assert str(tmp_path) not in worktrees()
    assert not list(tmp_path.glob("fishkern-compare-*"))
    said = capsys.readouterr().out
    ours, rival, peak = (line for line in said.splitlines() if line.startswith("naps  "))
    assert ours.endswith("faster")
    assert float(ours.split(" ms ")[2].split()[0]) < 0.9
    assert rival.endswith("control")
    assert " MiB " in peak
    assert "naps: the other revision cannot run walk." in said
    assert "walks: no run has 'nap' in its name; there are walk." in said


def test_an_interrupt_leaves_no_worktree(plant, tmp_path):
    package = plant(naps=ENDLESS)
    # a process whose parents a shell has started in the background would ignore the signal
    listening = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    called = f"from benchmarks.engine.compare import compare; compare('HEAD', [], rounds=3, package='{package}')"
    running = subprocess.Popen(
        [sys.executable, "-c", f"{listening}; {called}"], cwd=ROOT, env=os.environ | {"TMPDIR": str(tmp_path)},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("fishkern-compare-*/tree/fishkern")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert str(tmp_path) in worktrees()
    running.send_signal(signal.SIGINT)
    assert running.wait(60) != 0
    assert str(tmp_path) not in worktrees()
    assert not list(tmp_path.glob("fishkern-compare-*"))


@pytest.mark.parametrize(
    ("ratios", "said"),
    [([1.1, 1.3, 1.2], "slower"), ([0.9, 0.8, 0.7], "faster"), ([0.9, 1.1, 1.0], "within the noise"),
     ([0.5, 0.5], "too few rounds to tell")],
)  # fmt: skip
def test_verdict(ratios, said):
    assert verdict(ratios) == said


def test_what_is_unknown_is_said(capsys):
    assert compare("no-such-revision", [], rounds=3) == 2
    assert "no-such-revision" in capsys.readouterr().err
    assert compare("HEAD", ["nowhere"], rounds=3) == 2
    assert "whole_pass" in capsys.readouterr().err


def test_a_process_runs_out_of_its_memory_and_goes_on(plant):
    """It really does, and the next smaller request still runs; other failures keep their own words."""
    package = plant(heavy="def make(mib):\n    import torch\n    return lambda: torch.ones(mib * 2**18)\n")
    with Process(limit_gib=0.25, memory=True, quiet=True) as process:
        process.prepare(f"{package}.heavy:make", 64)
        assert process.peak_mib() == pytest.approx(64, abs=8)
        process.prepare(f"{package}.heavy:make", 512)
        with pytest.raises(ProcessError, match=r"^out of memory above 0\.25 GiB$"):
            process.seconds()
        process.prepare(f"{package}.heavy:make", 64)
        assert process.seconds() > 0
        with pytest.raises(ProcessError, match="TypeError"):
            process.prepare(f"{package}.heavy:make")


def test_a_process_that_ends_or_hangs_is_said(plant):
    package = plant(ends="import os, time\ndef dies():\n    os.abort()\ndef hangs():\n    time.sleep(60)\n")
    with Process(quiet=True) as process, pytest.raises(ProcessError, match="its process ended: SIGABRT"):
        process.call(f"{package}.ends:dies")
    with Process(quiet=True) as process, pytest.raises(TimeoutError, match="stopped after 1 s"):
        process.call(f"{package}.ends:hangs", seconds=1.0)
