"""Measurements on a GPU: ``python -m benchmarks gpu``.

A case takes part when its ``TESTS`` have an entry ``"gpu"``: the test files that must pass on the device first. It has

    parts(device) -> list[Part]     what to measure, in small parts that a later call can take up again
    TESTED_IN                       seconds that the tests take on 16 cores, about; a minute without it
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.engine.records import Record


def too_large(case: Any, needed: float) -> Record:
    """The record of a case that the device has no room for; without one, each later call would take it up.

    Args:
        case: A dataclass.
        needed: Bytes.

    Returns:
        The record.
    """
    return {"provider": "fishkern", "case": asdict(case), "failed": f"needs {needed / 2**30:.0f} GiB of the device"}


@dataclass(frozen=True)
class Part:
    """The smallest unit that is measured, recorded and skipped.

    Args:
        name: Unique within its case.
        run: Gives one record for each measurement. A value that is ``bytes`` becomes a file in their folder.
        seconds: What it takes, about. A call is planned by it, and stops a part that takes several times as long.
    """

    name: str
    run: Callable[[], Iterator[Record]]
    seconds: float = 15
