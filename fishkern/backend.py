"""Which implementation of an operation runs, and why.

Every operation in :mod:`fishkern.ops` has a PyTorch reference; some also have a Triton kernel of the same name and
signature in :mod:`fishkern.kernels`. ``"auto"`` takes the kernel exactly when :func:`why_not_triton` finds nothing
against it. A backend that is requested by name is never replaced by another: if it cannot run, the call raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

Backend = Literal["auto", "torch", "triton"]
BACKENDS: tuple[Backend, ...] = ("auto", "torch", "triton")

# The kernels accumulate in float32, which would cost float64 its precision.
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The interpreter works on the bit patterns of bfloat16 and is silently wrong (triton issue 11584).
_INTERPRETER_DTYPES = (torch.float32, torch.float16)

# Each thread and each asynchronous task has its own, so that one cannot change the backend of another.
_current: ContextVar[Backend] = ContextVar("fishkern_backend", default="auto")


class BackendUnavailableError(RuntimeError):
    """The backend that was requested by name cannot run on these tensors."""


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Set the default backend inside a ``with`` block, for calls that do not name one.

    Args:
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.

    Yields:
        Nothing.

    Raises:
        ValueError: ``backend`` is none of these.
    """
    token = _current.set(_known(backend))
    try:
        yield
    finally:
        _current.reset(token)


def current() -> Backend:
    """Return the default backend. Read it before a backward pass: autograd's threads do not inherit it.

    Returns:
        The backend of the innermost :func:`use_backend`, else ``"auto"``.
    """
    return _current.get()


def why_not_triton(*tensors: Tensor) -> str | None:
    """Say why Triton cannot run on these tensors.

    Args:
        tensors: Every tensor the kernel would read or write, of any shape. Integer and boolean ones (indices, offsets)
            may have any dtype, since a kernel is compiled for the dtypes of its arguments. With no tensors there is no
            objection.

    Returns:
        The reason in words, or ``None`` when the kernel can run.
    """
    if not _has_triton():
        return "the triton package is not installed"
    for tensor in tensors:
        if _is_number(tensor) and tensor.dtype not in _KERNEL_DTYPES:
            return f"the kernels accumulate in float32 and a tensor is {_name(tensor.dtype)}"
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        return f"the tensors are on several devices: {', '.join(sorted(map(str, devices)))}"
    for device in devices:
        if device.type != "cuda":  # torch calls AMD's GPUs cuda as well
            return f"the tensors are on the {'CPU' if device.type == 'cpu' else device}"
        if reason := _unserved(device):
            return reason
    if _interprets():
        return "TRITON_INTERPRET is set, and the interpreter is for tests on the CPU"
    return None


def choose(reference: Callable, backend: Backend | None, *tensors: Tensor) -> Callable:
    """Pick the implementation of one operation for these tensors.

    Args:
        reference: The PyTorch reference, named ``<op>_torch`` (``<op>_torch_`` where it works in place).
        backend: The caller's choice; ``None`` for the default of :func:`use_backend`.
        tensors: Every tensor the operation would read or write.

    Returns:
        ``reference`` itself, or the function of the same name without ``_torch`` from ``fishkern.kernels.<op>``.

    Raises:
        BackendUnavailableError: Triton was named, and cannot run.
        ValueError: ``backend`` is none of :data:`BACKENDS`.
    """
    backend = _current.get() if backend is None else _known(backend)
    if backend == "torch" or (backend == "auto" and not tensors):  # no work, and perhaps no GPU
        return reference
    name = reference.__name__.replace("_torch", "")
    if reason := why_not_triton(*tensors):
        if backend == "auto":
            return reference
        if not _interpreter_can(*tensors):
            raise BackendUnavailableError(f"{name} cannot run on Triton: {reason}. Ask for 'auto' or 'torch'.")
    return _kernel(name)


def _known(backend: str) -> Backend:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}.")
    return backend


def _interpreter_can(*tensors: Tensor) -> bool:
    """Whether Triton's interpreter is on, and these are CPU tensors of dtypes that it computes correctly."""
    return _interprets() and all(
        tensor.device.type == "cpu" and (tensor.dtype in _INTERPRETER_DTYPES or not _is_number(tensor))
        for tensor in tensors
    )


@cache  # every call of an operation asks
def _unserved(device: torch.device) -> str | None:
    return import_module("fishkern.kernels._hardware").why_not(device)


def _interprets() -> bool:
    # Triton is imported here and not above, since a process that names torch as its backend does not need it.
    return _has_triton() and import_module("triton").knobs.runtime.interpret


def _is_number(tensor: Tensor) -> bool:
    """Whether the tensor has values to compute with, not indices, counts or masks."""
    return tensor.is_floating_point() or tensor.is_complex()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


@cache
def _kernel(name: str) -> Callable:
    return getattr(import_module(f"fishkern.kernels.{name.rstrip('_')}"), name)
