"""Who runs an operation: the reference, the kernel, or nobody, and why."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch

from fishkern import BackendUnavailableError, backend, use_backend, why_not_triton
from fishkern.backend import choose
from fishkern.ops.sum_grad_squared import sum_grad_squared_torch as reference

HAS_TRITON = backend._has_triton()
ON_GPU = torch.cuda.is_available()
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="the triton package is not installed")
interpreted = pytest.mark.skipif(not HAS_TRITON or ON_GPU, reason="the interpreter stands in where there is no GPU")

cpu = torch.ones(2)


def kernel():
    from fishkern.kernels.sum_grad_squared import sum_grad_squared

    return sum_grad_squared


@needs_triton
@pytest.mark.parametrize(
    "tensors, reason",
    [
        ([cpu], "CPU"),
        ([torch.ones((), dtype=torch.int64)], "CPU"),
        ([torch.ones(1, device="meta")], "meta"),
        ([cpu, torch.ones(1, device="meta")], "several devices: cpu, meta"),
        ([cpu, cpu.double()], "accumulate in float32 and a tensor is float64"),
        ([cpu.to(torch.complex64)], "complex64"),
        ([cpu.to(torch.float8_e4m3fn)], "float8_e4m3fn"),
    ],
)
def test_reasons(tensors, reason):
    assert reason in why_not_triton(*tensors)


@pytest.mark.gpu
def test_no_reason():
    tensor = torch.ones(2, device="cuda")
    assert why_not_triton(tensor, tensor.long(), tensor.bool(), tensor.bfloat16()) is None
    assert choose(reference, "auto", tensor) is kernel()
    assert choose(reference, "torch", tensor) is reference


def fake_gpu(monkeypatch, hip: str | None = None, **properties):
    """A tensor that claims to be on a GPU with these properties."""
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(backend, "_interprets", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**properties))
    monkeypatch.setattr(backend, "_unserved", backend._unserved.__wrapped__)  # which remembers
    number = {"is_floating_point": lambda: True, "is_complex": lambda: False}
    return SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float32, **number)


@needs_triton
@pytest.mark.parametrize(
    "name, capability, served",
    [
        ("Tesla V100", (7, 0), False),
        ("Tesla T4", (7, 5), False),
        ("A100", (8, 0), True),
        ("RTX 3090", (8, 6), True),
        ("L4", (8, 9), True),
        ("H200", (9, 0), True),
        ("B200", (10, 0), True),
        ("RTX 5090", (12, 0), True),
    ],
)
def test_compute_capability(name, capability, served, monkeypatch):
    tensor = fake_gpu(monkeypatch, name=name, major=capability[0], minor=capability[1])
    reason = why_not_triton(tensor)
    if served:
        assert reason is None
        assert choose(reference, "auto", tensor) is kernel()
    else:
        number = "{}.{}".format(*capability)
        assert reason == f"the kernels are for compute capability 8.0 or newer, and cuda:0 ({name}) has {number}"
        assert choose(reference, "auto", tensor) is reference
        with pytest.raises(BackendUnavailableError, match=f"{name}\\) has {number}. Ask for 'auto' or 'torch'"):
            choose(reference, "triton", tensor)


@needs_triton
@pytest.mark.parametrize(
    "arch, served", [("gfx942:sramecc+:xnack-", True), ("gfx950", True), ("gfx90a", True), ("gfx1100", False)]
)
def test_architectures_of_amd(arch, served, monkeypatch):
    tensor = fake_gpu(monkeypatch, hip="7.0", gcnArchName=arch, major=11, minor=0)
    reason = "of AMD's GPUs the kernels are for gfx90a, gfx942, gfx950, and cuda:0 is gfx1100"
    assert why_not_triton(tensor) == (None if served else reason)


@needs_triton
def test_a_device_is_asked_once(monkeypatch):
    remembered = backend._unserved
    tensor = fake_gpu(monkeypatch)
    asked = []
    hardware = SimpleNamespace(why_not=lambda device: asked.append(device))
    monkeypatch.setattr(backend, "_unserved", remembered)
    monkeypatch.setattr(backend, "import_module", lambda name: hardware)
    remembered.cache_clear()
    assert [why_not_triton(tensor) for _ in range(3)] == [None] * 3
    remembered.cache_clear()
    assert asked == [tensor.device]


@needs_triton
@pytest.mark.parametrize("interprets", [True, False])
def test_without_tensors_nothing_objects(interprets, monkeypatch):
    """A kernel may run by name on nothing at all; ``"auto"`` takes the reference for that."""
    monkeypatch.setattr(backend, "_interprets", lambda: interprets)
    assert (why_not_triton() is None) is not interprets
    assert choose(reference, "triton") is kernel()
    assert choose(reference, "auto") is reference
    with use_backend("triton"):
        assert choose(reference, None) is kernel()


def test_without_triton(monkeypatch):
    monkeypatch.setattr(backend, "_has_triton", lambda: False)
    assert "not installed" in why_not_triton(cpu)
    assert choose(reference, None, cpu) is reference
    with pytest.raises(BackendUnavailableError, match="sum_grad_squared cannot run on Triton: .* not installed"):
        choose(reference, "triton", cpu)


@needs_triton
def test_auto_never_takes_the_interpreter(monkeypatch):
    """Not even for tensors on a GPU."""
    monkeypatch.setattr(backend, "_interprets", lambda: True)
    assert choose(reference, "auto", cpu) is reference
    if ON_GPU:
        assert "TRITON_INTERPRET" in why_not_triton(cpu.cuda())


@interpreted
def test_interpreter_by_name():
    """It runs float32, float16 and whatever is no number; it would be silently wrong for bfloat16."""
    for dtype in (torch.float32, torch.float16, torch.int64, torch.int32, torch.bool):
        assert choose(reference, "triton", cpu, cpu.to(dtype)) is kernel()
    for refused in (cpu.bfloat16(), cpu.double(), torch.ones(1, device="meta")):
        with pytest.raises(BackendUnavailableError, match="cannot run on Triton"):
            choose(reference, "triton", cpu, refused)


@needs_triton
def test_named_backend_is_a_demand(monkeypatch):
    monkeypatch.setattr(backend, "_interprets", lambda: False)
    with pytest.raises(BackendUnavailableError, match="the tensors are on the CPU"):
        choose(reference, "triton", cpu)


@interpreted
def test_ambient_backend():
    """``None`` takes it, a name does not; it nests, ends with the block, and is the thread's own."""
    elsewhere = []
    with use_backend("triton"):
        assert choose(reference, None, cpu) is kernel()
        assert choose(reference, "torch", cpu) is reference
        assert choose(reference, "auto", cpu) is reference
        thread = threading.Thread(target=lambda: elsewhere.append(choose(reference, None, cpu)))
        thread.start()
        thread.join()
        with use_backend("torch"):
            assert choose(reference, None, cpu) is reference
        assert choose(reference, None, cpu) is kernel()
    assert choose(reference, None, cpu) is reference
    assert elsewhere == [reference]


def test_ambient_backend_ends_with_an_exception():
    with pytest.raises(KeyError), use_backend("torch"):
        raise KeyError
    assert backend._current.get() == "auto"


def test_unknown_backend():
    with pytest.raises(ValueError, match=r"must be one of \('auto', 'torch', 'triton'\), got 'cuda'"):
        choose(reference, "cuda", cpu)
    with pytest.raises(ValueError, match="must be one of"), use_backend("cuda"):
        pass


@interpreted
def test_operations_in_place_keep_their_underscore(monkeypatch):
    """The file has none."""
    names = []
    monkeypatch.setattr(backend, "import_module", lambda name: names.append(name) or backend)
    monkeypatch.setattr(backend, "_interprets", lambda: True)
    monkeypatch.setattr(backend, "some_step_", kernel, raising=False)

    def some_step_torch_() -> None: ...

    assert choose(some_step_torch_, "triton", cpu) is kernel
    assert names == ["fishkern.kernels.some_step"]
