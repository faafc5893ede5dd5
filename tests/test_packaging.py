"""The top-level ``kernels/`` folder is ``fishkern.kernels`` in every way of installing, and never ``kernels``."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch

pytest.importorskip("setuptools", minversion="77", reason="pyproject.toml asks for setuptools 77")

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = (".*", "__pycache__", "*.egg-info", "benchmarks", "build", "carry", "dist", "tests")

# Runs with -S, so that only the folders of each way are installed: first ours, then a stand-in for Hugging Face's
# `kernels`, then the packages that we depend on. Torch and triton are imported once, before it forks for each way.
PROBE = """
import importlib.util, json, os, site, sys
hugging_face, dependencies, ways = sys.argv[1:]
sys.path.append(dependencies)
import torch, triton
sys.path.remove(dependencies)
for ours, cwd in json.loads(ways):
    child = os.fork()
    if not child:
        os.chdir(cwd)
        site.addsitedir(ours)
        exposed = importlib.util.find_spec("kernels") is not None
        sys.path += [hugging_face, dependencies]
        import kernels, fishkern, fishkern.kernels.sum_grad_squared as kernel
        print(json.dumps([fishkern.__file__, kernel.__file__, kernels.__file__, exposed]))
        sys.exit()
    if os.waitpid(child, 0)[1]:
        sys.exit(f"{ours} in {cwd} failed")
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Run Python without PYTHONPATH, to import the installed package, and show its output if it fails."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pip(*arguments: str | Path, cwd: Path) -> None:
    """Run pip without a network."""
    run("-m", "pip", *arguments, "--no-deps", "--no-build-isolation", "--no-index", cwd=cwd)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("source") / "fishkern"
    return shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))


@pytest.fixture(scope="module")
def wheels(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheel built via an sdist, and the one built from the checkout that the sdist left its traces in."""
    folder = tmp_path_factory.mktemp("wheels")
    run("-c", "import sys; from setuptools import build_meta as b; b.build_sdist(sys.argv[1])", folder, cwd=checkout)
    pip("wheel", *folder.glob("*.tar.gz"), "--wheel-dir", folder / "sdist", cwd=folder)
    pip("wheel", checkout, "--wheel-dir", folder / "wheel", cwd=folder)
    return {way: next((folder / way).glob("*.whl")) for way in ("sdist", "wheel")}


@pytest.mark.parametrize("way", ["wheel", "sdist"])
def test_wheel_ships_the_kernels_and_no_shim(checkout: Path, wheels: dict[str, Path], way: str):
    shipped = {name for name in zipfile.ZipFile(wheels[way]).namelist() if ".dist-info/" not in name}
    package = {path.relative_to(checkout).as_posix() for path in (checkout / "fishkern").rglob("*.py")}
    kernels = {f"fishkern/kernels/{path.name}" for path in (checkout / "kernels").glob("*.py")}
    assert kernels
    assert shipped == (package - {"fishkern/kernels/__init__.py"}) | kernels | {"fishkern/py.typed"}


@pytest.mark.slow
def test_import(checkout: Path, wheels: dict[str, Path], tmp_path: Path):
    pytest.importorskip("triton")
    folders = {way: (tmp_path / way).resolve() for way in ("editable", "wheel", "sdist")}
    pip("install", "--target", folders["editable"], "--editable", checkout, cwd=tmp_path)
    for way, wheel in wheels.items():  # as pip unpacks it
        zipfile.ZipFile(wheel).extractall(folders[way])
    hugging_face = tmp_path / "hugging_face"
    (hugging_face / "kernels").mkdir(parents=True)
    (hugging_face / "kernels" / "__init__.py").touch()

    ways = {way: (folder, tmp_path) for way, folder in folders.items()}
    ways |= {"checkout": (checkout, tmp_path), "checkout over wheel": (folders["wheel"], checkout)}
    dependencies = Path(torch.__file__).parents[1]
    listed = json.dumps([list(map(str, way)) for way in ways.values()])
    printed = run("-S", "-c", PROBE, hugging_face, dependencies, listed, cwd=tmp_path).splitlines()
    for way, line in zip(ways, printed, strict=True):
        *paths, exposed = json.loads(line)
        fishkern, kernel, kernels = (Path(path).resolve() for path in paths)
        assert kernels == (hugging_face / "kernels" / "__init__.py").resolve(), way
        if way in ("wheel", "sdist"):
            assert fishkern.is_relative_to(folders[way]), way
            assert kernel == folders[way] / "fishkern" / "kernels" / "sum_grad_squared.py", way
        else:
            assert fishkern.is_relative_to(checkout), way
            assert kernel == checkout / "kernels" / "sum_grad_squared.py", way
        if way in folders:
            assert not exposed, f"an importable `kernels` of ours, where Hugging Face's belongs, by {way}"


# Runs with -S, so that nothing can be imported but the standard library, fishkern and the packages of one folder.
CORE = """
import sys
sys.path[:0] = sys.argv[2:]
import torch
import fishkern as fk
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
batches = [(torch.randn(6, 8), torch.randint(3, (6,))) for _ in range(2)]
options = {"likelihood": fk.Classification()}
statistics = fk.estimate(model, batches, **options)
statistics.save(f"{sys.argv[1]}/fisher.safetensors")
statistics = fk.Statistics.load(f"{sys.argv[1]}/fisher.safetensors")
selection = fk.select(statistics, fk.GlobalTopK(density=0.1))
optimizer = fk.MaskedAdamW(model, selection, lr=1e-2)
for x, y in batches:
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
fk.delta(model, selection).save(f"{sys.argv[1]}/delta.safetensors")
print(fk.Delta.load(f"{sys.argv[1]}/delta.safetensors").count, fk.verify(model, batches, **options).ok)
"""


@pytest.mark.slow
def test_the_core_needs_what_it_names_alone(tmp_path: Path):
    """What pip would install with it: the closure of its requirements, without extras."""
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    closure, left = set(), [Requirement(one) for one in project["dependencies"]]
    while left:
        requirement = left.pop()
        name = requirement.name.lower().replace("_", "-")
        if name in closure or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # CUDA's libraries, with a torch for CPUs
            continue
        closure.add(name)
        left += map(Requirement, needs)
    assert not closure & {"transformers", "rich", "peft"}
    tops = {
        top
        for top, distributions in metadata.packages_distributions().items()
        if closure & {one.lower().replace("_", "-") for one in distributions}
    }
    (installed := tmp_path / "installed").mkdir()
    for path in Path(torch.__file__).parents[1].iterdir():
        if path.name.partition(".")[0] in tops:
            (installed / path.name).symlink_to(path)
    printed = run("-S", "-c", CORE, tmp_path, ROOT, installed, cwd=tmp_path)
    assert printed == "19 True\n"
