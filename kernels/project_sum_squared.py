"""Launcher of the Triton kernel of :func:`fishkern.ops.project_sum_squared`.

One program projects some positions on some directions and writes sums
(:mod:`fishkern.kernels._project_sum_squared_device`); a second kernel adds them up in their order. Short examples lie
side by side in one program, since matrix units take 64 positions at least. How a call is cut depends on its shapes and
the device alone.

Where factors and directions are not of one dtype, the directions are prepared, so many at a time as there is room for:
for bfloat16 factors they are written as a sum of bfloat16 numbers, which matrix units multiply exactly; for others they
are converted to float32. Matrix units of tf32 take directions whose features have no gaps.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import cdiv

from . import _project_sum_squared_device as device
from ._hardware import Hardware, hardware
from ._launch import Launch
from ._problem import VECTOR, Block, Layout
from ._project_sum_squared_configs import Config, Cut, Problem, cut, multiplies, transposed
from ._sum_grad_squared_configs import PLANS

# Prepared directions of both sides take about so many bytes at most.
_PREPARED = 2**28
# Of so many directions a program takes no part.
_WIDEST = 128
# bfloat16 numbers whose sum is one of another dtype, each with 8 bits of the mantissa; of tf32's 11 bits.
_PIECES = {torch.float32: 3, torch.float16: 2}
_PIECES_OF_TF32 = 2
# Lines and directions that one program adds up at a time.
_LINES, _DIRECTIONS = 32, 32
_SUM_OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}


def project_sum_squared(
    activations: Tensor,
    output_grads: Tensor,
    V: Tensor,
    U: Tensor,
    *,
    counted: Tensor | None = None,
    allow_tf32: bool = False,
) -> Tensor:
    """Launch the kernels; arguments as in :func:`fishkern.ops.project_sum_squared`, already checked."""
    N, T, _ = activations.shape
    if 2 * N * T >= 2**31:  # chunks have up to as much padding again
        raise ValueError(f"the kernel takes up to 2**30 - 1 positions, got {N * T}: split the call.")
    out = torch.empty(3, V.shape[1], dtype=torch.float32, device=activations.device)
    if N * T == 0 or out.numel() == 0:
        return out.zero_()
    with torch.cuda.device_of(activations):  # Triton launches on the current device
        on = hardware(activations.device)
        for operands in prepared(activations, output_grads, V, U, counted, out, allow_tf32=allow_tf32, on=on):
            for launch in launches(operands, on):
                launch.run()
    return out


class Operands(NamedTuple):
    """The tensors of one launch.

    Args:
        x: Activations, ``[N, T, I]``, of one position at least.
        g: Output gradients, ``[N, T, O]``.
        v: Directions of the inputs, ``[pieces, I, K]``.
        u: Directions of the outputs, ``[pieces, O, K]``.
        counted: As in the operation.
        out: The result, ``[3, K]``, rows without gaps.
        allow_tf32: As in the operation.
    """

    x: Tensor
    g: Tensor
    v: Tensor
    u: Tensor
    counted: Tensor | None
    out: Tensor
    allow_tf32: bool = False

    @property
    def problem(self) -> Problem:
        """Everything that the choice of code depends on."""
        layouts = [Layout.of(tensor) for tensor in (self.x, self.g, self.v, self.u)]
        counted = None if self.counted is None else Layout.of(self.counted)
        return Problem(*layouts, counted, self.x.dtype, self.v.dtype, self.allow_tf32)


def prepared(
    activations: Tensor,
    output_grads: Tensor,
    V: Tensor,
    U: Tensor,
    counted: Tensor | None,
    out: Tensor,
    *,
    allow_tf32: bool,
    on: Hardware,
) -> Iterator[Operands]:
    """Bring the directions into a dtype and an order that the kernel multiplies fast.

    Args:
        activations: As in the operation.
        output_grads: As in the operation.
        V: As in the operation.
        U: As in the operation.
        counted: As in the operation.
        out: The result, ``[3, K]``.
        allow_tf32: As in the operation.
        on: The device to prepare for.

    Yields:
        The operands of each launch: as they are, or for some of the directions, one set after the other.
    """
    whole = Operands(activations, output_grads, V[None], U[None], counted, out, allow_tf32)
    dtype, pieces = activations.dtype, 1
    if dtype is torch.bfloat16 and V.dtype is not dtype:
        pieces = _PIECES_OF_TF32 if allow_tf32 else _PIECES[V.dtype]
    elif V.dtype is not dtype:
        dtype = torch.float32
    columns = multiplies(whole.problem._replace(of_directions=dtype), on) == "tf32"
    if V.dtype is dtype and not columns:
        yield whole
        return
    bytes_of_one = pieces * (len(V) + len(U)) * dtype.itemsize
    width = max(1, _PREPARED // (bytes_of_one * _WIDEST or 1)) * _WIDEST
    for v, u, part in zip(V.split(width, 1), U.split(width, 1), out.split(width, 1), strict=True):
        v, u = (_pieces(basis, pieces, dtype, columns=columns) for basis in (v, u))
        yield whole._replace(v=v, u=u, out=part)


@torch.no_grad()
def _pieces(directions: Tensor, count: int, dtype: torch.dtype, *, columns: bool) -> Tensor:
    """Write ``[F, K]`` as a sum of ``[count, F, K]``, the largest first; without gaps in its columns, or its rows."""
    # Of whole vectors, so that each begins at an aligned address.
    unit = VECTOR // dtype.itemsize
    rows, length = directions.mT.shape if columns else directions.shape
    pieces = directions.new_empty(count, rows, cdiv(length, unit) * unit, dtype=dtype)[..., :length]
    pieces = pieces.mT if columns else pieces
    rest = directions
    for number, piece in enumerate(pieces, start=1):
        piece.copy_(rest)
        if number < count:
            rest = rest.float() - piece
    return pieces


def launches(operands: Operands, on: Hardware, chosen: Cut | None = None) -> list[Launch]:
    """Prepare the launches for some directions, in their order.

    Args:
        operands: Their tensors.
        on: The device to prepare for.
        chosen: In place of what would be chosen; for tests and tuning.

    Returns:
        The kernel, and one that adds up what it wrote.
    """
    planned = plan(operands.problem, on, chosen)
    x, g, v, u, counted, out, _ = operands
    squares, joints = (out.new_empty(shape) for shape in (planned.squares, planned.joints))
    pointers = {"x": x, "g": g, "v": v, "u": u, "counted": counted, "squares": squares, "joints": joints}
    for name, block in planned.blocks.items():
        pointers[name] = block.of(pointers[name])
    options = planned.config.options
    kernel = Launch(device.project_sum_squared_kernel, planned.grid, pointers | planned.arguments, options)
    K = out.shape[1]
    arguments = {
        "squares": squares, "joints": joints, "out": out, "N": len(x), "K": K, "chunks": planned.arguments["chunks"],
        "tiles": len(squares), "stride_row": out.stride(0), "WHOLE": planned.arguments["WHOLE"],
        "BLOCK_LINES": _LINES, "BLOCK_K": _DIRECTIONS,
    }  # fmt: skip
    return [kernel, Launch(device.sum_tiles_kernel, (cdiv(K, _DIRECTIONS), 3), arguments, _SUM_OPTIONS)]


class Plan(NamedTuple):
    """Everything that all calls of one problem share.

    Args:
        config: The tiles.
        squares: Shape of the sums of squares that the kernel writes.
        joints: Shape of the joint sums.
        blocks: TMA blocks of the inputs, or of transposed directions, by the kernel's names; none without TMA.
        grid: Number of programs.
        arguments: Of the kernel, all but the tensors.
    """

    config: Config
    squares: tuple[int, int, int]
    joints: tuple[int, int]
    blocks: dict[str, Block]
    grid: tuple[int]
    arguments: dict[str, Any]


@lru_cache(maxsize=PLANS)
def plan(problem: Problem, on: Hardware, chosen: Cut | None = None) -> Plan:
    """Choose the code for a call, from shapes and the device alone, so that equal calls give equal bits.

    Args:
        problem: The call.
        on: The device.
        chosen: As in :func:`launches`.

    Returns:
        The plan.
    """
    loads, BLOCK_T, config = chosen or cut(problem, on)
    N, T, K = problem.N, problem.T, problem.K
    beside, chunks = config.ROWS // BLOCK_T, cdiv(T, BLOCK_T)
    num_tiles, whole = cdiv(N * chunks, beside), chunks == 1
    tma = loads == "tma"
    blocks = _blocks(problem if beside == 1 else problem.flat(), config) if tma else {}
    turned = tuple(name for name in ("v", "u") if tma and not getattr(problem, name).fits_tma)
    # Matrix units of 16 bits would round float32. The interpreter multiplies the bit patterns of bfloat16 (triton issue
    # 11584).
    upcast = problem.of_factors is not problem.of_directions
    upcast |= on.family == "interpreter" and problem.of_factors is torch.bfloat16
    arguments = {
        "N": N, "T": T, "I": problem.x.shape[-1], "O": problem.g.shape[-1], "K": K, "chunks": chunks,
        **_strides(problem, tma=tma), **config.constants,
        "COUNTED": problem.counted is not None, "WHOLE": whole, "PIECES": problem.v.shape[0], "TMA": tma,
        "TRANSPOSED_V": "v" in turned, "TRANSPOSED_U": "u" in turned,
        "PRECISION": "tf32" if multiplies(problem, on) == "tf32" else "ieee", "UPCAST": upcast,
        "CHUNKS": beside, "BLOCK_T": BLOCK_T,
    }  # fmt: skip
    joints = (num_tiles if whole else N * chunks, K)
    return Plan(config, (num_tiles, 2, K), joints, blocks, (num_tiles * cdiv(K, config.BLOCK_K),), arguments)


def _blocks(problem: Problem, config: Config) -> dict[str, Block]:
    blocks = {name: Block.of_layout(getattr(problem, name), [1, config.ROWS, config.BLOCK_F]) for name in ("x", "g")}
    for name in ("v", "u"):
        layout = getattr(problem, name)
        if layout.fits_tma:
            blocks[name] = Block.of_layout(layout, [1, config.BLOCK_F, config.BLOCK_K])
        else:
            blocks[name] = Block.of_layout(transposed(layout), [1, config.BLOCK_K, config.BLOCK_F])
    return blocks


def _strides(problem: Problem, *, tma: bool) -> dict[str, int]:
    names = {
        "x": ("stride_xn", "stride_xt", "stride_xi"), "g": ("stride_gn", "stride_gt", "stride_go"),
        "v": ("stride_vp", "stride_vi", "stride_vk"), "u": ("stride_up", "stride_uo", "stride_uk"),
        "counted": ("stride_cn", "stride_ct"),
    }  # fmt: skip
    strides = {}
    for name, of_axes in names.items():
        layout = getattr(problem, name)
        unread = layout is None or (tma and name != "counted")
        strides |= dict.fromkeys(of_axes, 0) if unread else zip(of_axes, layout.strides, strict=True)
    return strides
