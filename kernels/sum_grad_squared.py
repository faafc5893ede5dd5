"""Launcher of the Triton kernel of :func:`fishkern.ops.sum_grad_squared`.

One program owns one tile of the result and visits the examples in order
(:mod:`fishkern.kernels._sum_grad_squared_device`). Where the result has too few tiles to fill the device, the examples
are split into parts, whose results a second kernel adds up in their order. How a call is cut depends on its shapes and
the device alone.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import cdiv

from . import _sum_grad_squared_device as device
from ._chunks import chunk_table
from ._hardware import Hardware, hardware
from ._launch import Launch
from ._problem import VECTOR, Block, Layout, Problem, input_arguments, input_blocks, stride_arguments
from ._sum_grad_squared_configs import (
    PLANS,
    SUM_PARTS,
    Config,
    adds_in_memory,
    few_positions,
    loads,
    tiles,
    worth_a_copy,
)


def sum_grad_squared(
    activations: Tensor,
    output_grads: Tensor,
    *,
    offsets: Tensor | None = None,
    out: Tensor | None = None,
    grad_out: Tensor | None = None,
    allow_tf32: bool = False,
) -> Tensor:
    """Launch the kernel; arguments as in :func:`fishkern.ops.sum_grad_squared`, already checked."""
    add = out is not None
    if out is None:
        shape = output_grads.shape[-1], activations.shape[-1]
        out = torch.empty(shape, dtype=torch.float32, device=activations.device)
    if out.numel() == 0:
        return out
    if activations.numel() == 0:  # no example, or none with a position
        return out if add else out.zero_()
    operands = Operands(activations, output_grads, offsets, out, grad_out, add=add, allow_tf32=allow_tf32)
    with torch.cuda.device_of(activations):  # Triton launches on the current device
        for launch in launches(operands, hardware(activations.device)):
            launch.run()
    return out


class Operands(NamedTuple):
    """The tensors of one call.

    Args:
        x: Activations, not empty.
        g: Output gradients.
        offsets: As in the operation.
        out: The result, ``[O, I]``.
        grad_out: As in the operation.
        add: Whether to add to ``out``, or to overwrite it.
        allow_tf32: As in the operation.
    """

    x: Tensor
    g: Tensor
    offsets: Tensor | None
    out: Tensor
    grad_out: Tensor | None = None
    add: bool = True
    allow_tf32: bool = False

    @property
    def results(self) -> list[Tensor]:
        """The squares, and the sum of the gradients where it is requested."""
        return [self.out] if self.grad_out is None else [self.out, self.grad_out]

    @property
    def problem(self) -> Problem:
        """Everything that the choice of code depends on."""
        N = self.x.shape[0] if self.offsets is None else len(self.offsets) - 1
        results = tuple(Layout.of(result) for result in self.results)
        return Problem(Layout.of(self.x), Layout.of(self.g), self.x.dtype, N, results, self.add, self.allow_tf32)

    def long_side_first(self) -> Operands:
        """Transpose a small result, since matrix units take 64 rows of a tile at least."""
        O, I = self.out.shape
        if O >= I or O > 64:
            return self
        grad_out = None if self.grad_out is None else self.grad_out.mT
        return self._replace(x=self.g, g=self.x, out=self.out.mT, grad_out=grad_out)


def launches(operands: Operands, on: Hardware, config: Config | None = None) -> list[Launch]:
    """Prepare the launches of one call, in their order.

    Args:
        operands: Its tensors.
        on: The device to prepare for.
        config: Tiles in place of those of the table, without a split; for tuning.

    Returns:
        The kernel, and where the examples are split, one that adds up the parts of each result.
    """
    operands = operands.long_side_first()
    if config is None and worth_a_copy(operands.problem, on):
        operands = operands._replace(x=_in_vectors(operands.x), g=_in_vectors(operands.g))
    x, g, offsets, results = operands.x, operands.g, operands.offsets, operands.results
    planned = plan(operands.problem, on, config)
    targets = results
    if planned.parts > 1:
        targets = [result.new_empty(planned.parts, *result.shape) for result in results]
    pointers = {"x": x, "g": g, "out": targets[0], "grad_out": targets[1] if len(targets) == 2 else None}
    for name, block in planned.blocks.items():
        pointers[name] = block.of(pointers[name])
    if not planned.few:
        table = (None, None)
        if offsets is not None:
            table = chunk_table(offsets, x.shape[0], planned.parts, planned.config.BLOCK_T, x.device)
        pointers["chunks"], pointers["cuts"] = table
    kernel = device.few_positions_kernel if planned.few else device.sum_grad_squared_kernel
    prepared = [Launch(kernel, planned.grid, pointers | planned.arguments, planned.config.options)]
    if planned.parts > 1:
        prepared.append(_sum_parts(targets[0], results[0], add=operands.add))
        if len(results) == 2:
            prepared.append(_sum_parts(targets[1], results[1], add=True))  # grad_out is the caller's
    return prepared


class Plan(NamedTuple):
    """Everything that all calls of one problem share.

    Args:
        config: The tiles.
        parts: Into how many parts the examples are split.
        few: Whether the kernel for few positions takes it.
        blocks: TMA blocks of the tensors that are loaded or stored so, by the kernel's names.
        grid: Number of programs on each axis.
        arguments: Of the kernel, all but the tensors.
    """

    config: Config
    parts: int
    few: bool
    blocks: dict[str, Block]
    grid: tuple[int, int]
    arguments: dict[str, Any]


@lru_cache(maxsize=PLANS)
def plan(problem: Problem, on: Hardware, config: Config | None = None) -> Plan:
    """Choose the code for a call, from shapes and the device alone, so that equal calls give equal bits.

    Args:
        problem: The call.
        on: The device.
        config: As in :func:`launches`.

    Returns:
        The plan.
    """
    few = few_positions(problem) and config is None
    config, parts = tiles(problem, on) if config is None else (config, 1)
    targets = _targets(problem, parts)
    tma = loads(problem, on) == "tma" and not few
    blocks = input_blocks(problem, config.BLOCK_O, config.BLOCK_I, config.BLOCK_T) if tma else {}
    tma_out = tma and all(target.fits_tma for target in targets)
    if tma_out:
        written = [Block.of_layout(target, [1, config.BLOCK_O, config.BLOCK_I]) for target in targets]
        blocks |= zip(("out", "grad_out"), written, strict=False)

    arguments = {
        **input_arguments(problem, parts, tma=tma), **config.constants,
        **stride_arguments("o", "poi", targets[0], tma=tma_out),
        **stride_arguments("m", "poi", targets[-1], tma=tma_out),
        "MEAN": problem.mean, "ADD": problem.add and parts == 1, "ADD_MEAN": parts == 1,  # partial results are new
    }  # fmt: skip
    if few:
        del arguments["BLOCK_T"]
    else:
        # The interpreter multiplies the bit patterns of bfloat16 (triton issue 11584).
        upcast = on.family == "interpreter" and problem.dtype is torch.bfloat16
        arguments |= {"PACKED": problem.packed, "SINGLE": problem.is_single(config.BLOCK_T)}
        arguments |= {"TMA": tma, "TMA_OUT": tma_out, "REDUCE": adds_in_memory(on)}
        arguments |= {"PRECISION": problem.precision, "UPCAST": upcast}
    grid = (cdiv(problem.O, config.BLOCK_O) * cdiv(problem.I, config.BLOCK_I), parts)
    return Plan(config, parts, few, blocks, grid, arguments)


def _in_vectors(tensor: Tensor) -> Tensor:
    """Copy an input of which no 16 bytes can be loaded at once into rows that begin at multiples of them."""
    if Layout.of(tensor).has_vectors:
        return tensor
    *outer, columns = tensor.shape
    unit = VECTOR // tensor.element_size()
    return tensor.new_empty(*outer, cdiv(columns, unit) * unit)[..., :columns].copy_(tensor)


def _targets(problem: Problem, parts: int) -> list[Layout]:
    """Lay out what the kernel writes, ``[parts, O, I]``: the results themselves, or partial ones."""
    O, I = problem.O, problem.I
    if parts > 1:
        return [Layout((parts, O, I), (O * I, I, 1), 4, True) for _ in problem.results]
    return [Layout((1, *result.shape), (0, *result.strides), 4, result.aligned) for result in problem.results]


def _sum_parts(parts: Tensor, result: Tensor, *, add: bool) -> Launch:
    O, I = result.shape
    arguments = {
        "values": parts, "out": result, "parts": len(parts), "O": O, "I": I,
        "stride_oo": result.stride(0), "stride_oi": result.stride(1), "ADD": add,
        "BLOCK_O": SUM_PARTS.BLOCK_O, "BLOCK_I": SUM_PARTS.BLOCK_I,
    }  # fmt: skip
    grid = (cdiv(O, SUM_PARTS.BLOCK_O) * cdiv(I, SUM_PARTS.BLOCK_I),)
    return Launch(device.sum_parts_kernel, grid, arguments, SUM_PARTS.options)
