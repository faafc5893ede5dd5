"""``fishkern doctor``: what is installed, and which backends run on which device."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import fishkern as fk
from fishkern.commands.options import Json
from fishkern.commands.output import console
from fishkern.integrations.hub import unreachable

EXTRAS = {
    "cli": ("rich", "typer"),
    "hf": ("accelerate", "datasets", "peft", "transformers"),
    "plot": ("matplotlib",),
}
"""The packages of each extra."""


def doctor(json_: Json = False) -> None:
    """Say what is installed, where fishkern can run, and what cannot run and why."""
    findings = examine()
    if json_:
        print(json.dumps(findings, indent=2))
        return
    for group, entries in findings.items():
        console().print(group)
        for key, value in entries.items():
            console().print(f"   {key:14} {value}")


def examine() -> dict[str, dict[str, Any]]:
    """Look at the installation and the machine.

    Returns:
        Findings in words, by group and name.
    """
    return {
        "versions": _versions(),
        "devices": _devices(),
        "backends": _backends(),
        "extras": {extra: _extra(extra, packages) for extra, packages in EXTRAS.items()},
        "hub": {"reachable": _hub()},
    }


def _versions() -> dict[str, str]:
    versions = {"fishkern": fk.__version__, "python": platform.python_version(), "torch": torch.__version__}
    return versions | {package: _version(package) for package in ("safetensors", "triton")}


def _devices() -> dict[str, str]:
    devices = {"cpu": f"{torch.get_num_threads()} threads, {platform.processor() or platform.machine()}"}
    for n in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(n)
        devices[f"cuda:{n}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        reason = f"torch {torch.__version__} is built for {built}" if built else "torch is built without it"
        devices["cuda"] = f"none: {reason}"
    return devices


def _backends() -> dict[str, str]:
    backends = {"torch": "runs everywhere"}
    for device in ("cpu", *(f"cuda:{n}" for n in range(torch.cuda.device_count()))):
        reason = fk.why_not_triton(torch.empty(1, device=device))
        backends[f"triton on {device}"] = f"cannot run: {reason}" if reason else "runs"
    return backends


def _extra(extra: str, packages: tuple[str, ...]) -> str:
    installed = {package: _version(package) for package in packages}
    missing = [package for package, number in installed.items() if number == "missing"]
    if missing:
        return f'{", ".join(missing)} missing: pip install "fishkern[{extra}]"'
    return ", ".join(f"{package} {number}" for package, number in installed.items())


def _hub() -> str:
    if _version("huggingface_hub") == "missing":
        return 'unknown: pip install "fishkern[hf]"'
    reason = unreachable()
    return f"no: {reason}; models and data must be on this machine" if reason else "yes"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"
