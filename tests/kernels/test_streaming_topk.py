"""The kernels of streaming top-k compile for GPUs that are not here, and read whole chunks in wide loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

COMPILE = """
import json, re, torch, triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fishkern.kernels import streaming_topk as module

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32), "gfx942": GPUTarget("hip", "gfx942", 64)
}
POINTERS = {
    "table_ptr": "*i64", "numbers_ptr": "*i64", "bits_ptr": "*i32", "counts_ptr": "*i32", "inside_ptr": "*i64",
    "slots_ptr": "*i64", "values_ptr": "*fp32", "quotas_ptr": "*i32", "starts_ptr": "*i64", "offsets_ptr": "*i64",
}
FLOATS = {"low", "high", "end"}
CASES = [
    ("_sample_kernel", tl.bfloat16, True),
    ("_select_kernel", tl.float32, True),
    ("_select_kernel", tl.bfloat16, False),
    ("_take_ties_kernel", tl.float16, True),
    ("_emit_kernel", None, None),
]

def compile(target, name, **constants):
    kernel = getattr(module, name)
    pointers = POINTERS | {"out_ptr": "*i32" if name == "_emit_kernel" else "*fp32"}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    types = pointers | dict.fromkeys(FLOATS, "fp32") | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    place = {name: (number,) for number, name in enumerate(kernel.arg_names)}
    compiled = triton.compile(
        ASTSource(
            kernel, signature, {place[name]: value for name, value in constants.items()},
            {place[name]: [["tt.divisibility", 16]] for name in kernel.arg_names if name in pointers},
        ),
        target=target,
    )
    text = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    wide = re.findall(r"ld[.]global[.a-z:_0-9]*v4[.][bf]32|(?:global|buffer)_load_dwordx4", text)
    return {"shared": compiled.metadata.shared, "wide": len(wide)}

found = {}
for family, target in TARGETS.items():
    for name, dtype, largest in CASES:
        found[f"{family} {dtype} {name}"] = compile(
            target, name, DTYPE=dtype, ALIGNED=True, LARGEST=largest, CHUNK=module._CHUNK, COUNT=256
        )
print(json.dumps(found))
"""


def test_every_kernel_compiles():
    """In a process of its own: in this one the kernels may be interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for case, taken in json.loads(done.stdout).items():
        assert taken["shared"] <= 65_536, case
        # A pass is bound by memory: 16 bytes at a time where a chunk is whole, which a hint before the cast would lose.
        assert taken["wide"] or "_select_kernel" not in case, case
