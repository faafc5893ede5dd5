"""The kernels compile for GPUs that are not here, and fit into their shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

# Bytes of shared memory that one program may have; Triton does not check them before the launch.
SHARED_MEMORY = {80: 166_912, 90: 232_448}

CASES = [("bf16", False), ("fp16", True), ("fp32", False), ("fp32", True)]

COMPILE = """
import json, sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fishkern.kernels.sum_grad_squared import _sum_grad_squared_kernel as kernel

def compile(capability, dtype, packed):
    pointers = {"x_ptr": f"*{dtype}", "g_ptr": f"*{dtype}", "offsets_ptr": "*i64", "out_ptr": "*fp32"}
    constants = {"PACKED": packed, "BLOCK_T": 32, "BLOCK_I": 64, "BLOCK_O": 64}
    constants |= {"stride_xi": 1, "stride_go": 1, "stride_oi": 1}  # as the launcher specialises them
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in kernel.arg_names}
    place = {name: (number,) for number, name in enumerate(kernel.arg_names)}
    compiled = triton.compile(
        ASTSource(
            kernel, signature, {place[name]: value for name, value in constants.items()},
            {place[name]: [["tt.divisibility", 16]] for name in [*pointers, "T", "I", "O"]},
        ),
        target=GPUTarget("cuda", capability, 32),
    )
    return {"shared": compiled.metadata.shared, "tensor cores": "mma" in compiled.asm["ptx"]}

capabilities, cases = map(json.loads, sys.argv[1:])
print(json.dumps([[compile(capability, *case) for case in cases] for capability in capabilities]))
"""


def test_sum_grad_squared():
    """In a process of its own: in this one the kernels may be interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-c", COMPILE, json.dumps(list(SHARED_MEMORY)), json.dumps(CASES)]
    done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for limit, results in zip(SHARED_MEMORY.values(), json.loads(done.stdout), strict=True):
        for (dtype, _), result in zip(CASES, results, strict=True):
            assert result["shared"] <= limit
            assert result["tensor cores"] is (dtype != "fp32")  # which would round float32 to tf32
