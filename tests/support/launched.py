"""Several ranks of a program: processes that are forked from one that has imported it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# The imports take longer than most cases, so all ranks are forked from one process after them.
LAUNCH = """
import os, signal, sys
from importlib import import_module

program = import_module(sys.argv[1])
world, folder, cases = int(sys.argv[2]), sys.argv[3], sys.argv[4:]
others = []
rank = 0
for number in range(1, world):
    if not (child := os.fork()):
        rank = number
        break
    others.append(child)
try:
    program.main(rank, world, folder, cases)
except BaseException:
    for child in others if rank == 0 else ():
        os.kill(child, signal.SIGKILL)
    raise
if rank == 0:
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in others))
"""


def launched(program: str, world: int, folder: Path, cases: Sequence[str]) -> list[dict[str, Any]]:
    """Run cases of a program in as many processes.

    Args:
        program: Name of its module. ``main(rank, world, folder, cases)`` of it writes ``<rank>.json`` into the folder.
        world: How many, at least two.
        folder: Where they write.
        cases: Passed on.

    Returns:
        What each process has written.
    """
    command = [sys.executable, "-W", "error::UserWarning:fishkern", "-c", LAUNCH, program, str(world), str(folder)]
    done = subprocess.run([*command, *cases], capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]
