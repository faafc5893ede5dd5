"""Launcher of the Triton kernel of :func:`fishkern.ops.sum_grad_squared`.

One program owns one tile of the result and visits the examples in order
(:mod:`fishkern.kernels._sum_grad_squared_device`). Where the result has too few tiles to fill the device, the examples
are split into parts, whose results a second kernel adds up in their order. Which way a call is cut depends on its
shapes and the device alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.ragged_tma import create_ragged_descriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import _sum_grad_squared_device as device
from ._hardware import Hardware, hardware
from ._sum_grad_squared_configs import FEW_POSITIONS, SUM_PARTS, Config, Loads, choose, takes_tma


@dataclass(frozen=True)
class Launch:
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
        O, I = I, O
    dense = offsets is None
    N, positions = (x.shape[0], x.shape[0] * x.shape[1]) if dense else (len(offsets) - 1, x.shape[0])
    few = dense and x.shape[1] <= FEW_POSITIONS and config is None
    results = [(out, add)] if grad_out is None else [(out, add), (grad_out, True)]
    loads = _loads(x, g, on)
    tma = loads == "tma" and not few
    parts = 1
    if config is None:
        wide = grad_out is None and _tma_takes(out)
        config, parts = choose(on, O, I, N, positions, dense, x.element_size(), loads, wide)

    targets = [_Target(result, adds, parts) for result, adds in results]
    total, mean = targets[0], targets[-1]
    tma_out = tma and all(target.tma for target in targets)
    arguments = {
        "x": x, "g": g, "N": N, "O": O, "I": I, "parts": parts,
        "stride_xn": x.stride(0) if dense else 0, "stride_xt": x.stride(-2), "stride_xi": x.stride(-1),
        "stride_gn": g.stride(0) if dense else 0, "stride_gt": g.stride(-2), "stride_go": g.stride(-1),
        "stride_op": total.strides[0], "stride_oo": total.strides[1], "stride_oi": total.strides[2],
        "stride_mp": mean.strides[0], "stride_mo": mean.strides[1], "stride_mi": mean.strides[2],
        "out": total.argument(config, tma_out),
        "grad_out": None if grad_out is None else mean.argument(config, tma_out),
        "MEAN": grad_out is not None, "ADD": total.add, "ADD_MEAN": mean.add,
        **config.constants,
    }  # fmt: skip
    grid = (triton.cdiv(O, config.BLOCK_O) * triton.cdiv(I, config.BLOCK_I), parts)
    if few:
        del arguments["BLOCK_T"]
        main = Launch(device.few_positions_kernel, grid, {**arguments, "T": x.shape[1]}, config.options)
    else:
        if tma:
            arguments["x"] = _descriptor(x, dense, config.BLOCK_T, config.BLOCK_I)
            arguments["g"] = _descriptor(g, dense, config.BLOCK_T, config.BLOCK_O)
        chunks, cuts = (None, None) if dense else _chunk_table(offsets, positions, parts, config.BLOCK_T, x.device)
        arguments |= {
            "chunks": chunks, "cuts": cuts, "T": x.shape[1] if dense else 0,
            "PACKED": not dense, "TMA": tma, "TMA_OUT": tma_out,
            "PRECISION": "tf32" if allow_tf32 and x.dtype is torch.float32 else "ieee",
            # The interpreter multiplies the bit patterns of bfloat16 (triton issue 11584).
            "UPCAST": on.family == "interpreter" and x.dtype is torch.bfloat16,
        }  # fmt: skip
        main = Launch(device.sum_grad_squared_kernel, grid, arguments, config.options)
    return [main, *(target.sum_parts() for target in targets if parts > 1)]


class _Target:
    """Where a kernel writes: the result itself, or a workspace for each part of the examples."""

    def __init__(self, result: Tensor, add: bool, parts: int) -> None:
        self.result, self.adds_to_result, self.parts = result, add, parts
        self.add = add and parts == 1
        self.tensor = result if parts == 1 else result.new_empty(parts, *result.shape)
        self.strides = (0, *result.stride()) if parts == 1 else self.tensor.stride()
        self.tma = _tma_takes(self.tensor)

    def argument(self, config: Config, tma: bool) -> Tensor | TensorDescriptor:
        if not tma:
            return self.tensor
        block = self.tensor if self.parts > 1 else self.tensor[None]
        return TensorDescriptor(block, list(block.shape), _strides(block), [1, config.BLOCK_O, config.BLOCK_I])

    def sum_parts(self) -> Launch:
        O, I = self.result.shape
        arguments = {
            "values": self.tensor, "out": self.result, "parts": self.parts, "O": O, "I": I,
            "stride_oo": self.result.stride(0), "stride_oi": self.result.stride(1), "ADD": self.adds_to_result,
            "BLOCK_O": SUM_PARTS.BLOCK_O, "BLOCK_I": SUM_PARTS.BLOCK_I,
        }  # fmt: skip
        grid = (triton.cdiv(O, SUM_PARTS.BLOCK_O) * triton.cdiv(I, SUM_PARTS.BLOCK_I),)
        return Launch(device.sum_parts_kernel, grid, arguments, SUM_PARTS.options)


def _loads(x: Tensor, g: Tensor, on: Hardware) -> Loads:
    if takes_tma(on) and _tma_takes(x) and _tma_takes(g):
        return "tma"
    return "vectors" if _has_vectors(x) and _has_vectors(g) else "elements"


def _tma_takes(tensor: Tensor) -> bool:
    """Whether the copy engine takes blocks of the tensor: rows without gaps, no pitch of zero, nothing too large."""
    *outer, (columns, stride) = zip(tensor.shape, tensor.stride(), strict=True)
    pitches = [pitch * tensor.element_size() for length, pitch in outer if length > 1]
    return (
        (columns == 1 or stride == 1)
        and tensor.data_ptr() % 16 == 0
        and max(tensor.shape) <= 2**30  # what a descriptor of packed examples counts to
        and all(0 < pitch < 2**40 and pitch % 16 == 0 for pitch in pitches)
    )


def _has_vectors(tensor: Tensor) -> bool:
    """Whether 16 bytes can be loaded at once: along one axis entries are neighbours, and all else is aligned."""
    size = tensor.element_size()
    pitches = [pitch for length, pitch in zip(tensor.shape, tensor.stride(), strict=True) if length > 1]
    odd = [pitch for pitch in pitches if pitch * size % 16]
    return tensor.data_ptr() % 16 == 0 and odd in ([], [1])


def _strides(tensor: Tensor) -> list[int]:
    """Strides that a descriptor accepts, also along axes of one entry, where any would do."""
    unit = 16 // tensor.element_size()
    pitches = [
        unit if length == 1 else pitch for length, pitch in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
    ]
    return [*pitches, 1]


def _descriptor(tensor: Tensor, dense: bool, BLOCK_T: int, BLOCK: int) -> TensorDescriptor:
    if dense:
        return TensorDescriptor(tensor, list(tensor.shape), _strides(tensor), [1, BLOCK_T, BLOCK])
    return create_ragged_descriptor(tensor.as_strided(tensor.shape, _strides(tensor)), [BLOCK_T, BLOCK])


def _chunk_table(
    offsets: Tensor, positions: int, parts: int, BLOCK_T: int, to: torch.device
) -> tuple[Tensor, Tensor]:
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
    table = torch.cat([rows.flatten(), cuts]).to(torch.int32).to(to, non_blocking=True)
    return table[: 2 * most], table[2 * most :]
