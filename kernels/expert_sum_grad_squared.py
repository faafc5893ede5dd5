"""Launcher of the Triton kernel of :func:`fishkern.ops.expert_sum_grad_squared`.

All experts of a layer take one launch: a program owns one tile of one expert's result, with the tiles of
:mod:`fishkern.kernels.sum_grad_squared`, and a table says where the groups of its rows lie. The groups of an expert are
not split over programs, since there are experts enough.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import cdiv

from . import _expert_sum_grad_squared_device as device
from ._chunks import expert_chunk_table
from ._hardware import Hardware, hardware
from ._launch import Launch
from ._problem import Block, Layout, Problem, input_arguments, input_blocks, stride_arguments
from ._sum_grad_squared_configs import PLANS, Config, adds_in_memory, loads, tiles


def expert_sum_grad_squared(
    activations: Tensor,
    output_grads: Tensor,
    num_experts: int,
    *,
    expert: Tensor,
    offsets: Tensor,
    out: Tensor | None = None,
    allow_tf32: bool = False,
) -> Tensor:
    """Launch the kernel; arguments as in :func:`fishkern.ops.expert_sum_grad_squared`, already checked."""
    add = out is not None
    if out is None:
        shape = num_experts, output_grads.shape[-1], activations.shape[-1]
        out = torch.empty(shape, dtype=torch.float32, device=activations.device)
    if out.numel() == 0:
        return out
    if activations.numel() == 0:  # no expert gets a row
        return out if add else out.zero_()
    operands = Operands(activations, output_grads, expert, offsets, out, add=add, allow_tf32=allow_tf32)
    with torch.cuda.device_of(activations):  # Triton launches on the current device
        launch_of(operands, hardware(activations.device)).run()
    return out


class Operands(NamedTuple):
    """The tensors of one call.

    Args:
        x: Activations, not empty.
        g: Output gradients, not empty.
        expert: As in the operation.
        offsets: As in the operation.
        out: The result, ``[E, O, I]``.
        add: Whether to add to ``out``, or to overwrite it.
        allow_tf32: As in the operation.
    """

    x: Tensor
    g: Tensor
    expert: Tensor
    offsets: Tensor
    out: Tensor
    add: bool = True
    allow_tf32: bool = False

    @property
    def problem(self) -> Problem:
        """Everything that the choice of code depends on; the groups are its examples."""
        layouts = Layout.of(self.x), Layout.of(self.g)
        return Problem(*layouts, self.x.dtype, len(self.expert), (Layout.of(self.out),), self.add, self.allow_tf32)

    def turned(self) -> Operands:
        """Transpose small results, since matrix units take 64 rows of a tile at least, and those stored by columns."""
        _, O, I = self.out.shape
        by_columns = self.out.stride(1) == 1 != self.out.stride(2) and I > 64
        if not by_columns and (O >= I or O > 64):
            return self
        return self._replace(x=self.g, g=self.x, out=self.out.mT)


def launch_of(operands: Operands, on: Hardware, config: Config | None = None) -> Launch:
    """Prepare the launch of one call.

    Args:
        operands: Its tensors.
        on: The device to prepare for.
        config: Tiles in place of those of the table; for tests and tuning.

    Returns:
        The launch.
    """
    operands = operands.turned()
    x, out = operands.x, operands.out
    planned = plan(operands.problem, on, config)
    pointers = {"x": x, "g": operands.g, "out": out}
    for name, block in planned.blocks.items():
        pointers[name] = block.of(pointers[name])
    table = expert_chunk_table(
        operands.expert, operands.offsets, x.shape[0], len(out), planned.config.BLOCK_T, x.device
    )
    pointers["chunks"], pointers["cuts"] = table
    kernel = device.expert_sum_grad_squared_kernel
    return Launch(kernel, planned.grid, pointers | planned.arguments, planned.config.options)


class Plan(NamedTuple):
    """Everything that all calls of one problem share.

    Args:
        config: The tiles.
        blocks: TMA blocks of the tensors that are loaded or stored so, by the kernel's names.
        grid: Number of programs on each axis.
        arguments: Of the kernel, all but the tensors.
    """

    config: Config
    blocks: dict[str, Block]
    grid: tuple[int, int]
    arguments: dict[str, Any]


@lru_cache(maxsize=PLANS)
def plan(problem: Problem, on: Hardware, config: Config | None = None) -> Plan:
    """Choose the code for a call, from shapes and the device alone, so that equal calls give equal bits.

    Args:
        problem: The call.
        on: The device.
        config: As in :func:`launch_of`.

    Returns:
        The plan.
    """
    config = tiles(problem, on)[0] if config is None else config
    (out,) = problem.results
    tma = loads(problem, on) == "tma"
    tma_out = tma and out.fits_tma
    blocks = input_blocks(problem, config.BLOCK_O, config.BLOCK_I, config.BLOCK_T) if tma else {}
    if tma_out:
        blocks["out"] = Block.of_layout(out, [1, config.BLOCK_O, config.BLOCK_I])
    # The interpreter multiplies the bit patterns of bfloat16 (triton issue 11584).
    upcast = on.family == "interpreter" and problem.dtype is torch.bfloat16
    num_experts = out.shape[0]
    arguments = {
        **input_arguments(problem, num_experts, tma=tma), **config.constants,
        **stride_arguments("o", "poi", out, tma=tma_out),
        "ADD": problem.add, "TMA": tma, "TMA_OUT": tma_out, "REDUCE": adds_in_memory(on),
        "PRECISION": problem.precision, "UPCAST": upcast,
    }  # fmt: skip
    grid = (cdiv(problem.O, config.BLOCK_O) * cdiv(problem.I, config.BLOCK_I), num_experts)
    return Plan(config, blocks, grid, arguments)
