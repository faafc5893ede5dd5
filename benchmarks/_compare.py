"""``python -m benchmarks compare REF``: another revision and this tree on this machine, in turns.

The other revision's ``fishkern`` is checked out by ``git worktree`` into a temporary folder, which is removed in the
end. Both are measured by this tree's case files: each in a process of its own, one run of the one, one of the other,
the order changing from round to round. A case says in ``COMPARED`` what is run of it, and its rivals, which are the
same on both sides: what they seem to change is the machine's noise. Nothing is recorded.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

from benchmarks._run import FOLDER, ROOT, UnknownCaseError, cases
from benchmarks.worker import Worker, WorkerError

OURS = "fishkern"


def compare(ref: str, names: list[str], *, rounds: int, only: str = "", folder: Path = FOLDER) -> int:
    """Measure both revisions and print a table.

    Args:
        ref: Revision of git.
        names: Cases; all where none is named.
        rounds: How often each runs, after one that does not count.
        only: Text in the name of what is run of a case.
        folder: Where the case files are.

    Returns:
        Exit status: 0, 1 when a revision could not run something, 2 for an unknown case or revision.
    """
    try:
        chosen = cases(names, folder)
    except UnknownCaseError as error:
        print(error, file=sys.stderr)
        return 2
    if _git("rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}").returncode:
        print(f"git knows no revision {ref}.", file=sys.stderr)
        return 2
    if rounds < 1:
        print(f"--rounds is at least 1, got {rounds}.", file=sys.stderr)
        return 2
    whole = True
    with worktree(ref) as (tree, there):
        print(f"{'case':14} {'what':40} {'provider':18} {'quantity':8} {ref[:12]:>12} {'this tree':>12}  ratio (range)")
        for name, path in chosen.items():
            if path.name not in there:
                print(f"{name}: not a case of {ref}; its fishkern is measured by this tree's file.")
            for line in _case(name, path, tree, rounds, only):
                whole &= not line.startswith("failed")
                print(line, flush=True)
    return 0 if whole else 1


@contextmanager
def worktree(ref: str) -> Iterator[tuple[Path, set[str]]]:
    """Check out a revision beside the tree for as long as the block runs, interrupts included.

    Yields:
        Its folder, without its benchmarks, and the names of their files.
    """
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    folder = Path(tempfile.mkdtemp(prefix="fishkern-compare-"))
    tree = folder / "tree"
    try:
        done = _git("worktree", "add", "--detach", "--quiet", str(tree), ref)
        if done.returncode:
            raise RuntimeError(f"git worktree: {done.stderr.strip()}")
        there = {path.name for path in (tree / "benchmarks").glob("test_*.py")}
        shutil.rmtree(tree / "benchmarks", ignore_errors=True)  # those of this tree measure both
        yield tree, there
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _git("worktree", "prune")
        signal.signal(signal.SIGTERM, before)


def _case(name: str, path: Path, tree: Path, rounds: int, only: str) -> Iterator[str]:
    with ExitStack() as stack:
        sides = [Worker(path, side) for side in (tree, ROOT)]
        for side in sides:
            stack.callback(side.close)
        try:
            compared = sides[1].compared()
            sides[0].compared()
        except WorkerError as error:
            yield f"failed: {name}: {error}"
            return
        if not compared:
            yield f"{name}: has no COMPARED, which says what is run of it."
        for what, providers in compared.items():
            for provider in providers:
                if only in what:
                    yield _row(name, what, provider, sides, rounds)
    for what, providers in compared.items():
        if only in what and OURS in providers:
            peaks = []
            try:
                for side in (tree, ROOT):
                    with ExitStack() as stack:
                        worker = Worker(path, side, memory=True)
                        stack.callback(worker.close)
                        worker.prepare(what, OURS)
                        peaks.append(worker.peak_mib())
            except WorkerError as error:
                yield f"failed: {name} {what} {OURS} peak: {error}"
                continue
            theirs, ours = peaks
            ratio = f"{ours / theirs:.3f}" if theirs else "-"
            sizes = f"{theirs:8.1f} MiB {ours:8.1f} MiB"
            yield f"{name:14} {what[:40]:40} {OURS:18} {'peak':8} {sizes}  {ratio} (one run)"


def _row(name: str, what: str, provider: str, sides: list[Worker], rounds: int) -> str:
    seconds: tuple[list[float], list[float]] = ([], [])
    try:
        for side in sides:
            side.prepare(what, provider)
            side.seconds()
        for turn in range(rounds):
            for n in (0, 1) if turn % 2 == 0 else (1, 0):
                seconds[n].append(sides[n].seconds())
    except WorkerError as error:
        return f"failed: {name} {what} {provider}: {error}"
    ratios = [ours / theirs for theirs, ours in zip(*seconds, strict=True)]
    theirs, ours = map(median, seconds)
    said = verdict(ratios) if provider == OURS else "control"
    return (
        f"{name:14} {what[:40]:40} {provider:18} {'time':8} {theirs * 1e3:9.2f} ms {ours * 1e3:9.2f} ms  "
        f"{median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}) {said}"
    )


def verdict(ratios: list[float]) -> str:
    """Whether this tree's times over the other's, one from each round, all lie on one side of 1."""
    if len(ratios) < 3:
        return "too few rounds to tell"
    return "slower" if min(ratios) > 1 else "faster" if max(ratios) < 1 else "within the noise"


def _git(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(["git", *command], capture_output=True, text=True, cwd=ROOT)
