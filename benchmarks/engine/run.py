"""``python -m benchmarks run``: test the library, then measure and record, case by case, and print a table.

A case records when all of it has run; an interrupted one leaves nothing.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

from benchmarks.engine import ROOT
from benchmarks.engine.discover import CASES, UnknownCaseError, named
from benchmarks.engine.process import ended_by_sigterm
from benchmarks.engine.records import read
from fishkern.files import atomic_write


@dataclass
class Outcome:
    """What one case came to: why it was not recorded, which goals it missed, where its records are."""

    case: str
    refused: str = ""
    missed: list[str] = field(default_factory=list)
    files: dict[Path, int] = field(default_factory=dict)
    trees: dict[str, None] = field(default_factory=dict)

    @property
    def good(self) -> bool:
        return not self.refused and not self.missed

    def line(self) -> str:
        records = sum(self.files.values())
        words = self.refused or ("goals missed or failed, records kept" if self.missed else "recorded")
        return f"{self.case:16} {records:>7}  {', '.join(self.trees) or '-':24} {words}"


def run(names: list[str], results: Path, *, replace: bool = False, package: str = CASES) -> int:
    """Test, measure and record.

    Args:
        names: Cases; all where none is named.
        results: Folder of all machines' records.
        replace: Whether this machine's earlier records of these files are dropped.
        package: Where the cases are.

    Returns:
        Exit status: 0 when every case is recorded and reached its goals, 1 when not, 2 for an unknown case.
    """
    try:
        cases = named(names, package)
    except UnknownCaseError as error:
        print(error, file=sys.stderr)
        return 2
    passed: dict[str, bool] = {}
    outcomes = []
    with ended_by_sigterm():
        for name, module in cases.items():
            outcome = Outcome(name)
            outcomes.append(outcome)
            outcome.refused = why_not(name, module.TESTS["run"], passed)
            if outcome.refused:
                print(f"{name}: {outcome.refused}", file=sys.stderr, flush=True)
                continue
            print(f"==> {name}: measuring", file=sys.stderr, flush=True)
            _measure(module, results, outcome, replace=replace)
    print(f"{'case':16} {'records':>7}  {'commit':24} outcome")
    for outcome in outcomes:
        print(outcome.line())
        for missed in outcome.missed:
            print(f"{'':24}  {missed}")
    return 0 if all(outcome.good for outcome in outcomes) else 1


def why_not(name: str, tests: list[str], passed: dict[str, bool]) -> str:
    """Run the tests of a case that have not run yet, and say in one line why nothing may be recorded."""
    if not tests:
        return f"not recorded: {name}.py has no TESTS, which name the tests of the library that it depends on"
    if missing := [test for test in tests if not (ROOT / test).exists()]:
        return f"not recorded: {', '.join(missing)} of its TESTS does not exist"
    for test in tests:
        if test not in passed:
            print(f"==> {name}: testing {test}", file=sys.stderr, flush=True)
            command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--no-header", test]
            passed[test] = subprocess.run(command, cwd=ROOT, stdout=sys.stderr).returncode == 0
        if not passed[test]:
            return f"not recorded: {test} fails"
    return ""


def _measure(module: ModuleType, results: Path, outcome: Outcome, *, replace: bool) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        report, records = Path(scratch) / "report.xml", Path(scratch) / "records"
        command = [
            sys.executable, "-m", "pytest", module.__file__, "-v", "--no-header", "--no-summary", "--tb=line",
            "-p", "no:cacheprovider", "--benchmark-quiet", f"--junitxml={report}", f"--record={records}",
        ]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, stdout=sys.stderr)
        if done.returncode not in (0, 1):  # 1: a test failed, which may be a goal that was missed
            outcome.refused = f"not recorded: pytest ended with status {done.returncode}"
            return
        outcome.missed = list(_failures(report))
        for path in sorted(records.glob("*/*.jsonl")):
            _add(path, results / path.relative_to(records), outcome, replace=replace)


def _add(recorded: Path, target: Path, outcome: Outcome, *, replace: bool) -> None:
    """Append the records of a run to those of all runs."""
    target.parent.mkdir(parents=True, exist_ok=True)
    before = target.read_text(encoding="utf-8") if target.exists() and not replace else ""
    with atomic_write(target, "w") as file:
        file.write(before + recorded.read_text(encoding="utf-8"))
    records = read(recorded)
    outcome.files[target] = len(records)
    for record in records:
        outcome.trees[record["commit"][:7] + " with changes" * bool(record["dirty"])] = None


def _failures(report: Path) -> Iterator[str]:
    for test in ElementTree.parse(report).iter("testcase"):
        for failure in (*test.iter("failure"), *test.iter("error")):
            lines = (failure.get("message") or "").splitlines()
            yield f"{test.get('name')}: {lines[0] if lines else 'failed'}"
