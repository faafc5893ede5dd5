"""Records: one JSON line for each measurement, appended where ``--record FOLDER`` says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.engine.origin import machine
from benchmarks.engine.records import Record, Records


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", metavar="FOLDER", help="append one JSON line for each measurement below FOLDER")


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[[str, Record], None]:
    """Append a measurement to ``<folder>/<machine>/<name>.jsonl``."""
    folder = request.config.getoption("--record")

    def append(name: str, measurement: Record) -> None:
        if folder is not None:
            Records(Path(folder) / machine()["machine"] / f"{name}.jsonl").append(measurement)

    return append
