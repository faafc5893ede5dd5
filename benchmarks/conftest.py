"""Records: one JSON line for each measurement, appended where ``--record FOLDER`` says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.provenance import machine, software


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", metavar="FOLDER", help="append one JSON line for each measurement below FOLDER")


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[[str, dict[str, Any]], None]:
    """Append a measurement to ``<folder>/<machine>/<name>.jsonl``, with where it comes from."""
    folder = request.config.getoption("--record")

    def append(name: str, measurement: dict[str, Any]) -> None:
        if folder is None:
            return
        path = Path(folder) / machine()["machine"] / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps({**measurement, **machine(), **software()}) + "\n")

    return append
