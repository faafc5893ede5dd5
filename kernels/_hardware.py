"""Device properties used by the launchers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch


@dataclass(frozen=True)
class Hardware:
    """A device, as far as tile sizes depend on it.

    Args:
        family: The architecture whose tables it takes, the nearest below its own: ``"sm_80"``, ``"sm_90"`` or
            ``"gfx942"``; ``"interpreter"`` for Triton's interpreter on the CPU.
        processors: Streaming multiprocessors, or AMD's compute units.
        shared: Bytes of shared memory that one program may have. Triton's compiler does not check them.
    """

    family: str
    processors: int
    shared: int


A100 = Hardware("sm_80", 108, 166_912)
H100 = Hardware("sm_90", 132, 232_448)
MI300 = Hardware("gfx942", 304, 65_536)
INTERPRETER = Hardware("interpreter", 1, 232_448)

# Bytes of shared memory of AMD's GPUs that have the matrix units of gfx942, whose tables they take.
_AMD_SHARED = {"gfx90a": 65_536, "gfx942": MI300.shared, "gfx950": 163_840}
# Oldest compute capability (A100) that copies to shared memory in the background and multiplies bfloat16.
_OLDEST = 8, 0


def why_not(device: torch.device) -> str | None:
    """Say what keeps the kernels from a GPU.

    Args:
        device: A GPU.

    Returns:
        The reason in words, or ``None`` where there are tables for it.
    """
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        if (name := _architecture(properties)) not in _AMD_SHARED:
            return f"of AMD's GPUs the kernels are for {', '.join(_AMD_SHARED)}, and {device} is {name}"
    elif (capability := (properties.major, properties.minor)) < _OLDEST:
        oldest, own = ("{}.{}".format(*numbers) for numbers in (_OLDEST, capability))
        return f"the kernels are for compute capability {oldest} or newer, and {device} ({properties.name}) has {own}"
    return None


@cache
def hardware(device: torch.device) -> Hardware:
    """Describe a device.

    Args:
        device: Of the tensors; the CPU means the interpreter.

    Returns:
        Its description.
    """
    if device.type == "cpu":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Hardware("gfx942", properties.multi_processor_count, _AMD_SHARED[_architecture(properties)])
    shared = properties.shared_memory_per_block_optin
    # Consumer chips of any generation have less shared memory than the server chips that the tables are for.
    family = "sm_90" if (properties.major, properties.minor) >= (9, 0) and shared >= H100.shared else "sm_80"
    return Hardware(family, properties.multi_processor_count, shared)


def to_gpu(tensor: torch.Tensor, device: torch.device, instead: str) -> torch.Tensor:
    """Copy a table from the CPU without waiting for the device.

    Args:
        tensor: On the CPU.
        device: Where to; the CPU means the interpreter, which has no CUDA graphs.
        instead: What to do where a CUDA graph is being captured, for the error.

    Returns:
        The copy.

    Raises:
        RuntimeError: A CUDA graph is being captured: a replay would copy again, from memory that is gone by then.
    """
    if device.type != "cuda":
        return tensor.to(device)
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"a CUDA graph cannot capture the copy of a table from the CPU: {instead}")
    return tensor.pin_memory().to(device, non_blocking=True)


def _architecture(properties: Any) -> str:
    return properties.gcnArchName.partition(":")[0]
