"""``python -m benchmarks tune``: times tiles of ``sum_grad_squared`` on a device and writes the table of the fastest.

The kernel's own table is not touched: a person reads the result and copies what is faster. Nothing is tuned
at run time: equal calls give equal bits.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.engine.origin import gpu_state, origin
from benchmarks.gpu.device_tests import on_device
from benchmarks.gpu.timing import time_providers

# Positions of an example, of which there are 4096 together, and widths [O, I]: many tiles, and about a wave of them.
LENGTHS = (16, 128, 512)
WIDTHS = ((11008, 4096), (2048, 2048))
TOKENS = 4096
TESTS_END = 400.0  # seconds
DTYPE = torch.bfloat16
BLOCKS = {
    "BLOCK_O": (64, 128),
    "BLOCK_I": (128, 256),
    "BLOCK_T": (16, 32, 64),
    "num_warps": (4, 8),
    "num_stages": (3, 4, 5, 6),
    "maxnreg": (None, 128),  # two programs of 8 warps at once, where their tiles leave the registers
}
# Two float32 tiles in registers, of which a thread has 255; and the tiles of all chunks in flight in shared memory.
ENTRIES_PER_THREAD = 128


def candidates(I: int, T: int, itemsize: int, shared: int) -> Iterator:
    """List tiles that may fit.

    Args:
        I: Columns of the result.
        T: Positions of an example.
        itemsize: Bytes of an input's entry.
        shared: Bytes of shared memory.

    Yields:
        Tiles.
    """
    from fishkern.kernels._sum_grad_squared_configs import Config

    for values in product(*BLOCKS.values()):
        config = Config(**dict(zip(BLOCKS, values, strict=True)))
        staged = (config.BLOCK_O + config.BLOCK_I) * config.BLOCK_T * itemsize * config.num_stages
        entries = config.BLOCK_O * config.BLOCK_I // (32 * config.num_warps)
        padded = max(16, I) < config.BLOCK_I or max(16, T) < config.BLOCK_T
        # Two tiles of so many registers leave 64 for all else.
        crowded = config.maxnreg is not None and (config.num_warps < 8 or entries > config.maxnreg // 2)
        if entries <= ENTRIES_PER_THREAD and staged <= shared and not padded and not crowded:
            yield config


def tune(results: Path, revision: str | None) -> int:
    """Time the candidates on every shape, and write a table.

    Args:
        results: Folder of all machines' records.
        revision: Name of the sources, where there is no git.

    Returns:
        Exit status.
    """
    from fishkern.kernels._hardware import hardware

    device = torch.device("cuda", torch.cuda.current_device())
    tests = ["tests/ops/test_sum_grad_squared.py", "tests/kernels/test_sum_grad_squared.py"]
    if on_device(tests, TESTS_END)["red"]:
        print("Nothing is tuned: tests fail on this device.")
        return 1
    on = hardware(device)
    where = {**origin(revision), **gpu_state()}
    path = results / where["machine"] / f"tuned-sum_grad_squared-{datetime.now(UTC):%Y%m%dT%H%M%SZ}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for (O, I), T in product(WIDTHS, LENGTHS):
        configs = list(candidates(I, T, DTYPE.itemsize, on.shared))
        compile_beside_each_other(configs, O, I, T, device)
        x, g = (torch.randn(TOKENS // T, T, width, device=device).to(DTYPE) for width in (I, O))
        times = time_configs(x, g, configs, device)
        best = min(times, key=lambda row: row["ms"])
        print(f"{O} x {I}, T = {T}: {best}")
        rows.append({"dtype": str(DTYPE), "O": O, "I": I, "N": len(x), "T": T, "best": best, "all": times})
        path.write_text(json.dumps({"family": on.family, **where, "rows": rows}, indent=1) + "\n")
    print(f"Written: {path}")
    return 0


def compile_beside_each_other(configs: list, O: int, I: int, T: int, device: torch.device) -> None:
    """Compile tiles in as many processes as there are processors, into the cache that they share.

    Args:
        configs: Tiles.
        O: Rows of the result.
        I: Columns of it.
        T: Positions of an example.
        device: Where they will run.
    """
    workers = os.cpu_count() or 1
    shares = [configs[first::workers] for first in range(workers)]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_configs, shares, *([value] * workers for value in (O, I, T, device))))


def compile_configs(configs: list, O: int, I: int, T: int, device: torch.device) -> None:
    """Compile tiles, one after the other; what does not compile says so when it is timed.

    Args:
        configs: Tiles.
        O: Rows of the result.
        I: Columns of it.
        T: Positions of an example.
        device: Where they will run.
    """
    from fishkern.kernels._hardware import hardware
    from fishkern.kernels.sum_grad_squared import Operands, launches

    x, g = (torch.empty(TOKENS // T, T, width, device=device, dtype=DTYPE) for width in (I, O))
    out = torch.empty(O, I, device=device)
    for config in configs:
        (launch,) = launches(Operands(x, g, None, out), hardware(device), config)
        with suppress(Exception):
            launch.kernel.warmup(**launch.arguments, **launch.options, grid=launch.grid)


def time_configs(x: Tensor, g: Tensor, configs: list, device: torch.device) -> list[dict]:
    """Time tiles in turns; those that do not fit the device are left out.

    Args:
        x: Activations.
        g: Output gradients.
        configs: Tiles.
        device: Where.

    Returns:
        A row for each, with its time in milliseconds.
    """
    from fishkern.kernels._hardware import hardware
    from fishkern.kernels.sum_grad_squared import Operands, launches

    out = torch.zeros(g.shape[-1], x.shape[-1], device=device)
    runs = {
        str(number): launches(Operands(x, g, None, out), hardware(device), config)[0].run
        for number, config in enumerate(configs)
    }
    figures = time_providers(runs, ours="", device=device)
    return [
        {**asdict(config), "ms": figures[str(number)]["ms"]["median"]}
        for number, config in enumerate(configs)
        if "ms" in figures[str(number)]
    ]
