"""A GPU that is not there, for whole calls of the measurements: what runs is all but the device.

Every process that is started in a copy of the checkout takes this from ``sitecustomize.py`` there. Tensors asked for on
``cuda`` are on the CPU, kernels compile for sm_90 for real, and a launch does nothing. So nothing is computed:
comparisons of values (:data:`VALUES`, and tests in :data:`VALUE_TESTS`) are taken out here, and are made by Triton's
interpreter in the ordinary tests. Shapes are small; times mean nothing.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

NAME = "Pretended GPU"
ROOT = Path(__file__).resolve().parents[3]
# Comparisons of computed values, by module and name, and their replacements.
VALUES: dict[str, object] = {
    "torch.testing.assert_close": lambda *values, **options: None,
    "tests.support.closeness.assert_as_accurate": lambda *values, **options: None,
    "benchmarks.cases.sum_grad_squared.error_of": lambda *values: 0.0,
    "benchmarks.cases.smoke.disagreement": lambda *values: 0.0,
    "benchmarks.cases.smoke.difference": lambda *values: 0.0,
    "benchmarks.cases.smoke.demand_equal": lambda *values: None,
    "benchmarks.cases.log_histogram.check": lambda *values: None,
    "benchmarks.cases.streaming_topk.check": lambda *values: None,
    "benchmarks.cases.streaming_topk.demand_equal": lambda *values: None,
    "benchmarks.cases.variants.error_of": lambda *values: 0.0,
    "benchmarks.cases.whole_pass.disagreement": lambda *values: 0.0,
}
# Tests that compare values themselves, as pytest names them without parameters.
VALUE_TESTS = {
    "tests/kernels/test_streaming_topk.py": (
        "test_bits_are_those_of_their_scores",
        "test_kernel_selects_infinite_scores_at_the_threshold",
        "test_kernel_takes_blocks_at_any_address",
        "test_many_scores_at_the_threshold",
        "test_kernel_counts_scores_at_infinite_ends_where_a_chunk_is_short",
        "test_scores_of_any_scale_are_read_once",
        "test_the_room_is_what_the_sample_lets_expect",
        "test_ties_are_taken_from_chunks_with_a_quota_alone",
    ),
    "tests/kernels/test_sum_grad_squared.py": ("test_bits_repeat_at_the_size_of_a_layer",),
    "tests/laws/test_optimizers.py": (
        "test_a_compiled_step_is_the_step",
        "test_closure_and_hooks",
        "test_density_1_is_torch",
        "test_master_is_float32_rounded",
        "test_nothing_else_moves",
        "test_restored_weights_stay_restored",
    ),
    "tests/models/test_backends.py": ("test_agree",),
    "tests/ops/test_log_histogram.py": (
        "test_any_edges_and_values",
        "test_any_number_of_bins",
        "test_equals_numpy",
        "test_half",
        "test_infinite_edges_count_all_but_nan",
        "test_order_shape_and_strides_make_no_difference",
        "test_values_on_the_edges",
    ),
    "tests/ops/test_masked_adamw.py": (
        "test_master_follows_weights_that_were_restored",
        "test_master_is_float32_rounded",
        "test_without_gradient_nothing_moves",
    ),
    "tests/ops/test_streaming_topk.py": (
        "test_nan_is_refused_by_name",
        "test_nan_is_refused_wherever_it_stands",
        "test_neither_scores_nor_random_state_change",
        "test_strides_shapes_and_gradients",
        "test_the_kernel_selects_what_the_reference_selects",
        "test_ties_go_to_the_earlier_block_and_the_smaller_index",
    ),
    "tests/ops/test_sum_grad_squared.py": ("test_bits_repeat", "test_nothing_is_recorded_and_autocast_is_ignored"),
}


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Skip the tests that compare values."""
    import pytest

    for item in items:
        if item.originalname in VALUE_TESTS.get(str(item.path.relative_to(ROOT)), ()):
            item.add_marker(pytest.mark.skip(reason="it compares values, and nothing is computed here"))


class _OnTheCPU(TorchFunctionMode):
    """Puts tensors on the CPU that are requested on a GPU."""

    def __torch_function__(
        self, function: Callable, types: object, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is torch.device:
            return function(*args, **(kwargs or {}))
        return function(*map(_moved, args), **{name: _moved(value) for name, value in (kwargs or {}).items()})


def _moved(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    return "cpu" if isinstance(value, str) and value.startswith("cuda") else value


class _Event:
    def __init__(self, enable_timing: bool = False) -> None:
        pass

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: _Event) -> float:
        return 1.0


def pretend() -> None:
    """Make this process believe in the device."""
    _hide_the_installed_package()
    sys.modules["bitsandbytes"] = None  # it looks for streams of a real device as soon as PEFT imports it
    assert Path(importlib.import_module("fishkern").__file__).is_relative_to(ROOT)
    _cuda()
    _driver()
    _small()
    for name, instead in VALUES.items():
        module, _, function = name.rpartition(".")
        owner = importlib.import_module(module)
        getattr(owner, function)  # raises for a name that is no longer there
        setattr(owner, function, instead)


def _hide_the_installed_package() -> None:
    """An editable installation brings a finder of its own."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if "fishkern" not in getattr(finder, "__module__", "")]


def _cuda() -> None:
    properties = SimpleNamespace(
        name=NAME,
        major=9,
        minor=0,
        multi_processor_count=132,
        total_memory=2**31,
        shared_memory_per_block_optin=232_448,
    )

    class NoGraph:
        def __init__(self, *args: object) -> None:
            raise RuntimeError("no graph can be captured here")

    instead = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda *device: NAME,
        "get_device_properties": lambda *device: properties,
        "get_device_capability": lambda *device: (9, 0),
        "is_current_stream_capturing": lambda: False,
        "synchronize": lambda *device: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda *device: None,
        "memory_allocated": lambda *device: 0,
        "max_memory_allocated": lambda *device: 0,
        "Event": _Event,
        "CUDAGraph": NoGraph,
    }
    for name, value in instead.items():
        setattr(torch.cuda, name, value)
    _OnTheCPU().__enter__()

    class Generator(torch.Generator):
        def __new__(cls, device: object = "cpu") -> torch.Generator:
            return torch._C.Generator.__new__(cls, "cpu")

    torch.Generator = Generator


def _driver() -> None:
    """Kernels compile for sm_90 and are loaded nowhere."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    import fishkern.backend as backend
    from fishkern.kernels import _hardware

    class Utils:
        def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, ...]:
            return 0, 0, 128, 0, 1024

        def get_device_properties(self, device: int) -> dict[str, int]:
            return {"max_shared_mem": 232_448, "multiprocessor_count": 132, "max_num_regs": 65_536, "warpSize": 32}

        def __getattr__(self, name: str) -> Callable:  # of descriptors, whose names differ by version
            return lambda *args: object()

    class Launcher:
        def __init__(self, source: Any, metadata: Any) -> None:
            self._wanted = len(source.signature)

        def __call__(self, x: int, y: int, z: int, stream: int, function: int, *args: object) -> None:
            given = args[4:]  # after metadata and hooks
            assert len(given) == self._wanted
            assert 0 < x < 2**31  # an empty grid is an error of CUDA's
            assert 0 < max(y, z) < 2**16

    class Driver:
        utils = Utils()
        launcher_cls = Launcher
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
        get_current_device = staticmethod(lambda: 0)
        set_current_device = staticmethod(lambda device: None)
        get_current_stream = staticmethod(lambda device: 0)
        get_device_interface = staticmethod(lambda: torch.cuda)
        get_active_torch_device = staticmethod(lambda: torch.device("cpu"))

    driver.set_active(Driver())
    _hardware.INTERPRETER = _hardware.H100
    real = backend.why_not_triton

    def why_not_triton(*tensors: torch.Tensor) -> str | None:
        reason = real(*tensors)
        return None if reason == "the tensors are on the CPU" else reason

    backend.why_not_triton = why_not_triton
    sys.modules["fishkern"].why_not_triton = why_not_triton
    assert triton.knobs.runtime.interpret is False


def _small() -> None:
    """Sizes that two cores can allocate, off the tiles as the real ones are."""
    from benchmarks.cases import (
        expert_sum_grad_squared,
        group_sum_grad_squared,
        log_histogram,
        masked_adamw,
        project_sum_squared,
        roofs,
        siblings,
        smoke,
        streaming_topk,
        sum_grad_squared,
        variants,
        whole_pass,
    )
    from benchmarks.gpu import limits, timing
    from benchmarks.subjects.scores import TopK
    from benchmarks.subjects.transformers import Workload

    def shorter(case: sum_grad_squared.Case) -> sum_grad_squared.Case:
        wide = {name: size if size <= 64 else 256 + size % 8 for name, size in (("O", case.O), ("I", case.I))}
        return replace(case, **wide, N=min(case.N, 3), T=min(case.T, 128))

    layers = sum_grad_squared, group_sum_grad_squared, project_sum_squared
    for cases in (*(module.CASES for module in layers), smoke.LAYERS, variants.CASES):
        cases.update({name: shorter(case) for name, case in cases.items()})
    sum_grad_squared.LORA_LAYERS = 1
    experts = {name: replace(case, E=3, O=70, I=40, N=2) for name, case in expert_sum_grad_squared.CASES.items()}
    expert_sum_grad_squared.CASES.update(experts)

    def tiny(case: Workload) -> Workload:
        sizes = dict(layers=1, hidden=16, intermediate=24, vocabulary=31, heads=4, key_heads=2)
        return replace(case, shape=replace(case.shape, **sizes), N=2, T=5, batches=2)

    whole_pass.CASES.update({name: tiny(case) for name, case in whole_pass.CASES.items()})
    smoke.MODEL = tiny(smoke.MODEL)
    for cases in (streaming_topk.CASES, smoke.SCORES):
        cases.update({name: TopK(10_000, case.density, 7, case.zeros) for name, case in cases.items()})
    log_histogram.CASES.update({name: replace(case, n=10_000) for name, case in log_histogram.CASES.items()})
    siblings.CASES.update({name: replace(case, N=2, T=3, D=8) for name, case in siblings.CASES.items()})
    masked_adamw.CASES.update({name: replace(case, model="lora") for name, case in masked_adamw.CASES.items()})
    roofs.COPIED, roofs.SIDE = 2**16, 64
    timing.FLUSHED_BYTES, timing.SECONDS = 8, 0.0
    # The planned times are those of a device in a machine of 16 cores.
    limits.Clock.limit = lambda self, planned: 3600.0
    limits.Clock.left = lambda self: 3600.0
