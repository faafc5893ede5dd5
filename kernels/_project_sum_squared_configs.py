"""How the kernel of projections cuts its work: tiles for each architecture, and chunks of the examples.

The tiles were chosen by registers, spills and shared memory of offline compilations, which
``tests/kernels/resources.json`` records; they are not measured on a GPU yet.

Two float32 tiles, the projections of both factors, live in registers, which holds 128 x 128 of each with 8 warps. In
what is multiplied as float32, without matrix units, TMA would make Triton spill them in the loop over features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from triton import cdiv, next_power_of_2

from ._hardware import Hardware
from ._problem import Layout
from ._sum_grad_squared_configs import Loads

# What is multiplied: 16-bit numbers, or float32 by matrix units or without them.
Multiplies = Literal["16 bits", "tf32", "float32"]

# A chunk's line of sums costs about as much as so many positions, and what a program does besides multiplying, most of
# it loads of positions, about as much as so many directions.
LINE, AROUND = 2, 64
# Shorter chunks than this only for shorter examples: lines of sums would be as large as what is projected.
SHORTEST = 8
# Loads of single vectors take about so much longer than those by TMA.
VECTORS = 1.15


@dataclass(frozen=True)
class Config:
    """One way to cut the work.

    Args:
        ROWS: Positions of a tile, those of several chunks side by side.
        BLOCK_K: Directions of it.
        BLOCK_F: Features that are multiplied at a time.
        num_warps: Warps that share a tile.
        num_stages: Blocks of features in flight.
        GROUP: Tiles of positions that neighbouring programs share.
    """

    ROWS: int
    BLOCK_K: int
    BLOCK_F: int
    num_warps: int
    num_stages: int
    GROUP: int = 8

    @cached_property
    def constants(self) -> dict[str, int]:
        """Constants of the kernel."""
        return {name: value for name, value in asdict(self).items() if name.isupper() and name != "ROWS"}

    @cached_property
    def options(self) -> dict[str, int]:
        """Options of the compiler; whether it fuses by default depends on the version of Triton."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


# (what is multiplied, how it is loaded) -> tiles, from the widest on.
TABLES: dict[str, dict[tuple[Multiplies, Loads], tuple[Config, ...]]] = {
    "sm_90": {
        ("16 bits", "tma"): (Config(128, 128, 64, 8, 6), Config(128, 64, 64, 8, 6), Config(128, 16, 64, 4, 6)),
        ("16 bits", "vectors"): (Config(128, 128, 64, 8, 4), Config(128, 64, 64, 8, 4), Config(128, 16, 64, 4, 4)),
        ("16 bits", "elements"): (Config(128, 64, 64, 8, 3), Config(128, 16, 64, 8, 3)),
        ("tf32", "tma"): (Config(128, 128, 32, 8, 4), Config(128, 64, 32, 8, 4), Config(128, 16, 32, 4, 4)),
        ("tf32", "vectors"): (Config(128, 128, 32, 8, 3), Config(128, 64, 32, 8, 3), Config(128, 16, 32, 4, 3)),
        ("tf32", "elements"): (Config(128, 64, 32, 8, 3), Config(128, 16, 32, 8, 3)),
        ("float32", "vectors"): (Config(128, 128, 16, 8, 4), Config(128, 64, 32, 8, 3), Config(128, 16, 32, 4, 3)),
        ("float32", "elements"): (Config(128, 64, 16, 8, 3), Config(128, 16, 32, 8, 3)),
    },
    "sm_80": {
        ("16 bits", "vectors"): (Config(128, 128, 32, 8, 4), Config(128, 64, 32, 8, 4), Config(128, 16, 64, 4, 4)),
        ("16 bits", "elements"): (Config(128, 64, 32, 8, 3), Config(128, 16, 32, 4, 3)),
        ("tf32", "vectors"): (Config(128, 128, 16, 8, 3), Config(128, 64, 16, 8, 3), Config(128, 16, 32, 4, 3)),
        ("tf32", "elements"): (Config(128, 64, 16, 8, 3), Config(128, 16, 16, 4, 3)),
        ("float32", "vectors"): (Config(128, 128, 16, 8, 3), Config(128, 64, 16, 8, 3), Config(128, 16, 32, 4, 3)),
        ("float32", "elements"): (Config(128, 64, 16, 8, 3), Config(128, 16, 16, 4, 3)),
    },
    "gfx942": {
        ("16 bits", "vectors"): (Config(128, 128, 64, 4, 2), Config(128, 64, 64, 4, 2), Config(128, 16, 64, 4, 2)),
        ("16 bits", "elements"): (Config(128, 64, 32, 4, 2), Config(128, 16, 32, 4, 2)),
        ("float32", "vectors"): (Config(128, 128, 32, 4, 2), Config(128, 64, 32, 4, 2), Config(128, 16, 32, 4, 2)),
        ("float32", "elements"): (Config(128, 64, 32, 4, 2), Config(128, 16, 32, 4, 2)),
    },
    # Small, so that small tensors have several tiles, and uneven, so that their sides cannot be confused.
    "interpreter": {
        (multiplies, loads): (Config(32, 64, 16, 4, 1, 2), Config(32, 16, 16, 4, 1, 2))
        for multiplies in ("16 bits", "tf32", "float32")
        for loads in ("tma", "vectors", "elements")
        if (multiplies, loads) != ("float32", "tma")
    },
}  # fmt: skip


class Problem(NamedTuple):
    """Everything about one call that the choice of code depends on: plans are cached by it.

    Args:
        x: Activations, ``[N, T, I]``.
        g: Output gradients, ``[N, T, O]``.
        v: Directions of the inputs, ``[pieces, I, K]``.
        u: Directions of the outputs, ``[pieces, O, K]``.
        counted: ``[N, T]``, or ``None``.
        of_factors: Dtype of the activations and output gradients.
        of_directions: Dtype of the directions: the same, or float32.
        allow_tf32: Whether float32 may be rounded to tf32.
    """

    x: Layout
    g: Layout
    v: Layout
    u: Layout
    counted: Layout | None
    of_factors: torch.dtype
    of_directions: torch.dtype
    allow_tf32: bool

    @property
    def N(self) -> int:
        """Examples."""
        return self.x.shape[0]

    @property
    def T(self) -> int:
        """Positions of each example."""
        return self.x.shape[1]

    @property
    def K(self) -> int:
        """Directions."""
        return self.v.shape[-1]

    def flat(self) -> Problem | None:
        """Join the positions of all examples to one long example; ``None`` where they do not follow each other."""
        joined = []
        for layout in (self.x, self.g):
            (N, T, F), (stride_n, stride_t, stride_f) = layout.shape, layout.strides
            if N > 1 and T > 1 and stride_n != T * stride_t:
                return None
            stride_t = stride_n if T == 1 else stride_t
            joined.append(layout._replace(shape=(1, N * T, F), strides=(0, stride_t, stride_f)))
        return self._replace(x=joined[0], g=joined[1])

    @property
    def fits_tma(self) -> bool:
        """Whether TMA can load all that is multiplied, directions as they are or transposed."""
        sides = self.x.shape[-1], self.g.shape[-1]
        factors = 0 not in sides and self.x.fits_tma and self.g.fits_tma
        return factors and all(layout.fits_tma or transposed(layout).fits_tma for layout in (self.v, self.u))


def transposed(directions: Layout) -> Layout:
    """Exchange features and directions.

    Args:
        directions: ``[pieces, F, K]``.

    Returns:
        ``[pieces, K, F]``.
    """
    (pieces, F, K), (stride_p, stride_f, stride_k) = directions.shape, directions.strides
    return directions._replace(shape=(pieces, K, F), strides=(stride_p, stride_k, stride_f))


class Cut(NamedTuple):
    """How one problem is cut.

    Args:
        loads: How blocks are loaded.
        BLOCK_T: Positions of a chunk, so that one or more of them are the rows of a tile.
        config: The tiles.
    """

    loads: Loads
    BLOCK_T: int
    config: Config


def multiplies(problem: Problem, on: Hardware) -> Multiplies:
    """Tell what is multiplied.

    Args:
        problem: The call.
        on: Where it will run; AMD's matrix units multiply float32 as it is.

    Returns:
        The numbers of the wider side.
    """
    if problem.of_directions is not torch.float32:
        return "16 bits"
    return "tf32" if problem.allow_tf32 and ("tf32", "vectors") in TABLES[on.family] else "float32"


def cut(problem: Problem, on: Hardware) -> Cut:
    """Choose the code, from shapes and the device alone, so that equal calls give equal bits.

    Args:
        problem: The call.
        on: Where it will run.

    Returns:
        The way of loading and the chunks that leave least to multiply, and tiles for them.
    """
    kind, rows, flat = multiplies(problem, on), _rows(on), problem.flat()
    vectors = all(layout.has_vectors for layout in (problem.x, problem.g, problem.v, problem.u))
    single: Loads = "vectors" if vectors else "elements"

    def takes_tma(length: int) -> bool:
        if (kind, "tma") not in TABLES[on.family]:
            return False
        if length == rows:  # a tile is one chunk, which TMA ends where the example does
            return problem.fits_tma
        return problem.T % length == 0 and flat is not None and flat.fits_tma

    def cost(way: tuple[int, Loads]) -> float:
        length, loads = way
        return cdiv(problem.T, length) * (length + LINE) * (1.0 if loads == "tma" else VECTORS)

    lengths = sorted(_lengths(problem.T, rows), reverse=True)  # the longest first, which is taken among equals
    ways = [(length, "tma" if takes_tma(length) else single) for length in lengths]
    BLOCK_T, loads = min(ways, key=cost)
    num_tiles = cdiv(problem.N * cdiv(problem.T, BLOCK_T), rows // BLOCK_T)
    return Cut(loads, BLOCK_T, _width(TABLES[on.family][kind, loads], num_tiles, problem.K, on))


def _rows(on: Hardware) -> int:
    (rows,) = {config.ROWS for table in TABLES[on.family].values() for config in table}
    return rows


def _lengths(T: int, rows: int) -> Iterator[int]:
    """Lengths of chunks, powers of two that divide a tile, up to the first that holds an example."""
    length = min(SHORTEST, next_power_of_2(T), rows)
    yield length
    while length < min(T, rows):
        length *= 2
        yield length


def _width(table: tuple[Config, ...], num_tiles: int, K: int, on: Hardware) -> Config:
    """Choose how many directions a program takes: of few programs, many processors would wait."""
    enough = next((number for number in reversed(range(len(table))) if table[number].BLOCK_K >= K), 0)

    def cost(config: Config) -> int:
        return cdiv(num_tiles * cdiv(K, config.BLOCK_K), on.processors) * (config.BLOCK_K + AROUND)

    return min(table[enough:], key=cost)  # of equal ones the widest


def configs(on: Hardware) -> Iterator[tuple[Multiplies, Loads, Config]]:
    """List the tables of one architecture, for tests and tuning.

    Args:
        on: Which.

    Yields:
        What is multiplied, how it is loaded, and the tiles.
    """
    for (kind, loads), table in TABLES[on.family].items():
        for config in table:
            yield kind, loads, config
