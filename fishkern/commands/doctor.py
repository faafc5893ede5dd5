"""``fishkern doctor``: what is installed, where it can run, and what cannot and why."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fishkern.commands.options import Json
from fishkern.commands.output import console

EXTRAS = {
    "cli": ("rich", "typer"),
    "hf": ("accelerate", "datasets", "peft", "transformers"),
    "plot": ("matplotlib",),
}
"""Which extra brings which package."""


def doctor(json_: Json = False) -> None:
    """Say what is installed, where fishkern can run, and what cannot and why."""
    found = examine()
    if json_:
        print(json.dumps(found, indent=2))
        return
    for group, entries in found.items():
        console().print(group)
        for key, value in entries.items():
            console().print(f"   {key:14} {value}")


def examine() -> dict[str, dict[str, Any]]:
    """Look at the installation and the machine.

    Returns:
        Findings in words, by group and name.
    """
    import torch

    import fishkern as fk

    versions = {"fishkern": fk.__version__, "python": platform.python_version(), "torch": torch.__version__}
    versions |= {package: _version(package) for package in ("safetensors", "triton")}
    devices = {"cpu": f"{torch.get_num_threads()} threads, {platform.processor() or platform.machine()}"}
    for n in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(n)
        devices[f"cuda:{n}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    if not torch.cuda.is_available():
        built = f"torch {torch.__version__} is built for {torch.version.cuda or torch.version.hip}"
        devices["cuda"] = f"none: {built if torch.version.cuda or torch.version.hip else 'torch is built without it'}"
    backends = {"torch": "runs everywhere"}
    for device in ("cpu", *(f"cuda:{n}" for n in range(torch.cuda.device_count()))):
        reason = fk.why_not_triton(torch.empty(1, device=device))
        backends[f"triton on {device}"] = f"cannot run: {reason}" if reason else "runs"
    extras = {}
    for extra, packages in EXTRAS.items():
        installed = {package: _version(package) for package in packages}
        missing = [package for package, found in installed.items() if found == "missing"]
        extras[extra] = (
            f'{", ".join(missing)} missing: pip install "fishkern[{extra}]"'
            if missing
            else ", ".join(f"{package} {found}" for package, found in installed.items())
        )
    return {
        "versions": versions,
        "devices": devices,
        "backends": backends,
        "extras": extras,
        "hub": {"reachable": _hub()},
    }


def _hub() -> str:
    if _version("huggingface_hub") == "missing":
        return 'unknown: pip install "fishkern[hf]"'
    from fishkern.integrations.hub import unreachable

    reason = unreachable()
    return f"no: {reason}; models and data must lie on this machine" if reason else "yes"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"
