"""The tests of what is measured, run on the device itself before it is measured."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import torch

from benchmarks.gpu import Record
from benchmarks.gpu._limits import run_within

ROOT = Path(__file__).resolve().parents[2]
# Most of the time of the tests goes into compiling, one kernel for each process.
WORKERS = 12
# So many red tests say enough, and the rest of the module's would only take time.
MOST_FAILURES = 40


def tests_of(name: str, module: ModuleType) -> list[str]:
    """The test files that must pass before a file's parts are measured; for an operation, its own by default."""
    own = [f"tests/ops/test_{name}.py", f"tests/kernels/test_{name}.py"]
    return list(getattr(module, "TESTS", [path for path in own if (ROOT / path).exists()]))


def on_device(tests: list[str], seconds: float) -> Record:
    """Run tests on the device, those that need much of its memory too.

    Args:
        tests: Files.
        seconds: When they are stopped.

    Returns:
        How many passed, failed and were skipped, and which failed, ``red``; ``stopped`` where they came to no end.
        Tests of which none passed are red.
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
        found = outcomes(report)
    red = found["red"] or ([] if status == 0 and found["passed"] else tests)
    return {**found, "red": red, "seconds": time.monotonic() - start}


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
