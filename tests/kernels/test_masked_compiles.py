"""The kernels of the masked optimizers compile for GPUs that are not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

COMPILE = """
import json, sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fishkern.kernels.masked_adamw import _masked_adamw_kernel
from fishkern.kernels.masked_sgd import _masked_sgd_kernel

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32), "gfx942": GPUTarget("hip", "gfx942", 64)
}
KERNELS = {"adamw": _masked_adamw_kernel, "sgd": _masked_sgd_kernel}
STATE = ("exp_avg_ptr", "exp_avg_sq_ptr", "momentum_buffer_ptr", "master_ptr", "starts_ptr")

def compile(target, kernel, dtype, index, full):
    kernel = KERNELS[kernel]
    kinds = {"table_ptr": "*i64", "blocks_ptr": "*i32", "index_like": f"*{index}"}
    kinds |= {"param_like": f"*{dtype}", "grad_like": f"*{dtype}"}
    kinds |= {name: "*fp32" for name in (*STATE, "steps_ptr", "lr_ptr", "scale_ptr")}
    constants = {"MAXIMIZE": True, "NESTEROV": full, "BLOCK": 1024}
    if not full:
        constants |= {name: None for name in ("master_ptr", "starts_ptr", "scale_ptr", "momentum_buffer_ptr")}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {name: "constexpr" if name in constants else kinds.get(name, "fp32") for name in kernel.arg_names}
    place = {name: (number,) for number, name in enumerate(kernel.arg_names)}
    # Without a word on the compact tensors their loads would be of 4 bytes each.
    aligned = [name for name in STATE if name in place and name not in constants]
    source = ASTSource(
        kernel, signature, {place[name]: value for name, value in constants.items()},
        {place[name]: [["tt.divisibility", 16]] for name in aligned},
    )
    compiled = triton.compile(source, target=TARGETS[target])
    assembly = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    return {"shared": compiled.metadata.shared, "double": "f64" in assembly}

print(json.dumps([compile(*case) for case in json.loads(sys.argv[1])]))
"""

CASES = [
    (target, kernel, dtype, index, full)
    for target, dtype, index, full in (
        ("sm_80", "fp32", "i64", False),
        ("sm_90", "bf16", "i32", True),
        ("gfx942", "bf16", "i32", True),
    )
    for kernel in ("adamw", "sgd")
]


def test_masked_kernels():
    """In a process of its own: in this one the kernels may be interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-c", COMPILE, json.dumps(CASES)]
    done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for (_, kernel, *_), result in zip(CASES, json.loads(done.stdout), strict=True):
        assert result["shared"] <= 1024  # nothing is exchanged between threads
        assert result["double"] is (kernel == "adamw")  # the bias corrections, and nothing else


def test_no_table_is_made_under_capture(monkeypatch):
    """A graph would copy it again at each replay, from memory that is gone; one that is kept is no copy."""
    from fishkern.kernels import _table

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="do the step once before"):
        _table._moved(torch.zeros(1), torch.device("cuda", 0))
    params, grads = [torch.zeros(3)], [torch.ones(3)]
    first, second = (_table.tables(params, grads, [None])[0] for _ in range(2))
    assert first is second
