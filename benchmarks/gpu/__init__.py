"""Measurements on a GPU: ``python -m benchmarks gpu``.

Every file here whose name does not begin with ``_`` measures one thing: ``smoke`` whether anything runs and is right,
``roofs`` the machine, ``<op>`` an operation that has a kernel, ``variants`` kernels that may take the place of one,
``whole_pass`` the pass over data, ``trace`` where its time goes. It joins by being here, and offers

    parts(device) -> list[Part]     what to measure, in small parts that a later call can take up again
    TESTS                           test files that must pass on the device first; for an operation, its own by default
    TESTED_IN                       seconds that these take on 16 cores, about; a minute where it does not say
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

Record = dict[str, Any]


def too_large(case: Any, needed: float) -> Record:
    """The record of a case that the device has no room for, so that no later call takes it up.

    Args:
        case: A dataclass.
        needed: Bytes.

    Returns:
        The record.
    """
    return {"provider": "fishkern", "case": asdict(case), "failed": f"needs {needed / 2**30:.0f} GiB of the device"}


@dataclass(frozen=True)
class Part:
    """What is measured, recorded and skipped as a whole.

    Args:
        name: Unique within its file.
        run: Gives one record for each measurement. A value that is ``bytes`` becomes a file beside the records.
        seconds: What it takes, about. A call is planned by it, and stops what takes several times as long.
    """

    name: str
    run: Callable[[], Iterator[Record]]
    seconds: float = 15
