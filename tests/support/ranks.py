"""Several processes with gloo between them, which run cases of a program of a test and report what came."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

ROOT = Path(__file__).resolve().parents[2]
RUN = "import sys; from tests.support.ranks import fork; fork(*sys.argv[1:])"


def launched(
    program: str, world: int, folder: Path, cases: Sequence[str], slow: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Run cases in as many processes.

    Args:
        program: A module whose ``CASES`` are functions without arguments. It gets ``rank``, ``world`` and ``folder``,
            and so does a module to whose ``CASES`` it adds.
        world: How many processes.
        folder: An empty one, which all of them see.
        cases: Which cases, one after the other.
        slow: Those of the slow tests. They run in a launch of their own, when a test asks for the first of them.

    Returns:
        For each rank what its cases have returned, by their names.
    """

    def more() -> None:
        (further := folder / "slow").mkdir()
        for report, found in zip(reports, _launched(program, world, further, slow), strict=True):
            report.update(found)

    reports = [_Report(found, slow, more) for found in _launched(program, world, folder, cases)]
    return reports


class _Report(dict[str, Any]):
    """What the cases of one rank have returned; the slow ones run when one of them is asked for."""

    def __init__(self, found: dict[str, Any], slow: Sequence[str], more: Callable[[], None]) -> None:
        super().__init__(found)
        self._slow, self._more = slow, more

    def __missing__(self, case: str) -> Any:
        if case not in self._slow:
            raise KeyError(case)
        self._more()
        return self[case]


def _launched(program: str, world: int, folder: Path, cases: Sequence[str]) -> list[dict[str, Any]]:
    command = [sys.executable, "-W", "error::UserWarning:fishkern", "-c", RUN, program, str(world), str(folder), *cases]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


def fork(program: str, count: str, folder: str, *cases: str) -> None:
    """Be rank 0, and fork the others after the imports, which take longer than most cases."""
    module, world = importlib.import_module(program), int(count)
    others = []
    rank = 0
    for number in range(1, world):
        if not (child := os.fork()):
            rank = number
            break
        others.append(child)
    try:
        _run(module, rank, world, Path(folder), cases)
    except BaseException:
        for child in others if rank == 0 else ():
            os.kill(child, signal.SIGKILL)
        raise
    if rank == 0:
        sys.exit(max((os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in others), default=0))


def _run(module: Any, rank: int, world: int, folder: Path, cases: Sequence[str]) -> None:
    for one in [one for one in sys.modules.values() if getattr(one, "CASES", None) is module.CASES]:
        vars(one).update(rank=rank, world=world, folder=folder)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    listed: dict[str, Callable[[], Any]] = module.CASES
    report = {name: listed[name]() for name in cases}
    (folder / f"{rank}.json").write_text(json.dumps(report))
    dist.destroy_process_group()  # its threads, still running as the interpreter exits, would now and then abort it
