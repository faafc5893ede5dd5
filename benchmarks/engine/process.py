"""Processes that measure: another revision, a provider with the memory to itself, a part that may hang or crash.

A function is named as ``package.module:function``, and gets plain arguments or dataclasses of :mod:`benchmarks`. With a
limit of memory a process may take so much above its imports (RLIMIT_DATA, so reserved memory counts; on a GPU a share
of its memory), and running out of memory really happens. A process ends with the one that started it, however that
ends, also in the middle of a call.
"""

from __future__ import annotations

import gc
import os
import resource
import select
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.engine import ROOT

GIB = 2**30  # not from memory.py, which imports torch
# Seconds that a killed process gets: a driver that hangs may never let it go.
ENDS_IN = 15.0
# With these the C library returns freed memory to the system at once.
RETURN_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


class ProcessError(RuntimeError):
    """A call failed in the other process, or ended it; the text says why in one line."""


class Process:
    """A process that answers calls, one after the other.

    Args:
        tree: Checkout whose ``fishkern`` it imports; ``benchmarks`` is always this one.
        limit_gib: Memory that it may take above its imports.
        memory: Whether freed memory is returned to the system at once: for peaks, not for times.
        quiet: Whether its output is dropped; otherwise all of it goes to standard error.
    """

    def __init__(
        self, tree: Path = ROOT, *, limit_gib: float | None = None, memory: bool = False, quiet: bool = False
    ) -> None:
        self._pipe, theirs = Pipe()
        inherited = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
        path = os.pathsep.join(dict.fromkeys([str(tree), str(ROOT), *inherited]))
        environment = os.environ | {"PYTHONPATH": path} | (RETURN_FREED_MEMORY if memory else {})
        command = [sys.executable, "-m", "benchmarks.engine.process", str(theirs.fileno()), str(limit_gib or "")]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL if quiet else None, env=environment, cwd=tree,
            pass_fds=[theirs.fileno()], start_new_session=True,
        )  # fmt: skip
        theirs.close()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def call(self, function: str, *arguments: Any, seconds: float | None = None) -> Any:
        """Call a function there.

        Args:
            function: ``package.module:function``.
            *arguments: Its arguments.
            seconds: When to give up; the process is ended then.

        Returns:
            What the function returned.

        Raises:
            ProcessError: The function raised, or the process ended.
            TimeoutError: It did not answer in time.
        """
        return self._ask(("call", function, arguments), seconds)

    def prepare(self, function: str, *arguments: Any) -> None:
        """Let a function there make the run that :meth:`seconds` and :meth:`peak_mib` measure from here on."""
        self._ask(("prepare", function, arguments))

    def seconds(self) -> float:
        """The time of one run, until the device is done."""
        return self._ask(("seconds",))

    def peak_mib(self) -> float:
        """The peak memory of one run, above what there was before."""
        return self._ask(("peak_mib",))

    def close(self) -> None:
        """End the process and all that it started."""
        self._pipe.close()
        end(self._process)

    def _ask(self, request: tuple, seconds: float | None = None) -> Any:
        try:
            self._pipe.send(request)
            if not self._pipe.poll(seconds):
                end(self._process)
                raise TimeoutError(f"stopped after {seconds:.0f} s")
            answer = self._pipe.recv()
        except (EOFError, ConnectionError):
            raise ProcessError(f"its process ended: {why_it_ended(self._process)}") from None
        if "error" in answer:
            raise ProcessError(answer["error"])
        return answer["value"]


def in_process(function: str, *arguments: Any, seconds: float | None = None) -> Any:
    """Call a function in a process of its own that returns freed memory at once; give up after so many seconds."""
    with Process(memory=True) as process:
        return process.call(function, *arguments, seconds=seconds)


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end this process by an exception, as an interrupt does, so that ``with`` blocks and waits end too."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def end(process: subprocess.Popen) -> None:
    """Kill a process that leads a session, and all that it started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(ENDS_IN)


def why_it_ended(process: subprocess.Popen) -> str:
    """The exit status in words, or the signal that ended it."""
    try:
        status = process.wait(ENDS_IN)
    except subprocess.TimeoutExpired:
        return "it has closed its pipe"
    return signal.Signals(-status).name if status < 0 else f"exit status {status}"


def in_short(error: Exception) -> str:
    """An error as a record has it: its class, and the first line of its text."""
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {textwrap.shorten(first, 120, placeholder=' ...')}".removesuffix(": ")


def serve(pipe: str, limit_gib: str) -> None:
    """Answer requests until the pipe is closed.

    Args:
        pipe: Number of the pipe's descriptor.
        limit_gib: As in :class:`Process`; empty for none.
    """
    os.dup2(2, 1)
    threading.Thread(target=_end_with_the_other, args=(int(pipe),), daemon=True).start()
    limit = float(limit_gib) if limit_gib else None
    run: Callable[[], object] | None = None
    limited = False
    with Connection(int(pipe)) as requests:
        while True:
            try:
                kind, *arguments = requests.recv()
            except EOFError:
                return
            value = None
            try:
                if kind in ("call", "prepare"):
                    name, given = arguments
                    function = _named(name)
                    if limit and not limited:  # after the imports
                        limit_memory(limit)
                        limited = True
                if kind == "call":
                    value = function(*given)
                elif kind == "prepare":
                    run = None
                    gc.collect()
                    run = function(*given)
                else:
                    value = {"seconds": _seconds, "peak_mib": _peak_mib}[kind](run)
                answer = {"value": value}
            except Exception as error:  # for the process that asked
                run = None
                answer = {"error": _why(error, limit)}
            requests.send(answer)


def _end_with_the_other(pipe: int) -> None:
    """Wait until the pipe's other end is gone, and kill this process with all that it started."""
    hang_up = select.poll()
    hang_up.register(pipe, 0)  # only what is always reported: that it is closed
    hang_up.poll()
    os.killpg(0, signal.SIGKILL)  # it leads a session


def _named(function: str) -> Callable[..., Any]:
    module, _, name = function.partition(":")
    return getattr(import_module(module), name)


def _why(error: Exception, limit_gib: float | None) -> str:
    """One line; running out of memory in the same words, whatever noticed it."""
    words = ("out of memory", "t allocate memory", "bad_alloc")
    if limit_gib and (isinstance(error, MemoryError) or any(word in str(error) for word in words)):
        return f"out of memory above {limit_gib:g} GiB"
    return in_short(error)


def limit_memory(gib: float) -> None:
    """Let this process take so much more memory than it has; files that are mapped do not count."""
    import torch

    from benchmarks.engine.memory import MIB, resident_mib

    torch.ones(64, 64) @ torch.ones(64, 64)  # threads start on first use
    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(gib * GIB / torch.cuda.mem_get_info()[1])
        return
    limit = int(resident_mib("VmData") * MIB + gib * GIB)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    torch = sys.modules.get("torch")  # a run that has not imported it has nothing on a device
    if torch is not None and torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _peak_mib(run: Callable[[], object]) -> float:
    from benchmarks.engine.memory import peak_mib

    gc.collect()
    return peak_mib(run)


if __name__ == "__main__":
    serve(*sys.argv[1:])
