"""Possible replacements of the kernel of ``sum_grad_squared``: other tiles, other forms of it, another kernel.

Each is checked against float64 rows before it is timed; one that is wrong says so in its record, and has no time. The
warp-specialised kernel has parts of its own, because a mistake in its barriers would make it hang.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.cases.sum_grad_squared import GATE, Case, error_of
from benchmarks.engine.turns import Run
from benchmarks.gpu import Part, Record
from benchmarks.gpu.timing import time_providers

TESTS: dict[str, list[str]] = {"gpu": []}  # users run none of these kernels
CASES = {
    "gate 8x512": Case(**GATE, N=8, T=512),
    "gate 32x128": Case(**GATE, N=32, T=128),
    "gate 256x16": Case(**GATE, N=256, T=16),
    "2048x2048 8x512": Case(O=2048, I=2048, N=8, T=512),
    "5632x2048 8x512": Case(O=5632, I=2048, N=8, T=512),
    "gate 2x8192": Case(**GATE, N=2, T=8192),
}
# Above any rounding, and below the effect of any wrong index.
WRONG = 1e-3


def parts(device: torch.device) -> list[Part]:
    plain = [Part(name, partial(_measure, _tiles, case, device), seconds=35) for name, case in CASES.items()]
    new = [
        Part(f"{name} specialised", partial(_measure, _specialized, case, device), seconds=12)
        for name, case in CASES.items()
    ]
    return plain + new


def _measure(
    ways: Callable[[Case, Tensor, Tensor, Tensor], dict[str, Run]], case: Case, device: torch.device
) -> Iterator[Record]:
    x, g, _ = case.inputs(device)
    out = torch.zeros(case.O, case.I, device=device)
    errors = {}

    def checked(name: str, run: Run) -> Run:
        def first_time() -> None:
            if name not in errors:
                out.zero_()
                run()
                errors[name] = error_of(out, case, x, g)
                if not errors[name] <= WRONG:
                    raise ArithmeticError(f"wrong by {errors[name]:.1e}")
            run()

        return first_time

    providers = {name: checked(name, run) for name, run in ways(case, x, g, out).items()}
    providers["cublas_dw"] = lambda: g.view(-1, case.O).mT @ x.view(-1, case.I)
    for provider, figures in time_providers(providers, ours="cublas_dw", device=device).items():
        error = {"error": f"{errors[provider]:.1e}"} if provider in errors else {}
        yield {
            "provider": provider, "case": asdict(case), "dtype": case.dtype, "flops": case.flops(), **error, **figures,
        }  # fmt: skip


def _tiles(case: Case, x: Tensor, g: Tensor, out: Tensor) -> dict[str, Run]:
    from fishkern.kernels._hardware import hardware
    from fishkern.kernels._sum_grad_squared_configs import TOGETHER, Config
    from fishkern.kernels.sum_grad_squared import Operands, launches

    on = hardware(x.device)
    table = launches(Operands(x, g, None, out), on)
    BLOCK_T = next(length for length in (16, 32, 64) if length >= min(case.T, 64))
    others = {
        "128x256 s4": Config(128, 256, BLOCK_T, 8, 4),
        "128x256 s4 of 16 rows": Config(128, 256, BLOCK_T, 8, 4, 16),
        "128x128 s5": Config(128, 128, BLOCK_T, 8, 5),
        "64x256 s3": Config(64, 256, BLOCK_T, 8, 3),
    }
    for config, together in TOGETHER.items():
        others[f"{config.BLOCK_O}x{config.BLOCK_I} s3, {together} at once"] = replace(config, BLOCK_T=BLOCK_T)
    ways: dict[str, Run] = {"table": lambda: [launch.run() for launch in table]}
    for name, config in others.items():
        (launch,) = launches(Operands(x, g, None, out), on, config)
        ways[name] = launch.run
    # What the kernel does where it could do otherwise: sums added in memory, products of their own for short examples.
    (wide,) = launches(Operands(x, g, None, out), on, others["128x256 s4"])
    forms = {"128x256 loaded and stored": {"REDUCE": False}}
    if case.T <= BLOCK_T:
        forms["128x256 carried through the loop"] = {"SINGLE": False}
    for name, constants in forms.items():
        ways[name] = wide._replace(arguments=wide.arguments | constants).run
    return ways


def _specialized(case: Case, x: Tensor, g: Tensor, out: Tensor) -> dict[str, Run]:
    from benchmarks.gpu.specialized import specialized

    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    return {"specialised": specialized(x, g, out, processors)}
