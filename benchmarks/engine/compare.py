"""``python -m benchmarks compare REF``: another revision and this tree on this machine, in turns.

The other revision's ``fishkern`` is checked out by ``git worktree`` into a temporary folder, which is removed at the
end. The cases of this tree measure both: each revision in a process of its own, one run of the one, one of the other,
in an order that changes from round to round. A case names in ``compared()`` its runs and their providers; rivals
are the same on both sides, so whatever changes in them is the machine's noise. Nothing is recorded.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from statistics import median

from benchmarks.engine import ROOT
from benchmarks.engine.discover import CASES, UnknownCaseError, named
from benchmarks.engine.process import Process, ProcessError, ended_by_sigterm
from benchmarks.engine.turns import Run, there_and_back

OURS = "fishkern"


def compare(ref: str, names: list[str], *, rounds: int, only: str = "", package: str = CASES) -> int:
    """Measure both revisions and print a table.

    Args:
        ref: Revision of git.
        names: Cases; all where none is named.
        rounds: How often each runs, after one that does not count.
        only: Text in the name of a run.
        package: Where the cases are.

    Returns:
        Exit status: 0, 1 when a revision could not run something, 2 for an unknown case or revision.
    """
    try:
        cases = named(names, package)
    except UnknownCaseError as error:
        print(error, file=sys.stderr)
        return 2
    if _git("rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}").returncode:
        print(f"git knows no revision {ref}.", file=sys.stderr)
        return 2
    if rounds < 1:
        print(f"--rounds is at least 1, got {rounds}.", file=sys.stderr)
        return 2
    complete = True
    with worktree(ref) as tree:
        print(f"{'case':14} {'what':40} {'provider':18} {'quantity':8} {ref[:12]:>12} {'this tree':>12}  ratio (range)")
        for name, module in cases.items():
            for line in _case(name, module.__name__, tree, rounds, only):
                complete &= not line.startswith("failed")
                print(line, flush=True)
    return 0 if complete else 1


def make(case: str, what: str, provider: str) -> Run:
    """Make the function that is timed; called in the process that times it."""
    return _compared(case)[what][provider]()


def names(case: str) -> dict[str, list[str]]:
    """The runs of a case, and the providers of each; called in a process of each revision."""
    return {what: list(providers) for what, providers in _compared(case).items()}


def _compared(case: str) -> dict[str, dict[str, Callable[[], Run]]]:
    module = import_module(case)
    return module.compared() if hasattr(module, "compared") else {}


@contextmanager
def worktree(ref: str) -> Iterator[Path]:
    """Check out a revision for as long as the block runs, and remove it also after an interrupt.

    Yields:
        Its folder, without its benchmarks: those of this tree measure both.
    """
    with ended_by_sigterm():
        folder = Path(tempfile.mkdtemp(prefix="fishkern-compare-"))
        tree = folder / "tree"
        try:
            done = _git("worktree", "add", "--detach", "--quiet", str(tree), ref)
            if done.returncode:
                raise RuntimeError(f"git worktree: {done.stderr.strip()}")
            shutil.rmtree(tree / "benchmarks", ignore_errors=True)
            yield tree
        finally:
            _remove(folder)
            _git("worktree", "unlock", str(tree))  # git locks a tree while it makes it, and an interrupt leaves it so
            _git("worktree", "prune")


def _remove(folder: Path) -> None:
    """Remove a folder that what git has started may still write into for a moment after an interrupt."""
    for _ in range(100):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)


def _case(name: str, module: str, tree: Path, rounds: int, only: str) -> Iterator[str]:
    with ExitStack() as stack:
        sides = [stack.enter_context(Process(side, quiet=True)) for side in (tree, ROOT)]
        try:
            theirs, ours = (side.call("benchmarks.engine.compare:names", module) for side in sides)
        except ProcessError as error:
            yield f"failed: {name}: {error}"
            return
        if not ours:
            yield f"{name}: has no compared(), which names its runs, or this tree has none of them."
        elif not any(only in what for what in ours):
            yield f"{name}: no run has {only!r} in its name; there are {'; '.join(ours)}."
        if missing := [what for what in ours if what not in theirs]:
            yield f"{name}: the other revision cannot run {'; '.join(missing)}."
        selected = {what: providers for what, providers in ours.items() if only in what and what in theirs}
        for what, providers in selected.items():
            for provider in providers:
                yield _time(name, (module, what, provider), sides, rounds)
    for what, providers in selected.items():
        if OURS in providers:
            yield _peak(name, (module, what, OURS), tree)


def _time(name: str, run: tuple[str, str, str], sides: list[Process], rounds: int) -> str:
    _, what, provider = run
    try:
        for side in sides:
            side.prepare("benchmarks.engine.compare:make", *run)
            side.seconds()
        theirs, ours = there_and_back(dict(enumerate(sides)), rounds, Process.seconds).values()
    except ProcessError as error:
        return f"failed: {name} {what} {provider}: {error}"
    ratios = [own / other for other, own in zip(theirs, ours, strict=True)]
    words = verdict(ratios) if provider == OURS else "control"
    return (
        f"{name:14} {what[:40]:40} {provider:18} {'time':8} {median(theirs) * 1e3:9.2f} ms {median(ours) * 1e3:9.2f} ms"
        f"  {median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}) {words}"
    )


def _peak(name: str, run: tuple[str, str, str], tree: Path) -> str:
    """The peak memory of one run on both sides, in processes of their own."""
    _, what, provider = run
    peaks = []
    try:
        for side in (tree, ROOT):
            with Process(side, memory=True, quiet=True) as process:
                process.prepare("benchmarks.engine.compare:make", *run)
                peaks.append(process.peak_mib())
    except ProcessError as error:
        return f"failed: {name} {what} {provider} peak: {error}"
    theirs, ours = peaks
    ratio = f"{ours / theirs:.3f}" if theirs else "-"
    sizes = f"{theirs:8.1f} MiB {ours:8.1f} MiB"
    return f"{name:14} {what[:40]:40} {provider:18} {'peak':8} {sizes}  {ratio} (one run)"


def verdict(ratios: list[float]) -> str:
    """Whether this tree's times over the other's, one from each round, are all on one side of 1."""
    if len(ratios) < 3:
        return "too few rounds to tell"
    return "slower" if min(ratios) > 1 else "faster" if max(ratios) < 1 else "within the noise"


def _git(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(["git", *command], capture_output=True, text=True, cwd=ROOT)
