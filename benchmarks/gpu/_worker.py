"""A process that measures parts of one file, so that what a part does to the device or to the process ends with it."""

from __future__ import annotations

import subprocess
import sys
import traceback
from dataclasses import dataclass, field
from importlib import import_module
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from types import TracebackType

import torch

from benchmarks.gpu import Part, Record
from benchmarks.gpu._limits import end, why_it_ended

ROOT = Path(__file__).resolve().parents[2]
# A process imports torch and transformers, and opens the device.
STARTS_IN = 10.0
STARTED_BY = 120.0


@dataclass(frozen=True)
class Outcome:
    """What became of a part.

    Args:
        records: One for each measurement.
        failed: Why there are none.
        usable: Whether the process can measure another part.
    """

    records: list[Record] = field(default_factory=list)
    failed: str = ""
    usable: bool = True


class Worker:
    """The process, seen from the one that writes the records.

    Args:
        module: What to measure, as it is imported.
        device: Where.
    """

    def __init__(self, module: str, device: torch.device) -> None:
        self._pipe, theirs = Pipe()
        command = [sys.executable, "-m", "benchmarks.gpu._worker", module, str(device), str(theirs.fileno())]
        self._process = subprocess.Popen(command, cwd=ROOT, pass_fds=[theirs.fileno()], start_new_session=True)
        theirs.close()
        self._started = False

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pipe.close()
        end(self._process)

    def measure(self, part: str, seconds: float) -> Outcome:
        """Measure one part.

        Args:
            part: Its name.
            seconds: When to stop it, if it has not come to an end.

        Returns:
            Its records, or why there are none.
        """
        try:
            if not self._started:
                self._started = bool(self._receive(STARTED_BY))
            self._pipe.send(part)
            return self._receive(seconds)
        except TimeoutError:
            what = "it hangs" if self._started else "its process did not start"
            limit = seconds if self._started else STARTED_BY
            return Outcome(failed=f"{what}: stopped after {limit:.0f} s", usable=False)
        except (EOFError, OSError):
            return Outcome(failed=f"its process ended: {why_it_ended(self._process)}", usable=False)

    def _receive(self, seconds: float) -> Outcome:
        if not self._pipe.poll(seconds):
            raise TimeoutError
        return self._pipe.recv()


def measured(part: Part, device: torch.device) -> Outcome:
    """Run a part, and look whether the device still answers where it failed."""
    try:
        return Outcome(list(part.run()))
    except Exception as error:  # the others need not wait for its repair
        traceback.print_exc()
        failed = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # an illegal address is raised by every later call of the process
            torch.cuda.empty_cache()
    except Exception:
        return Outcome(failed=failed, usable=False)
    return Outcome(failed=failed)


def main(module: str, device: str, pipe: str) -> None:
    """Measure the parts that are asked for, until nobody asks any more."""
    on = torch.device(device)
    every = {part.name: part for part in import_module(module).parts(on)}
    with Connection(int(pipe)) as asked:
        asked.send(Outcome())  # started
        while True:
            try:
                name = asked.recv()
            except EOFError:
                return
            asked.send(measured(every[name], on))


if __name__ == "__main__":
    import_module("benchmarks.gpu._worker").main(*sys.argv[1:])  # what it sends is of this module, not of __main__
