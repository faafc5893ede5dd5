"""The tests of a case, run on the device itself before it is measured."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

import torch

from benchmarks.engine import ROOT
from benchmarks.engine.records import Record
from benchmarks.gpu.limits import run_within

# Most of the time of the tests goes into compiling, one kernel for each process.
WORKERS = 12
# After so many red tests the others would only take time.
MOST_FAILURES = 40


def on_device(tests: list[str], seconds: float) -> Record:
    """Run tests on the device, those that need much of its memory too.

    Args:
        tests: Files.
        seconds: When they are stopped.

    Returns:
        How many passed, failed and were skipped, and which failed, ``red``; ``stopped`` where they did not
        end. Tests of which none passed are red.
    """
    options = ["-q", f"--maxfail={MOST_FAILURES}", "-p", "no:cacheprovider", "-m", "gpu or not slow"]
    if torch.cuda.is_available() and find_spec("xdist"):
        options += ["-n", str(min(WORKERS, os.cpu_count() or 1))]
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", *options, f"--junitxml={report}", *tests]
        status, why = run_within(command, seconds, ROOT)
        if not report.exists():
            return {"red": tests, "stopped": why, "seconds": time.monotonic() - start}
        counts = outcomes(report)
    red = counts["red"] or ([] if status == 0 and counts["passed"] else tests)
    return {**counts, "red": red, "seconds": time.monotonic() - start}


def outcomes(report: Path) -> Record:
    """Read pytest's report in JUnit's format."""
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    kinds = [{child.tag for child in case} for case in cases]
    red = [
        f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"
        for case, kind in zip(cases, kinds, strict=True)
        if kind & {"failure", "error"}
    ]
    skipped = sum("skipped" in kind for kind in kinds)
    return {"passed": len(cases) - len(red) - skipped, "failed": len(red), "skipped": skipped, "red": red}
