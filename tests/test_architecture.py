"""The rules for all modules: the order of imports, and what is forbidden everywhere."""

from __future__ import annotations

import ast
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache, cached_property
from importlib import import_module
from pathlib import Path
from types import FunctionType

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = sorted(path for path in (ROOT / "fishkern").rglob("*.py") if path.parent.name != "kernels")
KERNELS = sorted((ROOT / "kernels").glob("*.py"))
OPS_WITH_KERNEL = [path.stem for path in KERNELS if not path.stem.startswith("_")]

# In the order of the data flow: a room imports from itself and from the rooms before it.
ROOMS = (
    "backend", "names", "steps", "digests", "arguments", "warning", "hosts", "files", "ops", "layers", "statistics",
    "selection", "initialization", "optim", "freezing", "adapters", "tokens", "integrations", "methods", "report",
    "__init__", "demo cli commands __main__",
)  # fmt: skip
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms.split()}
HUGGING_FACE = {"accelerate", "datasets", "peft", "transformers"}
HEAVY = {"triton", "matplotlib", "rich", "typer"} | HUGGING_FACE


def room_of(path: Path) -> str:
    """The first part of a file's path inside the package."""
    return path.relative_to(ROOT / "fishkern").with_suffix("").parts[0]


@cache
def imports(path: Path) -> tuple[str, ...]:
    """Full dotted names of all that a file imports, as :func:`read_imports` reads them; read once."""
    return tuple(read_imports(path))


def read_imports(path: Path) -> Iterator[str]:
    """Full dotted names of all that a file imports anywhere in it, ``import_module("...")`` included."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                base = package[: len(package) - level + 1] if level else ()
                yield from (".".join([*base, *filter(None, [module]), alias.name]) for alias in names)
            case ast.Call(func=ast.Name(id="import_module") | ast.Attribute(attr="import_module"), args=[name, *_]):
                # The start of an f-string names the package.
                text = name.values[0] if isinstance(name, ast.JoinedStr) else name
                if isinstance(text, ast.Constant):
                    yield text.value


def importers(of: set[str], files: list[Path]) -> set[str]:
    """The files that import one of these packages, relative to the checkout."""
    return {str(path.relative_to(ROOT)) for path in files if any(name.split(".")[0] in of for name in imports(path))}


def python(code: str) -> str:
    """Run code on this checkout in a fresh interpreter, and return what it prints."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_file_has_a_room():
    assert {room_of(path) for path in PACKAGE} <= LEVEL.keys()


def test_data_flows_downstairs():
    upstairs = []
    for path in PACKAGE:
        for name in imports(path):
            top, *rest = name.split(".")
            if top != "fishkern" or rest[:1] == ["kernels"]:
                continue
            source, target = room_of(path), rest[0] if rest and rest[0] in LEVEL else "__init__"
            if source != target and LEVEL[target] > LEVEL[source]:
                upstairs.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not upstairs


def test_no_file_imports_itself_through_others():
    """Not for types either: each room can be read from its first file to its last."""
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in PACKAGE}
    needed = {
        module: {
            next((part for part in (name, name.rpartition(".")[0]) if part in files), module) for name in imports(path)
        }
        for module, path in files.items()
    }
    needed = {module: others - {module} for module, others in needed.items()}
    while free := [module for module, others in needed.items() if not others & needed.keys()]:
        for module in free:
            del needed[module]
    assert not needed


def test_only_the_backend_imports_triton_and_kernels():
    assert importers({"triton"}, PACKAGE) <= {"fishkern/backend.py"}
    users = {room_of(path) for path in PACKAGE if any(name.startswith("fishkern.kernels") for name in imports(path))}
    assert users <= {"backend"}


def test_only_integrations_and_commands_import_hugging_face():
    rooms = {Path(path).relative_to("fishkern").with_suffix("").parts[0] for path in importers(HUGGING_FACE, PACKAGE)}
    assert rooms <= {"integrations", "commands", "cli", "demo"}


def test_kernels_import_torch_triton_and_each_other():
    allowed = sys.stdlib_module_names | {"torch", "triton"}
    foreign = [
        f"{path.name} imports {name}"
        for path in KERNELS
        for name in imports(path)
        if name.split(".")[0] not in allowed and not name.startswith("kernels._")
    ]
    assert not foreign


def test_kernels_folder_is_no_package():
    """Hugging Face ships a package called ``kernels``; ours must not be one."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("path", PACKAGE + KERNELS, ids=lambda path: str(path.relative_to(ROOT)))
def test_file(path: Path):
    """No file is a drawer for odds and ends, and none reads the environment."""
    assert path.stem not in {"utils", "helpers", "common"}
    words = {
        word
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for word in (getattr(node, "id", None), getattr(node, "attr", None), getattr(node, "name", None))
    }
    assert not words & {"environ", "environb", "getenv", "getenvb"}


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: str(path.relative_to(ROOT)))
def test_public_methods_are_documented(path: Path):
    """Each has a docstring, or implements a method that has one."""
    if path.stem == "__main__":
        pytest.skip("importing it runs the command")
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    classes = [cls for cls in vars(import_module(name)).values() if inspect.isclass(cls) and cls.__module__ == name]
    methods = (FunctionType, property, cached_property, classmethod, staticmethod)
    bare = [
        f"{cls.__name__}.{attribute}"
        for cls in classes
        for attribute, value in vars(cls).items()
        if isinstance(value, methods) and not attribute.startswith("_") and not cls.__name__.startswith("_")
        if not any(getattr(vars(base).get(attribute), "__doc__", None) for base in cls.__mro__)
    ]
    assert not bare


def test_import_is_light():
    """``import fishkern`` brings none of these packages that ``import torch`` alone does not bring."""
    code = """
import json, sys, torch
before = set(sys.modules)
import fishkern
print(json.dumps(sorted({name.split(".")[0] for name in sys.modules.keys() - before})))
"""
    brought = set(json.loads(python(code)))
    assert "fishkern" in brought
    assert not brought & HEAVY


def test_only_a_plan_takes_tensors_without_values():
    """They are no public part of torch, so nothing else may depend on them."""
    private = {
        str(path.relative_to(ROOT))
        for path in PACKAGE
        if any(name.startswith(("torch._subclasses", "torch._guards")) for name in imports(path))
    }
    assert private == {"fishkern/statistics/rehearsal.py", "fishkern/statistics/valueless.py"}
    code = "import sys, fishkern; print(*sys.modules)"
    assert not {"fishkern.statistics.rehearsal", "fishkern.statistics.valueless"} & set(python(code).split())


def test_works_without_triton():
    """The references run where Triton is missing, and the reason is given."""
    code = """
import sys
sys.modules["triton"] = None  # what import and find_spec take for a missing package
import torch, fishkern as fk
from fishkern.ops.sum_grad_squared import sum_grad_squared
assert sum_grad_squared(torch.ones(2, 3, 4), torch.ones(2, 3, 5)).eq(18).all()
print(fk.why_not_triton(torch.ones(1)))
"""
    assert "not installed" in python(code)


@pytest.mark.parametrize("op", OPS_WITH_KERNEL)
def test_kernel_has_the_signature_of_its_reference(op: str):
    pytest.importorskip("triton")
    reference = import_module(f"fishkern.ops.{op}")
    kernel = import_module(f"fishkern.kernels.{op}")
    suffix = "" if hasattr(reference, f"{op}_torch") else "_"  # files drop the underscore of in-place operations
    described = [
        [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]
        for function in (getattr(kernel, op + suffix), getattr(reference, f"{op}_torch{suffix}"))
    ]
    assert described[0] == described[1]
