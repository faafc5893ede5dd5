"""How the kernels of weight gradients cut their work: tiles for each architecture, and parts of the examples.

The tiles were chosen by registers, spills and shared memory of offline compilations, which
``tests/kernels/resources.json`` records; they are not measured on a GPU yet. ``python -m benchmarks tune`` does that.

Two float32 tiles, the gradient and the total, live in registers: with tiles of 128 x 256 the threads of 8 warps need
all of their 255, and spill a little after each example, not within one. That holds only where blocks come and go
through TMA, whose addresses cost no registers. The sum of the gradients, if requested, is a third tile: then tiles are
128 x 128, or 128 x 64 for float32 on sm_80, where Triton 3.6 spills accumulators of larger ones. Blocks that are loaded
entry by entry pass through registers, which leaves room for 128 x 64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from typing import Literal

from triton import cdiv

from ._hardware import Hardware
from ._problem import Problem

# Up to this many positions are multiplied without matrix units, which take 16 at a time.
FEW_POSITIONS = 4
# Partial results of a split take at most this many bytes.
WORKSPACE = 64 * 2**20
MOST_PARTS = 64
# Chunks are shortened until at most this share of the multiplied positions is padding; less than the second, where an
# example is one chunk, whose gradient need not be carried through the loop.
MOST_PADDING, MOST_PADDING_OF_ONE = 0.15, 0.5
# Sides up to which one tile reads the other input.
_READ_ONCE = 128
# Problems whose plans are remembered: a model has a few for each kind of layer and length of a batch.
PLANS = 4096


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
        maxnreg: Registers of a thread that the compiler may take, where more programs should run at once.
    """

    BLOCK_O: int
    BLOCK_I: int
    BLOCK_T: int
    num_warps: int
    num_stages: int
    GROUP_O: int = 8
    maxnreg: int | None = None

    @cached_property
    def constants(self) -> dict[str, int]:
        """Constants of the kernel."""
        return {name: value for name, value in asdict(self).items() if name.isupper()}

    @cached_property
    def options(self) -> dict[str, int]:
        """Options of the compiler; whether it fuses by default depends on the version of Triton."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        return options if self.maxnreg is None else options | {"maxnreg": self.maxnreg}


# How blocks are loaded: by TMA, as vectors of 16 bytes, or entry by entry where strides are no multiples of 16 bytes.
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

# Tiles of 16-bit blocks of TMA of which several programs run on a multiprocessor of sm_90, one squaring while another
# multiplies, and how many. They read more for each product: which examples are short enough for that to pay, a device
# must say. So no table names them yet; ``benchmarks`` times them, and their registers and shared memory are tested.
TOGETHER = {Config(128, 128, 64, 8, 3, maxnreg=128): 2, Config(64, 128, 64, 4, 3): 3}

# Columns of the widest tile of which three fit the registers, where that is not 128: by family and bytes of an entry.
WIDEST_WITH_MEAN = {("sm_80", 4): 64}

# Chunks in flight where a program sums rows and has no registers for as many as in the table, by family, bytes of an
# entry, loads and columns of a tile: with three, Triton 3.7 spills an accumulator in the loop.
STAGES_BY_ROW: dict[tuple[str, int, Loads, int], int] = {("sm_90", 4, "vectors", 16): 2}

FEW = {"interpreter": Config(32, 64, 1, 4, 1, 2)}
FEW_ELSEWHERE = Config(32, 128, 1, 4, 1)  # 32 entries of the result for each thread
SUM_PARTS = Config(16, 128, 1, 4, 1, 1)


@cache
def adds_in_memory(hardware: Hardware) -> bool:
    """Tell whether TMA can add a tile to a result, which Triton's interpreter lacks.

    Args:
        hardware: Where it will run.

    Returns:
        Whether it can.
    """
    return takes_tma(hardware) and hardware.family != "interpreter"


@cache
def takes_tma(hardware: Hardware) -> bool:
    """Tell whether there are tables for blocks that TMA loads.

    Args:
        hardware: Where it will run.

    Returns:
        Whether there are.
    """
    return any(loads == "tma" for _, loads in TABLES[hardware.family])


def loads(problem: Problem, hardware: Hardware) -> Loads:
    """Tell how the inputs can be loaded.

    Args:
        problem: The call.
        hardware: Where it will run.

    Returns:
        The fastest way that both inputs allow.
    """
    if takes_tma(hardware) and problem.x.fits_tma and problem.g.fits_tma:
        return "tma"
    return "vectors" if problem.x.has_vectors and problem.g.has_vectors else "elements"


def worth_a_copy(problem: Problem, hardware: Hardware) -> bool:
    """Tell whether inputs of odd strides are copied into rows of whole 16 bytes before they are multiplied.

    What is loaded entry by entry is not loaded in the background. A copy is one more read and write of an input, which
    is little where several tiles read it.

    Args:
        problem: The call.
        hardware: Where it will run.

    Returns:
        Whether they are.
    """
    odd = loads(problem, hardware) == "elements" and not few_positions(problem)
    return odd and min(problem.O, problem.I) > _READ_ONCE


def by_row(config: Config, problem: Problem, hardware: Hardware) -> Config:
    """Adapt tiles to a program that sums each over its columns, one sum for each row.

    Args:
        config: The tiles.
        problem: The call.
        hardware: Where it will run.

    Returns:
        The same tiles, with fewer chunks in flight where registers are short.
    """
    case = (hardware.family, problem.itemsize, loads(problem, hardware), config.BLOCK_I)
    return replace(config, num_stages=min(config.num_stages, STAGES_BY_ROW.get(case, config.num_stages)))


def few_positions(problem: Problem) -> bool:
    """Tell whether matrix units would be fed zeros.

    Args:
        problem: The call.

    Returns:
        Whether the examples are too short for them; never for sums over groups, whose time is that of squaring.
    """
    return bool(problem.results) and not problem.packed and problem.T <= FEW_POSITIONS


def tiles(problem: Problem, hardware: Hardware) -> tuple[Config, int]:
    """Choose the tiles and the split, from shapes and the device alone, so that equal calls give equal bits.

    Args:
        problem: The call, whose ``I`` is the smaller side where one is small.
        hardware: Where it will run.

    Returns:
        The tiles, and the number of parts.
    """
    if few_positions(problem):
        choices = iter([FEW.get(hardware.family, FEW_ELSEWHERE)])
    else:
        choices = _from_table(problem, hardware)
    cuts = [(config, *_split(problem, hardware, config)) for config in choices]
    config, parts, _ = min(cuts, key=lambda cut: cut[2])  # of equal costs the widest
    return config, parts


def _from_table(problem: Problem, hardware: Hardware) -> Iterator[Config]:
    """Give the tiles of each width that fits the result and the registers, the widest first, mostly one."""
    table = TABLES[hardware.family][problem.itemsize, loads(problem, hardware)]
    widths = sorted({config.BLOCK_I for config in table})
    # Tiles wider than 128 fit the registers only where results are written by TMA or summed over rows or columns.
    if problem.mean or not all(result.fits_tma for result in problem.results):
        widths = [width for width in widths if width <= 128]
    if problem.mean:
        widths = [width for width in widths if width <= widest_with_mean(hardware, problem.itemsize)]
    widest = next((width for width in widths if width >= problem.I), widths[-1])
    for width in (widest, 128) if widest > 128 else (widest,):
        steps = [config for config in table if width == config.BLOCK_I]
        yield next((config for config in steps if _fits(problem, config.BLOCK_T)), steps[-1])


def _fits(problem: Problem, block: int) -> bool:
    """Tell whether a chunk is short enough for the examples."""
    padding = _padding(problem, block)
    return padding <= MOST_PADDING or (problem.is_single(block) and padding < MOST_PADDING_OF_ONE)


def widest_with_mean(hardware: Hardware, itemsize: int) -> int:
    """Say how wide tiles may be where the sum of the gradients is requested.

    Args:
        hardware: Where it will run.
        itemsize: Bytes of an input's entry.

    Returns:
        Columns of a tile.
    """
    return WIDEST_WITH_MEAN.get((hardware.family, itemsize), 128)


def _padding(problem: Problem, block: int) -> float:
    """Estimate the share of padding in the multiplied positions; packed examples end anywhere in their last chunk."""
    length = problem.positions / problem.N
    padded = length + block / 2 if problem.packed else cdiv(problem.T, block) * block
    return 1 - length / padded


def _split(problem: Problem, hardware: Hardware, config: Config) -> tuple[int, int]:
    """Choose into how many parts the examples are split, and say what that costs."""
    # Where tiles are few, parts let more programs run at once, at the price of partial results. Programs run in waves,
    # of which the last takes as long as a full one. One example on one tile costs what it reads, the rows and columns
    # of the tile, since large ones wait for the L2 cache; writing a partial tile and reading it again costs as much,
    # and the partial sums of groups nothing. No example is split.
    N, O, I = problem.N, problem.O, problem.I
    num_tiles = cdiv(O, config.BLOCK_O) * cdiv(I, config.BLOCK_I)
    slots = hardware.processors * (8 // config.num_warps)

    def cost(parts: int) -> int:
        waves = cdiv(num_tiles * parts, slots)
        return (config.BLOCK_O + config.BLOCK_I) * waves * (cdiv(N, parts) + (bool(problem.results) and parts > 1))

    most = min(N, MOST_PARTS, WORKSPACE // (4 * O * I) if problem.results else MOST_PARTS)
    parts = min(range(1, max(most, 1) + 1), key=cost)
    return parts, cost(parts)


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
