"""Measurements on a GPU: ``python -m benchmarks gpu``.

Every file here whose name does not begin with ``_`` measures one thing: ``roofs`` the machine, ``<op>`` an operation
that has a kernel, ``whole_pass`` the pass over data. It joins by being here, and offers

    parts(device) -> list[Part]     what to measure, in small parts that a later call can take up again
    TESTS                           test files that must pass on the device first; for an operation, its own by default
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """What is measured, recorded and skipped as a whole.

    Args:
        name: Unique within its file.
        run: Gives one record for each measurement.
    """

    name: str
    run: Callable[[], Iterator[Record]]
