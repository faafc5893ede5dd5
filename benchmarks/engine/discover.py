"""The cases: files of :mod:`benchmarks.cases`, which join by being there."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from types import ModuleType

CASES = "benchmarks.cases"


class UnknownCaseError(ValueError):
    """There is no case of this name."""


def discover(command: str, package: str = CASES) -> dict[str, ModuleType]:
    """Find the cases of a command, by name.

    Args:
        command: ``"run"`` or ``"gpu"``: a key of the case's ``TESTS``.
        package: Where the cases are.

    Returns:
        Their modules.
    """
    (folder,) = map(Path, import_module(package).__path__)
    names = sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
    modules = {name: import_module(f"{package}.{name}") for name in names}
    return {name: module for name, module in modules.items() if command in getattr(module, "TESTS", {})}


def named(names: Iterable[str], package: str = CASES) -> dict[str, ModuleType]:
    """Find cases of ``run`` by name; all where none is named.

    Raises:
        UnknownCaseError: There is none of this name.
    """
    cases, names = discover("run", package), list(names)
    if unknown := [name for name in names if name not in cases]:
        raise UnknownCaseError(f"no case is called {', '.join(unknown)}; there are {', '.join(cases)}.")
    return {name: cases[name] for name in names or cases}
