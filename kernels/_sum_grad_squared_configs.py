"""How :mod:`fishkern.kernels.sum_grad_squared` cuts its work: tiles for each architecture, and parts of the examples.

The tiles were chosen by registers, spills and shared memory of offline compilations, which
``tests/kernels/resources.json`` holds; they are not measured on a GPU yet. ``python -m benchmarks tune`` measures them
and writes what it finds.

Two float32 tiles, the gradient and the total, live in registers: 128 x 256 of them take all 255 of 8 warps, and spill
a little after each example, not within one. That is only so where blocks come and go through TMA, whose addresses cost
no registers. The mean gradient is a third tile, so that it takes 128 x 128, or 128 x 64 for float32 on sm_80, where
Triton 3.6 spills accumulators of more. Blocks that are loaded entry by entry pass through registers, which leaves room
for 128 x 64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from typing import Literal

from ._hardware import Hardware

# So many positions are multiplied without matrix units, which take 16 at a time.
FEW_POSITIONS = 4
# Partial results of a split take at most so many bytes.
WORKSPACE = 64 * 2**20
MOST_PARTS = 64


@dataclass(frozen=True)
class Config:
    """One way to cut the work.

    Args:
        BLOCK_O: Rows of a tile of the result.
        BLOCK_I: Columns of it.
        BLOCK_T: Positions in a chunk.
        num_warps: Warps that share a tile.
        num_stages: Chunks in flight.
        GROUP_O: Rows of tiles that neighbouring programs share.
    """

    BLOCK_O: int
    BLOCK_I: int
    BLOCK_T: int
    num_warps: int
    num_stages: int
    GROUP_O: int = 8

    @cached_property
    def constants(self) -> dict[str, int]:
        """What the kernel is compiled with."""
        return {name: value for name, value in asdict(self).items() if name.isupper()}

    @cached_property
    def options(self) -> dict[str, int]:
        """What the compiler is told; whether it fuses by default depends on the version of Triton."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


# How blocks are loaded: by the copy engine, as vectors of 16 bytes, or entry by entry where pitches are odd.
Loads = Literal["tma", "vectors", "elements"]

# (bytes of an input's entry, how it is loaded) -> tiles, from the widest and longest on.
TABLES: dict[str, dict[tuple[int, Loads], tuple[Config, ...]]] = {
    "sm_90": {
        (2, "tma"): (
            Config(128, 256, 64, 8, 4), Config(128, 256, 32, 8, 6), Config(128, 256, 16, 8, 6),
            Config(128, 128, 64, 8, 5), Config(128, 128, 32, 8, 6), Config(128, 128, 16, 8, 6),
            Config(128, 64, 64, 4, 4), Config(128, 64, 16, 4, 4),
            Config(128, 32, 64, 4, 4), Config(128, 32, 16, 4, 4),
            Config(128, 16, 64, 4, 4), Config(128, 16, 16, 4, 4),
        ),
        (2, "vectors"): (
            Config(128, 128, 64, 8, 4), Config(128, 128, 32, 8, 4), Config(128, 128, 16, 8, 4),
            Config(128, 64, 64, 8, 4), Config(128, 64, 16, 8, 4),
            Config(128, 16, 64, 4, 4), Config(128, 16, 16, 4, 4),
        ),
        (2, "elements"): (
            Config(128, 64, 64, 8, 3), Config(128, 64, 16, 8, 3),
            Config(128, 16, 64, 8, 3), Config(128, 16, 16, 4, 3),
        ),
        (4, "tma"): (
            Config(128, 128, 32, 8, 3), Config(128, 128, 16, 8, 4),
            Config(128, 64, 32, 8, 3), Config(128, 64, 16, 8, 4),
            Config(128, 16, 32, 4, 3), Config(128, 16, 16, 4, 4),
        ),
        (4, "vectors"): (
            Config(128, 64, 32, 8, 3), Config(128, 64, 16, 8, 4),
            Config(128, 16, 32, 4, 3), Config(128, 16, 16, 4, 4),
        ),
        (4, "elements"): (
            Config(128, 64, 32, 8, 3), Config(128, 64, 16, 8, 3),
            Config(128, 16, 32, 4, 3), Config(128, 16, 16, 4, 3),
        ),
    },
    "sm_80": {
        (2, "vectors"): (
            Config(128, 128, 32, 8, 4), Config(128, 128, 16, 8, 4),
            Config(128, 64, 32, 8, 4), Config(128, 64, 16, 8, 4),
            Config(128, 16, 64, 4, 4), Config(128, 16, 16, 4, 4),
        ),
        (2, "elements"): (
            Config(128, 64, 32, 8, 3), Config(128, 64, 16, 8, 3),
            Config(128, 16, 32, 4, 3), Config(128, 16, 16, 4, 3),
        ),
        (4, "vectors"): (
            Config(128, 128, 16, 8, 3),
            Config(128, 64, 16, 8, 3),
            Config(128, 16, 32, 4, 3), Config(128, 16, 16, 4, 3),
        ),
        (4, "elements"): (
            Config(128, 64, 16, 8, 3),
            Config(128, 16, 32, 4, 3), Config(128, 16, 16, 4, 3),
        ),
    },
    "gfx942": {
        (2, "vectors"): (
            Config(128, 128, 64, 4, 2), Config(128, 128, 32, 4, 2), Config(128, 128, 16, 4, 2),
            Config(128, 64, 64, 4, 2), Config(128, 64, 16, 4, 2),
            Config(128, 16, 64, 4, 2), Config(128, 16, 16, 4, 2),
        ),
        (2, "elements"): (
            Config(128, 64, 32, 4, 2), Config(128, 64, 16, 4, 2),
            Config(128, 16, 32, 4, 2), Config(128, 16, 16, 4, 2),
        ),
        (4, "vectors"): (
            Config(128, 128, 32, 4, 2), Config(128, 128, 16, 4, 2),
            Config(128, 64, 32, 4, 2), Config(128, 64, 16, 4, 2),
            Config(128, 16, 32, 4, 2), Config(128, 16, 16, 4, 2),
        ),
        (4, "elements"): (
            Config(128, 64, 32, 4, 2), Config(128, 64, 16, 4, 2),
            Config(128, 16, 32, 4, 2), Config(128, 16, 16, 4, 2),
        ),
    },
    # Small, so that small tensors have several tiles, and uneven, so that rows and columns cannot be confused.
    "interpreter": {
        (size, loads): (Config(32, 64, 32, 4, 1, 2), Config(32, 64, 16, 4, 1, 2), Config(32, 16, 16, 4, 1, 2))
        for size in (2, 4)
        for loads in ("tma", "vectors", "elements")
    },
}  # fmt: skip

# Columns of the widest tiles that three of fit the registers, where it is not 128: by family and bytes of an entry.
WIDEST_WITH_MEAN = {("sm_80", 4): 64}

FEW = {"interpreter": Config(32, 64, 1, 4, 1, 2)}
FEW_ELSEWHERE = Config(32, 128, 1, 4, 1)  # 32 entries of the result for each thread
SUM_PARTS = Config(16, 128, 1, 4, 1, 1)


@cache
def takes_tma(hardware: Hardware) -> bool:
    """Tell whether there are tables for blocks that the copy engine brings.

    Args:
        hardware: Where it will run.

    Returns:
        Whether there are.
    """
    return any(loads == "tma" for _, loads in TABLES[hardware.family])


def choose(
    hardware: Hardware,
    O: int,
    I: int,
    N: int,
    positions: int,
    dense: bool,
    itemsize: int,
    loads: Loads,
    wide: bool,
    mean: bool,
) -> tuple[Config, int]:
    """Choose the tiles and the split, from shapes and the device alone, so that equal calls give equal bits.

    Args:
        hardware: Where it will run.
        O: Rows of the result.
        I: Columns of it, the smaller side where one is small.
        N: Number of examples.
        positions: All their positions together.
        dense: Whether all examples are equally long.
        itemsize: Bytes of an input's entry.
        loads: How the inputs are loaded.
        wide: Whether there are registers for tiles wider than 128.
        mean: Whether the mean gradient is asked for.

    Returns:
        The tiles, and the number of parts.
    """
    length = positions / N
    if dense and length <= FEW_POSITIONS:
        config = FEW.get(hardware.family, FEW_ELSEWHERE)
    else:
        table = TABLES[hardware.family][itemsize, loads]
        widths = sorted({config.BLOCK_I for config in table})
        tiles = -(-O // 128) * -(-I // 256)
        if widths[-1] > 128 and (not wide or tiles < 2 * hardware.processors):  # too few to go round twice
            widths.pop()
        if mean:
            widths = [width for width in widths if width <= widest_with_mean(hardware, itemsize)]
        width = next((width for width in widths if width >= I), widths[-1])
        steps = [config for config in table if width == config.BLOCK_I]
        config = next((config for config in steps if _padding(length, config.BLOCK_T, dense) <= 0.15), steps[-1])
    return config, _parts(hardware, config, O, I, N)


def widest_with_mean(hardware: Hardware, itemsize: int) -> int:
    """Say how wide tiles may be where the mean gradient is asked for.

    Args:
        hardware: Where it will run.
        itemsize: Bytes of an input's entry.

    Returns:
        Columns of a tile.
    """
    return WIDEST_WITH_MEAN.get((hardware.family, itemsize), 128)


def _padding(length: float, block: int, dense: bool) -> float:
    """Which share of the multiplied positions is padding; packed examples end anywhere in their last chunk."""
    padded = -(-length // block) * block if dense else length + block / 2
    return 1 - length / padded


def _parts(hardware: Hardware, config: Config, O: int, I: int, N: int) -> int:
    # Where tiles are few, more programs run at once, at the price of partial results. One example on one tile counts 1,
    # and so does a partial tile, written and read again. No example is split.
    tiles = -(-O // config.BLOCK_O) * -(-I // config.BLOCK_I)
    slots = hardware.processors * (8 // config.num_warps)

    def cost(parts: int) -> int:
        return -(-tiles * parts // slots) * (-(-N // parts) + (parts > 1))

    most = min(N, MOST_PARTS, WORKSPACE // (4 * O * I))
    return min(range(1, max(most, 1) + 1), key=lambda parts: (cost(parts), parts))


def configs(hardware: Hardware) -> Iterator[tuple[int, Loads, Config]]:
    """List the tables of one architecture, for tests and tuning.

    Args:
        hardware: Which.

    Yields:
        Bytes of an entry, how it is loaded, and the tiles.
    """
    for (itemsize, loads), table in TABLES[hardware.family].items():
        for config in table:
            yield itemsize, loads, config
