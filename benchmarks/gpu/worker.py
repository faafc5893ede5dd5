"""Parts of a case in a process of their own: damage to the device or to the process ends with it."""

from __future__ import annotations

import traceback
from dataclasses import dataclass, field
from importlib import import_module

import torch

from benchmarks.engine.process import Process, ProcessError, in_short
from benchmarks.gpu import Part, Record

# A process imports torch and transformers, and opens the device: in so many seconds, about and at most.
STARTS_IN = 10.0
STARTED_BY = 120.0


@dataclass(frozen=True)
class Outcome:
    """What a part came to.

    Args:
        records: One for each measurement.
        failed: Why there are none.
        usable: Whether the process can measure another part.
    """

    records: list[Record] = field(default_factory=list)
    failed: str = ""
    usable: bool = True


class Worker(Process):
    """The process, seen from the one that writes the records.

    Args:
        module: The case.
        device: Where it is measured.
    """

    def __init__(self, module: str, device: torch.device) -> None:
        super().__init__()
        self._case = (module, str(device))
        self._started = False

    def measure(self, part: str, seconds: float) -> Outcome:
        """Measure one part.

        Args:
            part: Its name.
            seconds: When to stop it, if it has not ended.

        Returns:
            Its records, or why there are none.
        """
        try:
            if not self._started:
                self.call("benchmarks.gpu.worker:parts_of", *self._case, seconds=STARTED_BY)
                self._started = True
            return self.call("benchmarks.gpu.worker:measured_by_name", *self._case, part, seconds=seconds)
        except TimeoutError as error:
            what = "it hangs" if self._started else "its process did not start"
            return Outcome(failed=f"{what}: {error}", usable=False)
        except ProcessError as error:
            return Outcome(failed=str(error), usable=False)


def parts_of(module: str, device: str) -> list[str]:
    """Import a case, and name its parts."""
    return [part.name for part in import_module(module).parts(torch.device(device))]


def measured_by_name(module: str, device: str, name: str) -> Outcome:
    """:func:`measured`, of the part with this name."""
    on = torch.device(device)
    (part,) = (part for part in import_module(module).parts(on) if part.name == name)
    return measured(part, on)


def measured(part: Part, device: torch.device) -> Outcome:
    """Run a part, and where it fails find out whether the device still answers."""
    try:
        return Outcome(list(part.run()))
    except Exception as error:  # the other parts need not wait for its repair
        traceback.print_exc()
        failed = in_short(error)
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # an illegal address is raised by every later call of the process
            torch.cuda.empty_cache()
    except Exception:
        return Outcome(failed=failed, usable=False)
    return Outcome(failed=failed)
