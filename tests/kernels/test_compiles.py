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

COMPILE_SUM_GRAD_SQUARED = """
import json, sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fishkern.kernels.sum_grad_squared import _sum_grad_squared_kernel as kernel

capability, dtype, packed = json.loads(sys.argv[1])
pointers = {"x_ptr": f"*{dtype}", "g_ptr": f"*{dtype}", "offsets_ptr": "*i64", "out_ptr": "*fp32"}
blocks = {"PACKED": packed, "BLOCK_T": 32, "BLOCK_I": 64, "BLOCK_O": 64}
unit_strides = {"stride_xi": 1, "stride_go": 1, "stride_oi": 1}
constexprs = {(kernel.arg_names.index(name),): value for name, value in (blocks | unit_strides).items()}
signature = {
    name: "constexpr" if name in blocks or name in unit_strides else pointers.get(name, "i32")
    for name in kernel.arg_names
}
divisible = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in [*pointers, "T", "I", "O"]}
compiled = triton.compile(
    ASTSource(kernel, signature, constexprs, divisible), target=GPUTarget("cuda", capability, 32)
)
print(json.dumps({"shared": compiled.metadata.shared, "mma": "mma" in compiled.asm["ptx"]}))
"""


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("dtype, packed", [("bf16", False), ("bf16", True), ("fp16", False), ("fp32", True)])
def test_sum_grad_squared(capability: int, dtype: str, packed: bool):
    """In a process of its own: in this one the kernels may be interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-c", COMPILE_SUM_GRAD_SQUARED, json.dumps([capability, dtype, packed])]
    done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    compiled = json.loads(done.stdout)
    assert compiled["shared"] <= SHARED_MEMORY[capability]
    assert compiled["mma"] is (dtype != "fp32")  # tensor cores would round float32 to tf32
