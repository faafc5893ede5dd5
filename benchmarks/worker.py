"""A process that measures one thing when told to, so that several of them take turns: other revisions, or providers.

It loads a Python file and calls ``prepare(*arguments)`` of it, which returns a function; then it times this function,
or measures its peak memory, as often as it is asked. With a limit of memory it refuses what goes beyond (RLIMIT_DATA
above what the imports take; on a GPU a share of its memory), so that running out of memory is something that happens.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.memory import MIB, _peak_of, _peak_on_device, _resident

GIB = 2**30


class WorkerError(RuntimeError):
    """What was asked of a worker failed there; the text says in a line why."""


class Worker:
    """One process.

    Args:
        file: Has ``prepare``.
        tree: Checkout whose ``fishkern`` is measured; the benchmarks are always those of this file.
        limit_gib: Memory that it may take beside its imports.
        memory: Whether freed memory goes back to the system at once, for measurements of memory, not of time.
    """

    def __init__(self, file: Path, tree: Path, *, limit_gib: float | None = None, memory: bool = False) -> None:
        path = [str(tree), str(Path(__file__).parents[1])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(dict.fromkeys(path))}
        if memory:
            environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", str(file), str(limit_gib or "")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
            cwd=tree, start_new_session=True,
        )  # fmt: skip

    def prepare(self, *arguments: Any) -> None:
        self._ask("prepare", *arguments)

    def compared(self) -> dict[str, list[str]]:
        """The file's ``COMPARED``: by what is measured, its providers."""
        return self._ask("compared")

    def seconds(self) -> float:
        return self._ask("seconds")

    def peak_mib(self) -> float:
        return self._ask("peak_mib")

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def _ask(self, *request: Any) -> Any:
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError(f"the process ended with status {self._process.wait()}") from None
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(f"the process ended with status {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer["value"]


def main(file: str, limit_gib: str) -> None:
    """Answer requests, one JSON line each."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    modules: list[ModuleType] = []
    runs: list[Callable[[], object]] = []
    for line in sys.stdin:
        kind, *arguments = json.loads(line)
        value = None
        try:
            if not modules:
                modules.append(_loaded(file, float(limit_gib) if limit_gib else None))
            if kind == "compared":
                value = getattr(modules[0], "COMPARED", {})
            elif kind == "prepare":
                runs.clear()
                gc.collect()
                runs.append(modules[0].prepare(*arguments))
            else:
                value = {"seconds": _seconds, "peak_mib": _peak}[kind](runs[0])
            answer = {"value": value}
        except Exception as error:  # whatever it is, the asking process says it
            runs.clear()
            answer = {"error": in_short(error, limit_gib)}
        print(json.dumps(answer), file=answers, flush=True)


def in_short(error: Exception, limit_gib: str) -> str:
    """One line; running out of memory in the same words, whoever notices it."""
    said = str(error)
    words = ("out of memory", "t allocate memory", "bad_alloc")
    if limit_gib and (isinstance(error, MemoryError) or any(word in said for word in words)):
        return f"out of memory above {float(limit_gib):g} GiB"
    return f"{type(error).__name__}: {(said.splitlines() or [''])[0][:120]}"


def _loaded(file: str, limit_gib: float | None) -> ModuleType:
    import torch

    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    torch.ones(64, 64) @ torch.ones(64, 64)  # threads start on first use
    if limit_gib and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(limit_gib * GIB / torch.cuda.mem_get_info()[1])
    elif limit_gib:
        limit = int(_resident("VmData") * MIB + limit_gib * GIB)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    return module


def _seconds(run: Callable[[], object]) -> float:
    import torch

    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _peak(run: Callable[[], object]) -> float:
    import torch

    gc.collect()
    return _peak_on_device(run) if torch.cuda.is_available() else _peak_of(run)


if __name__ == "__main__":
    main(*sys.argv[1:])
