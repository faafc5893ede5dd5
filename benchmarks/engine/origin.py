"""Where a measurement comes from: the machine, the versions, the revision."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine import ROOT


def origin(revision: str | None = None) -> dict[str, Any]:
    """The fields that tell where a record comes from."""
    return {**machine(), **software(revision)}


def machine() -> dict[str, Any]:
    """The device; ``machine`` is also the folder of its records."""
    if torch.cuda.is_available():
        return {"machine": torch.cuda.get_device_name().lower().replace(" ", "-")}
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {"machine": f"cpu-{os.cpu_count()}-cores", "cpu": model, "threads": torch.get_num_threads()}


def software(revision: str | None = None) -> dict[str, Any]:
    """Versions and the commit; ``revision`` names the sources of a checkout without git."""
    import fishkern

    if revision is None:
        # what is measured, and by what; records that were added meanwhile are neither
        sources = ("fishkern", "kernels", "benchmarks", ":(exclude)benchmarks/results")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", *sources)
        source = {"commit": _git("rev-parse", "HEAD"), "dirty": bool(changed)}
    else:
        source = {"commit": revision, "dirty": None}
    packages = ("torch", "triton", "transformers")
    return {
        **{name: installed for name in packages if (installed := version_of(name))},
        "python": platform.python_version(),
        "fishkern": fishkern.__version__,
        **source,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def sources() -> str:
    """A digest of everything that a measurement on a GPU depends on: other sources are other measurements."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(path for name in ("fishkern", "kernels", "benchmarks") for path in (ROOT / name).rglob("*.py")):
        digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def gpu_state() -> dict[str, Any]:
    """Driver, clocks and power as ``nvidia-smi`` reports them; empty where there is no ``nvidia-smi``."""
    fields = ["driver_version", "clocks.sm", "clocks.mem", "power.draw", "temperature.gpu"]
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    lines = done.stdout.splitlines()
    values = lines[0].split(", ") if lines else []
    return dict(zip([field.replace(".", "_") for field in fields], values, strict=False))


def version_of(package: str) -> str | None:
    """The installed version of a distribution, if there is one."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*command: str) -> str:
    try:
        done = subprocess.run(["git", *command], capture_output=True, text=True, cwd=ROOT)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()
