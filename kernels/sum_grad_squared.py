"""Launcher of the Triton kernel of :func:`fishkern.ops.sum_grad_squared`.

One program owns one tile of the result and visits the examples in order
(:mod:`fishkern.kernels._sum_grad_squared_device`). Where the result has too few tiles to fill the device, the examples
are split into parts, whose results a second kernel adds up in their order. Which way a call is cut depends on its
shapes and the device alone.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.ragged_tma import create_ragged_descriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import _sum_grad_squared_device as device
from ._hardware import Hardware, hardware, to_gpu
from ._sum_grad_squared_configs import FEW_POSITIONS, SUM_PARTS, Config, Loads, choose, takes_tma


class Launch(NamedTuple):
    """One kernel with all that it is launched with.

    Args:
        kernel: The device function.
        grid: Number of programs on each axis.
        arguments: By name.
        options: Of the compiler.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]

    def run(self) -> None:
        """Launch it on the current device."""
        self.kernel[self.grid](**self.arguments, **self.options)


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
    with torch.cuda.device_of(activations):  # Triton launches on the current device
        for launch in launches(
            activations, output_grads, offsets, out, add, grad_out, allow_tf32, hardware(activations.device)
        ):
            launch.run()
    return out


def launches(
    x: Tensor,
    g: Tensor,
    offsets: Tensor | None,
    out: Tensor,
    add: bool,
    grad_out: Tensor | None,
    allow_tf32: bool,
    on: Hardware,
    config: Config | None = None,
) -> list[Launch]:
    """Prepare the launches of one call, in their order.

    Args:
        x: Activations, not empty.
        g: Output gradients.
        offsets: As in the operation.
        out: The result, ``[O, I]``.
        add: Whether to add to it.
        grad_out: As in the operation.
        allow_tf32: As in the operation.
        on: The device to prepare for.
        config: Tiles in place of those of the table, without a split; for tuning.

    Returns:
        The kernel, and where the examples are split, one that adds up the parts of each result.
    """
    O, I = out.shape
    if O < I and O <= 64:
        # The long side on the rows of the tiles, of which matrix units take 64 at least.
        x, g, out, grad_out = g, x, out.mT, None if grad_out is None else grad_out.mT
    results = [out] if grad_out is None else [out, grad_out]
    N = x.shape[0] if offsets is None else len(offsets) - 1
    layouts = tuple(Layout.of(result) for result in results)
    tf32 = allow_tf32 and x.dtype is torch.float32
    # The interpreter multiplies the bit patterns of bfloat16 (triton issue 11584).
    upcast = on.family == "interpreter" and x.dtype is torch.bfloat16
    plan = _plan(Layout.of(x), Layout.of(g), layouts, N, offsets is None, add, tf32, upcast, on, config)

    targets = results
    if plan.parts > 1:
        targets = [result.new_empty(plan.parts, *result.shape) for result in results]
    pointers = {"x": x, "g": g, "out": targets[0], "grad_out": targets[-1] if len(targets) == 2 else None}
    for name, block in plan.blocks.items():
        pointers[name] = block.of(pointers[name])
    config = plan.config
    if not plan.few:
        table = (None, None)
        if offsets is not None:
            table = _chunk_table(offsets, x.shape[0], plan.parts, config.BLOCK_T, x.device)
        pointers["chunks"], pointers["cuts"] = table
    kernel = device.few_positions_kernel if plan.few else device.sum_grad_squared_kernel
    found = [Launch(kernel, plan.grid, pointers | plan.arguments, config.options)]
    if plan.parts > 1:
        adds = (add, True)
        found += [_sum_parts(*pair) for pair in zip(targets, results, adds[: len(results)], strict=True)]
    return found


class Layout(NamedTuple):
    """Where the entries of a tensor lie; all that the choice of a kernel's code depends on."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int
    aligned: bool

    @classmethod
    def of(cls, tensor: Tensor) -> Layout:
        return cls(tensor.shape, tensor.stride(), tensor.element_size(), tensor.data_ptr() % 16 == 0)


class Block(NamedTuple):
    """What the copy engine brings of tensors of one layout: ``[N, T, columns]``, or examples of any length packed."""

    shape: list[int]
    strides: list[int]
    block_shape: list[int]

    @classmethod
    def of_layout(cls, layout: Layout, block_shape: list[int]) -> Block:
        # Along axes of one entry, where any stride would do, a descriptor accepts multiples of 16 bytes.
        unit = 16 // layout.itemsize
        pitches = zip(layout.shape[:-1], layout.strides[:-1], strict=True)
        strides = [unit if length == 1 else pitch for length, pitch in pitches]
        return cls(list(layout.shape), [*strides, 1], block_shape)

    def of(self, tensor: Tensor) -> TensorDescriptor:
        if len(self.shape) == 3:
            return TensorDescriptor(tensor, *self)
        return create_ragged_descriptor(tensor.as_strided(self.shape, self.strides), self.block_shape)


class Plan(NamedTuple):
    """What is the same for all calls with tensors of the same layouts."""

    config: Config
    parts: int
    few: bool
    blocks: dict[str, Block]
    grid: tuple[int, int]
    arguments: dict[str, Any]


@lru_cache(maxsize=4096)
def _plan(
    x: Layout,
    g: Layout,
    results: tuple[Layout, ...],
    N: int,
    dense: bool,
    add: bool,
    tf32: bool,
    upcast: bool,
    on: Hardware,
    config: Config | None,
) -> Plan:
    O, I = results[0].shape
    T = x.shape[1] if dense else 0
    positions = N * T if dense else x.shape[0]
    few = dense and T <= FEW_POSITIONS and config is None
    loads = _loads(x, g, on)
    parts = 1
    if config is None:
        mean = len(results) == 2
        wide = not mean and _tma_takes(results[0])
        config, parts = choose(on, O, I, N, positions, dense, x.itemsize, loads, wide, mean)
    if parts > 1:
        parts_of = Layout((parts, O, I), (O * I, I, 1), 4, True)
        targets = [parts_of for _ in results]
    else:
        targets = [Layout((1, *result.shape), (0, *result.strides), 4, result.aligned) for result in results]
    tma = loads == "tma" and not few
    tma_out = tma and all(_tma_takes(target) for target in targets)
    blocks = {}
    if tma:
        chunk = [1, config.BLOCK_T] if dense else [config.BLOCK_T]
        blocks = {
            "x": Block.of_layout(x, [*chunk, config.BLOCK_I]),
            "g": Block.of_layout(g, [*chunk, config.BLOCK_O]),
        }
    if tma_out:
        tiles = [Block.of_layout(target, [1, config.BLOCK_O, config.BLOCK_I]) for target in targets]
        blocks |= zip(("out", "grad_out"), tiles, strict=False)

    total, mean = targets[0], targets[-1]
    arguments = {
        "N": N, "O": O, "I": I, "parts": parts, "T": T,
        "stride_xn": x.strides[0] if dense else 0, "stride_xt": x.strides[-2], "stride_xi": x.strides[-1],
        "stride_gn": g.strides[0] if dense else 0, "stride_gt": g.strides[-2], "stride_go": g.strides[-1],
        "stride_op": total.strides[0], "stride_oo": total.strides[1], "stride_oi": total.strides[2],
        "stride_mp": mean.strides[0], "stride_mo": mean.strides[1], "stride_mi": mean.strides[2],
        "MEAN": len(results) == 2, "ADD": add and parts == 1, "ADD_MEAN": parts == 1,
        **config.constants,
    }  # fmt: skip
    if few:
        del arguments["BLOCK_T"]
    else:
        precision = "tf32" if tf32 else "ieee"
        arguments |= {"PACKED": not dense, "TMA": tma, "TMA_OUT": tma_out, "PRECISION": precision, "UPCAST": upcast}
    grid = (-(-O // config.BLOCK_O) * -(-I // config.BLOCK_I), parts)
    return Plan(config, parts, few, blocks, grid, arguments)


def _sum_parts(parts: Tensor, result: Tensor, add: bool) -> Launch:
    O, I = result.shape
    arguments = {
        "values": parts, "out": result, "parts": len(parts), "O": O, "I": I,
        "stride_oo": result.stride(0), "stride_oi": result.stride(1), "ADD": add,
        "BLOCK_O": SUM_PARTS.BLOCK_O, "BLOCK_I": SUM_PARTS.BLOCK_I,
    }  # fmt: skip
    grid = (-(-O // SUM_PARTS.BLOCK_O) * -(-I // SUM_PARTS.BLOCK_I),)
    return Launch(device.sum_parts_kernel, grid, arguments, SUM_PARTS.options)


def _loads(x: Layout, g: Layout, on: Hardware) -> Loads:
    if takes_tma(on) and _tma_takes(x) and _tma_takes(g):
        return "tma"
    return "vectors" if _has_vectors(x) and _has_vectors(g) else "elements"


def _tma_takes(layout: Layout) -> bool:
    """Whether the copy engine takes blocks of the tensor: rows without gaps, no pitch of zero, nothing too large."""
    *outer, (columns, stride) = zip(layout.shape, layout.strides, strict=True)
    pitches = [pitch * layout.itemsize for length, pitch in outer if length > 1]
    return (
        (columns == 1 or stride == 1)
        and layout.aligned
        and max(layout.shape) <= 2**30  # what a descriptor of packed examples counts to
        and all(0 < pitch < 2**40 and pitch % 16 == 0 for pitch in pitches)
    )


def _has_vectors(layout: Layout) -> bool:
    """Whether 16 bytes can be loaded at once: along one axis entries are neighbours, and all else is aligned."""
    pitches = [pitch for length, pitch in zip(layout.shape, layout.strides, strict=True) if length > 1]
    odd = [pitch for pitch in pitches if pitch * layout.itemsize % 16]
    return layout.aligned and odd in ([], [1])


def _chunk_table(offsets: Tensor, positions: int, parts: int, BLOCK_T: int, to: torch.device) -> tuple[Tensor, Tensor]:
    """Cut packed examples into chunks, and the chunks into parts of about equal work between examples.

    It is computed where the offsets lie and nothing is read back, so that nobody waits for the device.

    Args:
        offsets: ``[N + 1]``.
        positions: Where they end.
        parts: Into how many parts.
        BLOCK_T: Longest chunk.
        to: Device of the kernel.

    Returns:
        ``[C, 2]``: position of each chunk, and how many positions its example has from there on; rows behind the last
        chunk mean nothing. ``[parts + 1]``: the chunk at which each part begins. Both int32.

    Raises:
        ValueError: The positions pass what int32 counts.
        RuntimeError: The offsets lie on the CPU, and a CUDA graph is being captured.
    """
    if positions >= 2**31:
        raise ValueError(f"the kernel takes up to 2**31 - 1 packed positions, got {positions}: split the call.")
    offsets = offsets.long()
    lengths = offsets.diff()
    counts = (lengths + (BLOCK_T - 1)) // BLOCK_T
    firsts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])  # first chunk of each example
    most = positions // BLOCK_T + len(lengths) + 1  # the kernel reads one row ahead
    chunk = torch.arange(most, device=offsets.device)
    example = torch.searchsorted(firsts, chunk, right=True).sub_(1).clamp_(max=len(lengths) - 1)
    done = (chunk - firsts[example]) * BLOCK_T
    rows = torch.stack([offsets[example] + done, lengths[example] - done], dim=1)
    even = torch.arange(parts + 1, device=offsets.device) * firsts[-1] // parts
    cuts = firsts[torch.searchsorted(firsts, even)]
    table = torch.cat([rows.flatten(), cuts]).to(torch.int32)
    if table.device != to:  # else there is no copy
        table = to_gpu(table, to, "pad the examples to one length [N, T, I], or call this outside of the graph.")
    return table[: 2 * most], table[2 * most :]
