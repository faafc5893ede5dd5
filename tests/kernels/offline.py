"""Compiles kernels for GPUs that are not here, and reads what the compiled code takes.

It runs in a process of its own, since in that of the tests the kernels may be interpreted::

    python -m tests.kernels.offline compile [all]    prints what each case takes, as JSON
    python -m tests.kernels.offline calls            compiles all launches of the benchmark's calls, prints how many
    python -m tests.kernels.offline record           writes it for this version of Triton into resources.json

The cases go through the launcher, so that what is compiled is what it would launch.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from fishkern.kernels._hardware import A100, H100, MI300, Hardware
from fishkern.kernels._sum_grad_squared_configs import Config, Loads, configs
from fishkern.kernels.sum_grad_squared import Launch, launches
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

RESOURCES = Path(__file__).with_name("resources.json")
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32"}
NVIDIA = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Case:
    """One call of the operation, as far as the compiled code depends on it."""

    on: Hardware
    dtype: torch.dtype
    loads: Loads
    config: Config | None = None  # None: few positions
    packed: bool = False
    mean: bool = False
    tf32: bool = False
    T: int = 512

    def __str__(self) -> str:
        tiles = "x".join(map(str, list(self.config.constants.values())[:3])) if self.config else f"T={self.T}"
        options = {"packed": self.packed, "mean": self.mean, "tf32": self.tf32}
        chosen = [name for name, value in options.items() if value]
        return " ".join([self.on.family, NAMES[self.dtype], self.loads, tiles, *chosen])

    def launch(self) -> Launch:
        odd = self.loads == "elements"
        O, I = 4096 + odd, (self.config.BLOCK_I if self.config else 4096) - odd
        x, g = (torch.empty(8, self.T, width, dtype=self.dtype, device="meta") for width in (I, O))
        offsets = None
        if self.packed:
            x, g, offsets = x.flatten(0, 1), g.flatten(0, 1), torch.arange(9) * self.T
        if self.loads == "vectors" and self.on is H100:
            g = torch.empty(*g.mT.shape, dtype=self.dtype, device="meta").mT  # position last, as convolutions have it
        out = torch.empty(O, I, device="meta")
        grad_out = torch.empty(O, I, device="meta") if self.mean else None
        return launches(x, g, offsets, out, True, grad_out, self.tf32, self.on, self.config)[0]


def cases(every: bool) -> Iterator[Case]:
    """All configurations with every option, or the widest of each table with the usual ones."""
    for on in (A100, H100, MI300):
        seen = set()
        for itemsize, loads, config in configs(on):
            widest = (itemsize, loads) not in seen
            seen.add((itemsize, loads))
            if not (every or widest):
                continue
            dtype = torch.bfloat16 if itemsize == 2 else torch.float32
            yield Case(on, dtype, loads, config)
            if every or (itemsize == 2 and on is not MI300):
                yield Case(on, dtype, loads, config, packed=True)
            if every and config.BLOCK_I == 128:
                yield Case(on, dtype, loads, config, mean=True)
            if every and itemsize == 2:
                yield Case(on, torch.float16, loads, config)
            if itemsize == 4 and on is not MI300 and (every or on is H100):
                yield Case(on, dtype, loads, config, tf32=True)
        if on is H100 and not every:
            yield Case(on, torch.bfloat16, "tma", Config(128, 128, 64, 8, 5), mean=True)
        for T in (1, 2, 3, 4) if every else (4,):
            yield Case(on, torch.bfloat16, "vectors", T=T)


def resources(case: Case) -> dict[str, int]:
    """Compile, and read registers, spills, shared memory and matrix instructions."""
    compiled = compile_launch(case.launch(), TARGETS[case.on.family])
    taken = {"shared": compiled.metadata.shared}
    if case.on is MI300:
        code = compiled.asm["amdgcn"]
        taken |= {
            name: int(re.search(rf"\.{field}:\s+(\d+)", code)[1])
            for name, field in (("registers", "vgpr_count"), ("spilled", "vgpr_spill_count"))
        }
        return taken | {"matrix": len(re.findall(r"\bv_mfma", code))}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        sass = _tool("nvdisasm", "-c", file.name)
    inner = [block for block in _blocks(sass) if re.search(r"\bHGMMA\b", block)]
    return taken | {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spilled": int(re.search(r"STACK:(\d+)", usage)[1]),  # bytes for each thread
        "loop_spills": sum(len(re.findall(r"\b(?:LDL|STL)\b", block)) for block in inner),  # instructions
        "matrix": len(re.findall(r"\b(?:HGMMA|HMMA)\b", sass)),
    }


def compile_launch(launch: Launch, target: GPUTarget) -> Any:
    """Compile ahead of time what Triton would specialise at the launch."""
    kernel, signature, constants, attributes = launch.kernel, {}, {}, {}
    for number, parameter in enumerate(kernel.params):
        value = launch.arguments.get(parameter.name)
        one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or one:
            signature[parameter.name] = "constexpr"
            constants[(number,)] = value
        elif isinstance(value, TensorDescriptor):
            signature[parameter.name] = f"tensordesc<{NAMES[value.base.dtype]}{list(value.block_shape)}>"
        else:
            tensor = isinstance(value, torch.Tensor)
            wide = not tensor and value >= 2**31
            signature[parameter.name] = f"*{NAMES[value.dtype]}" if tensor else "i64" if wide else "i32"
            if tensor or (value % 16 == 0 and not parameter.do_not_specialize):
                attributes[(number,)] = [["tt.divisibility", 16]]
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=launch.options)


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([NVIDIA / name, *arguments], capture_output=True, text=True, check=True).stdout


def _blocks(sass: str) -> Iterator[str]:
    """Cut disassembled code where it is jumped to, and where it jumps."""
    block = []
    for line in sass.splitlines():
        if re.match(r"\s*\.L_x_\d+:", line):
            yield "\n".join(block)
            block = []
        block.append(line)
        if re.search(r"\b(?:BRA|EXIT)\b", line):
            yield "\n".join(block)
            block = []
    yield "\n".join(block)


def calls(on: Hardware) -> Iterator[Launch]:
    """All that the benchmark's calls launch: splits, swapped sides, results that are overwritten."""
    from benchmarks.gpu.sum_grad_squared import CASES, DTYPES, lognormal_offsets

    for case in CASES.values():
        dtype, offsets = DTYPES[case.dtype], None
        x, g = (torch.empty(case.N, case.T, width, dtype=dtype, device="meta") for width in (case.I, case.O))
        if case.grads == "transposed":
            g = torch.empty(*g.mT.shape, dtype=dtype, device="meta").mT
        if case.lengths != "equal":
            x, g, offsets = x.flatten(0, 1), g.flatten(0, 1), lognormal_offsets(case.N, case.N * case.T)
        out = torch.empty(case.O, case.I, device="meta")
        mean = torch.empty_like(out) if case.mean else None
        for add in (True, False):
            yield from launches(x, g, offsets, out, add, mean, case.allow_tf32, on)


def main(command: str, which: str = "some") -> None:
    if command == "calls":
        found = [compile_launch(launch, TARGETS[on.family]) for on in (A100, H100, MI300) for launch in calls(on)]
        print(json.dumps({"triton": triton.__version__, "compiled": len(found)}))
        return
    every = command == "record" or which == "all"
    taken = {str(case): resources(case) for case in cases(every)}
    if command == "compile":
        print(json.dumps({"triton": triton.__version__, "taken": taken}))
        return
    records = json.loads(RESOURCES.read_text()) if RESOURCES.exists() else {}
    records[triton.__version__] = taken
    lines = [
        f'  "{version}": {{\n'
        + ",\n".join(f"    {json.dumps(name)}: {json.dumps(value)}" for name, value in sorted(records[version].items()))
        + "\n  }"
        for version in sorted(records)
    ]
    RESOURCES.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
