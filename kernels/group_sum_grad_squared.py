"""Launcher of the Triton kernel of :func:`fishkern.ops.group_sum_grad_squared`.

Short examples are computed from Gram matrices (:mod:`fishkern.kernels._group_by_grams`). For others the kernel goes
through the examples as that of :mod:`fishkern.kernels.sum_grad_squared` does, with the same tiles; instead of writing a
tile, a program sums it over its columns or its rows and writes a line of sums. A last kernel adds up the lines of all
tiles and parts in their order, and for the whole tensor once more those of its rows.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from triton import cdiv

from . import _group_sum_grad_squared_device as device
from ._chunks import chunk_table
from ._group_by_grams import launches_by_grams, takes_grams
from ._hardware import Hardware, hardware
from ._launch import Launch
from ._problem import Block, Layout, Problem, input_arguments, input_blocks
from ._sum_grad_squared_configs import PLANS, Config, by_row, loads, tiles

# Lines (a sum for each group) and groups that one program adds up at a time; for a single group, many lines.
_LINES, _GROUPS, _LINES_OF_ONE = 16, 128, 1024
_SUM_OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}


def group_sum_grad_squared(
    activations: Tensor,
    output_grads: Tensor,
    *,
    by: Literal["row", "column", "tensor"],
    offsets: Tensor | None = None,
    out: Tensor | None = None,
    allow_tf32: bool = False,
) -> Tensor:
    """Launch the kernels; arguments as in :func:`fishkern.ops.group_sum_grad_squared`, already checked."""
    add = out is not None
    if out is None:
        shape = {"row": output_grads.shape[-1:], "column": activations.shape[-1:], "tensor": ()}[by]
        out = torch.empty(shape, dtype=torch.float32, device=activations.device)
    if out.numel() == 0:
        return out
    if activations.numel() == 0 or output_grads.numel() == 0:  # nothing to add
        return out if add else out.zero_()
    rows = by != "column"
    operands = Operands(activations, output_grads, offsets, out, rows=rows, add=add, allow_tf32=allow_tf32)
    with torch.cuda.device_of(activations):  # Triton launches on the current device
        for launch in launches(operands, hardware(activations.device)):
            launch.run()
    return out


class Operands(NamedTuple):
    """The tensors of one call.

    Args:
        x: Activations, not empty.
        g: Output gradients, not empty.
        offsets: As in the operation.
        out: The result, ``[O]``, ``[I]`` or ``[]``.
        rows: Whether the groups are rows, or all of them together.
        add: Whether to add to ``out``, or to overwrite it.
        allow_tf32: As in the operation.
    """

    x: Tensor
    g: Tensor
    offsets: Tensor | None
    out: Tensor
    rows: bool = True
    add: bool = True
    allow_tf32: bool = False

    @property
    def problem(self) -> Problem:
        """Everything that the choice of code depends on, except the groups."""
        N = self.x.shape[0] if self.offsets is None else len(self.offsets) - 1
        return Problem(Layout.of(self.x), Layout.of(self.g), self.x.dtype, N, (), self.add, self.allow_tf32)

    def long_side_first(self) -> Operands:
        """Transpose a small gradient, since matrix units take 64 rows of a tile at least."""
        O, I = self.g.shape[-1], self.x.shape[-1]
        if O >= I or O > 64:
            return self
        return self._replace(x=self.g, g=self.x, rows=not self.rows)


def launches(operands: Operands, on: Hardware, config: Config | None = None) -> list[Launch]:
    """Prepare the launches of one call, in their order.

    Args:
        operands: Its tensors.
        on: The device to prepare for.
        config: Tiles in place of those of the table, without a split; for tests and tuning.

    Returns:
        One or two kernels that sum up squares, and one or two that add up what they wrote.
    """
    problem, out = operands.problem, operands.out
    if config is None and takes_grams(problem):
        factors = (operands.x, operands.g) if operands.rows else (operands.g, operands.x)
        prepared, sums = launches_by_grams(*factors, problem, on)
    else:
        prepared, sums = _launches_by_tiles(operands.long_side_first(), on, config)
    if out.ndim == 0:
        of_groups = torch.empty(sums.shape[1], dtype=torch.float32, device=out.device)
        prepared.append(_sum_lines(sums, of_groups, add=False))
        sums, out = of_groups[:, None], out[None]
    prepared.append(_sum_lines(sums, out, add=operands.add))
    return prepared


def _launches_by_tiles(operands: Operands, on: Hardware, config: Config | None) -> tuple[list[Launch], Tensor]:
    x, g, offsets, out = operands.x, operands.g, operands.offsets, operands.out
    planned = plan(operands.problem, on, config, rows=operands.rows)
    sums = torch.empty(planned.lines, planned.groups, dtype=torch.float32, device=out.device)
    pointers = {"x": x, "g": g, "out": sums, "chunks": None, "cuts": None}
    for name, block in planned.blocks.items():
        pointers[name] = block.of(pointers[name])
    if offsets is not None:
        table = chunk_table(offsets, x.shape[0], planned.parts, planned.config.BLOCK_T, x.device)
        pointers["chunks"], pointers["cuts"] = table
    kernel = device.group_sum_grad_squared_kernel
    return [Launch(kernel, planned.grid, pointers | planned.arguments, planned.config.options)], sums


class Plan(NamedTuple):
    """Everything that all calls of one problem share.

    Args:
        config: The tiles.
        parts: Into how many parts the examples are split.
        groups: Rows or columns of a gradient.
        lines: Sums that the first kernel writes for each of them.
        blocks: TMA blocks of the inputs that are loaded so, by the kernel's names.
        grid: Number of programs on each axis.
        arguments: Of the kernel, all but the tensors.
    """

    config: Config
    parts: int
    groups: int
    lines: int
    blocks: dict[str, Block]
    grid: tuple[int, int]
    arguments: dict[str, Any]


@lru_cache(maxsize=PLANS)
def plan(problem: Problem, on: Hardware, config: Config | None = None, *, rows: bool) -> Plan:
    """Choose the code for a call, from shapes and the device alone, so that equal calls give equal bits.

    Args:
        problem: The call.
        on: The device.
        config: As in :func:`launches`.
        rows: Whether the groups are rows.

    Returns:
        The plan.
    """
    config, parts = tiles(problem, on) if config is None else (config, 1)
    if rows:
        config = by_row(config, problem, on)
    tma = loads(problem, on) == "tma"
    blocks = input_blocks(problem, config.BLOCK_O, config.BLOCK_I, config.BLOCK_T) if tma else {}
    # The interpreter multiplies the bit patterns of bfloat16 (triton issue 11584).
    upcast = on.family == "interpreter" and problem.dtype is torch.bfloat16
    arguments = {
        **input_arguments(problem, parts, tma=tma), **config.constants,
        "ROWS": rows, "PACKED": problem.packed, "SINGLE": problem.is_single(config.BLOCK_T), "TMA": tma,
        "PRECISION": problem.precision, "UPCAST": upcast,
    }  # fmt: skip
    down, across = cdiv(problem.O, config.BLOCK_O), cdiv(problem.I, config.BLOCK_I)
    groups, lines = (problem.O, across) if rows else (problem.I, down)
    return Plan(config, parts, groups, parts * lines, blocks, (down * across, parts), arguments)


def _sum_lines(values: Tensor, out: Tensor, *, add: bool) -> Launch:
    lines, groups = values.shape
    BLOCK_LINES, BLOCK_GROUPS = (_LINES_OF_ONE, 1) if groups == 1 else (_LINES, _GROUPS)
    arguments = {
        "values": values, "out": out, "lines": lines, "groups": groups, "stride_out": out.stride(0), "ADD": add,
        "BLOCK_LINES": BLOCK_LINES, "BLOCK_GROUPS": BLOCK_GROUPS,
    }  # fmt: skip
    return Launch(device.sum_lines_kernel, (cdiv(groups, BLOCK_GROUPS),), arguments, _SUM_OPTIONS)
