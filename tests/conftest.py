"""Fixtures of every test: seeds, determinism, offline hubs, and the two backends."""

from __future__ import annotations

import gc
import os
import random
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path

# Read at import, so they are set before anything else is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with a fixed workspace

import pytest
import torch
from hypothesis import settings

ON_GPU = torch.cuda.is_available()
HAS_TRITON = find_spec("triton") is not None

if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
torch.set_num_threads(1)  # the models are small: threads that wait for each other cost more than they bring

settings.register_profile("fishkern", deadline=None)  # the first call of an operation pays for its set-up
settings.load_profile("fishkern")


def pytest_report_header() -> str:
    """Say what a green run means: a CPU suite is not a GPU result."""
    if not HAS_TRITON:
        return "fishkern: triton is not installed, only the PyTorch references run"
    if not ON_GPU:
        return "fishkern: no CUDA device, the kernels run in Triton's interpreter; this is not a GPU result"
    return f"fishkern: the kernels run on {torch.cuda.get_device_name()}"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Offer to run whole matrices with the quick tests, as on a GPU."""
    parser.addoption("--every-case", action="store_true", help="take every case of a `matrix` for a quick one")


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark two thirds of the cases of each test that is marked ``matrix`` as slow, drawn by its name."""
    if ON_GPU or config.getoption("every_case"):
        return
    matrices = defaultdict(list)
    for item in items:
        if item.get_closest_marker("matrix") and not item.get_closest_marker("slow"):
            matrices[item.nodeid.partition("[")[0]].append(item)
    for name, cases in matrices.items():
        for item in random.Random(name).sample(cases, 2 * len(cases) // 3):
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """Let the collector of garbage pass over the tests and libraries, which stay until the end."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is marked ``gpu`` where there is none."""
    if item.get_closest_marker("gpu") and not ON_GPU:
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Start every test from the same random state, with NaN in uninitialised memory."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(0)


# Of session scope, since hypothesis refuses function-scoped fixtures.
@pytest.fixture(scope="session", params=["torch", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend by name, as the operations take it."""
    if request.param == "triton" and not HAS_TRITON:
        pytest.skip("the triton package is not installed")
    return request.param


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of small real models and data sets next to the checkout."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no data at {folder}")
    return folder
