"""Records: one JSON line for each measurement, appended where ``--record FOLDER`` says."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", metavar="FOLDER", help="append one JSON line for each measurement below FOLDER")


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[[str, dict[str, Any]], None]:
    """Append a measurement to ``<folder>/<machine>/<name>.jsonl``, with where it comes from."""
    folder = request.config.getoption("--record")

    def append(name: str, measurement: dict[str, Any]) -> None:
        if folder is None:
            return
        path = Path(folder) / _machine()["machine"] / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps({**measurement, **_machine(), **_software()}) + "\n")

    return append


def _machine() -> dict[str, Any]:
    if torch.cuda.is_available():
        return {"machine": torch.cuda.get_device_name().lower().replace(" ", "-")}
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {"machine": f"cpu-{os.cpu_count()}-cores", "cpu": model, "threads": torch.get_num_threads()}


def _software() -> dict[str, Any]:
    import transformers

    import fishkern

    def git(*command: str) -> str:
        done = subprocess.run(["git", *command], capture_output=True, text=True, cwd=Path(__file__).parent)
        return done.stdout.strip()

    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "fishkern": fishkern.__version__,
        "commit": git("rev-parse", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no", "--", "fishkern", "kernels", "benchmarks")),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
