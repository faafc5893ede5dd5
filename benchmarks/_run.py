"""``python -m benchmarks run``: test what speed cases measure, then measure and record it, a table last.

A case is a pytest-benchmark file ``test_<case>.py`` with ``TESTS = ["tests/...", ...]``, which must pass first. What it
records is appended to the results when all of it has run, so that an interrupted case leaves nothing.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from fishkern.files import atomic_write

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent


@dataclass
class Outcome:
    """What became of one case: why it was not recorded, which of its goals it missed, where its records are."""

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
        said = self.refused or ("goals missed or failed, records kept" if self.missed else "recorded")
        return f"{self.case:16} {records:>7}  {', '.join(self.trees) or '-':24} {said}"


class UnknownCaseError(ValueError):
    """A case is asked for that there is not."""


def cases(names: Iterable[str], folder: Path = FOLDER) -> dict[str, Path]:
    """Find case files by name; all where none is named.

    Raises:
        UnknownCaseError: There is none of this name.
    """
    known = {path.stem.removeprefix("test_"): path for path in sorted(folder.glob("test_*.py"))}
    names = list(names)
    if unknown := [name for name in names if name not in known]:
        raise UnknownCaseError(f"no case is called {', '.join(unknown)}; there are {', '.join(known)}.")
    return {name: known[name] for name in names or known}


def tests_of(path: Path) -> list[str]:
    """Read ``TESTS`` from a case file without importing it."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["TESTS"]:
            return ast.literal_eval(node.value)
    return []


def run(names: list[str], results: Path, *, replace: bool = False, folder: Path = FOLDER) -> int:
    """Test, measure and record.

    Args:
        names: Cases; all where none is named.
        results: Folder of all machines' records.
        replace: Whether this machine's earlier records of these files are dropped.
        folder: Where the case files are.

    Returns:
        Exit status: 0 when every case is recorded and reached its goals, 1 when not, 2 for an unknown case.
    """
    try:
        chosen = cases(names, folder)
    except UnknownCaseError as error:
        print(error, file=sys.stderr)
        return 2
    passed: dict[str, bool] = {}
    outcomes = []
    for name, path in chosen.items():
        outcome = Outcome(name)
        outcomes.append(outcome)
        outcome.refused = why_not(name, tests_of(path), passed)
        if outcome.refused:
            print(f"{name}: {outcome.refused}", file=sys.stderr, flush=True)
            continue
        print(f"==> {name}: measuring", file=sys.stderr, flush=True)
        _measure(path, results, replace, outcome)
    print(f"{'case':16} {'records':>7}  {'commit':24} outcome")
    for outcome in outcomes:
        print(outcome.line())
        for missed in outcome.missed:
            print(f"{'':24}  {missed}")
    return 0 if all(outcome.good for outcome in outcomes) else 1


def why_not(name: str, tests: list[str], passed: dict[str, bool]) -> str:
    """Run what has not been run of a case's tests, and say in one line why nothing may be recorded."""
    if not tests:
        return f"not recorded: test_{name}.py has no TESTS, which name the tests of what it measures"
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


def _measure(path: Path, results: Path, replace: bool, outcome: Outcome) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        report, records = Path(scratch) / "report.xml", Path(scratch) / "records"
        command = [
            sys.executable, "-m", "pytest", str(path), "-v", "--no-header", "--no-summary", "--tb=line",
            "-p", "no:cacheprovider", "--benchmark-quiet", f"--junitxml={report}", f"--record={records}",
        ]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, stdout=sys.stderr)
        if done.returncode not in (0, 1):  # 1: a test failed, which may be a goal that was missed
            outcome.refused = f"not recorded: pytest ended with status {done.returncode}"
            return
        outcome.missed = list(_failures(report))
        for found in sorted(records.glob("*/*.jsonl")):
            lines = found.read_text(encoding="utf-8").splitlines()
            into = results / found.relative_to(records)
            into.parent.mkdir(parents=True, exist_ok=True)
            before = into.read_text(encoding="utf-8") if into.exists() and not replace else ""
            with atomic_write(into, "w") as file:
                file.write(before + "".join(f"{line}\n" for line in lines))
            outcome.files[into] = len(lines)
            for record in map(json.loads, lines):
                outcome.trees[record["commit"][:7] + " with changes" * bool(record["dirty"])] = None


def _failures(report: Path) -> Iterable[str]:
    for test in ElementTree.parse(report).iter("testcase"):
        for failure in (*test.iter("failure"), *test.iter("error")):
            said = (failure.get("message") or "").splitlines()
            yield f"{test.get('name')}: {said[0] if said else 'failed'}"
