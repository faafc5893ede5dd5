"""Time limits of processes and of a whole call."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

# What takes so many times what was planned hangs.
PATIENCE = 4.0
# What ending a process, the table and the files of a call may take, seconds.
CLOSING = 15.0


class Clock:
    """Counts down the time of a call.

    Args:
        seconds: Of the whole call.
        patience: What takes so many times what was planned is stopped.
    """

    def __init__(self, seconds: float, patience: float = PATIENCE) -> None:
        self._end = time.monotonic() + seconds
        self._patience = patience

    def left(self) -> float:
        """Seconds that are left."""
        return self._end - time.monotonic()

    def fits(self, planned: float) -> bool:
        """Whether what was planned to take so long can end in time."""
        return planned <= self.left() - CLOSING

    def limit(self, planned: float) -> float:
        """When to stop what was planned to take so long, within what is left of the call."""
        return max(1.0, min(self._patience * planned, self.left() - CLOSING))


def run_within(command: Sequence[str], seconds: float, folder: Path) -> tuple[int | None, str]:
    """Run a command and all that it starts, for so long at most.

    Args:
        command: What to run.
        seconds: When it is stopped.
        folder: Where.

    Returns:
        Its exit status, ``None`` where it was stopped, and why it ended, in words.
    """
    process = subprocess.Popen(command, cwd=folder, start_new_session=True)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None, f"stopped after {seconds:.0f} s"
    finally:
        end(process)
    return process.returncode, why_it_ended(process)


def end(process: subprocess.Popen) -> None:
    """Kill a process that leads a session, and all that it started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):  # a driver that hangs may hold it for good
        process.wait(CLOSING)


def why_it_ended(process: subprocess.Popen) -> str:
    """The exit status in words, or the signal that ended it."""
    try:
        status = process.wait(10)
    except subprocess.TimeoutExpired:
        return "it has closed its pipe"
    return signal.Signals(-status).name if status < 0 else f"exit status {status}"
