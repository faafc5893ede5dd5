"""Time limits of processes and of a whole call."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.engine.process import end, why_it_ended

# A part that takes so many times its planned seconds hangs.
PATIENCE = 4.0
# Seconds for ending a process, the table and the files of a call.
CLOSING = 15.0


class Clock:
    """Counts down the time of a call.

    Args:
        seconds: Of the whole call.
        patience: So many times its planned seconds a part may take.
    """

    def __init__(self, seconds: float, patience: float = PATIENCE) -> None:
        self._end = time.monotonic() + seconds
        self._patience = patience

    def left(self) -> float:
        """Seconds that are left."""
        return self._end - time.monotonic()

    def fits(self, planned: float) -> bool:
        """Whether a part that is planned to take so long can end in time."""
        return planned <= self.left() - CLOSING

    def limit(self, planned: float) -> float:
        """When to stop a part that is planned to take so long, within the rest of the call."""
        return max(1.0, min(self._patience * planned, self.left() - CLOSING))


def run_within(command: Sequence[str], seconds: float, folder: Path) -> tuple[int | None, str]:
    """Run a command, and end it and all that it starts after so many seconds.

    Args:
        command: With its arguments.
        seconds: When it is stopped.
        folder: Where it runs.

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
