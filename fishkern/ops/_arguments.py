"""Argument checks of the operations on weight gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fishkern.ops.dtypes import accumulates_in


def check_linear(activations: Tensor, output_grads: Tensor, offsets: Tensor | None) -> None:
    """Check the examples of a linear layer, padded to one length or packed.

    Args:
        activations: ``[N, T, I]``, or ``[S, I]`` with offsets.
        output_grads: ``[N, T, O]``, or ``[S, O]`` with offsets.
        offsets: ``[N + 1]``, if the examples are packed.

    Raises:
        ValueError: They do not belong together, or ``offsets`` do not cut their positions into examples.
    """
    packed = offsets is not None
    if not activations.ndim == output_grads.ndim == 3 - packed:
        expected = "[S, I] and [S, O] with offsets" if packed else "[N, T, I] and [N, T, O] without offsets"
        raise ValueError(
            f"activations and output_grads must be {expected}, "
            f"got {tuple(activations.shape)} and {tuple(output_grads.shape)}. (fishkern.layers.positions flattens what "
            "is between the example axis and the features to T.)"
        )
    check_factors(activations, output_grads)
    if offsets is not None:
        check_offsets(offsets, output_grads.shape[0])


def check_factors(activations: Tensor, output_grads: Tensor) -> None:
    """Check that activations and output gradients belong to one linear map.

    Args:
        activations: ``[..., I]``.
        output_grads: ``[..., O]``, the same leading sizes, floating dtype and device.

    Raises:
        ValueError: They do not belong together.
    """
    sizes = f"activations {tuple(activations.shape)} and output_grads {tuple(output_grads.shape)}"
    if min(activations.ndim, output_grads.ndim) < 2 or activations.shape[:-1] != output_grads.shape[:-1]:
        raise ValueError(f"activations and output_grads must agree in all sizes but the last, got {sizes}.")
    if activations.dtype != output_grads.dtype or not activations.is_floating_point():
        raise ValueError(
            "activations and output_grads must have the same floating dtype, "
            f"got {activations.dtype} and {output_grads.dtype}: cast one to the other's."
        )
    if activations.device != output_grads.device:
        raise ValueError(
            "activations and output_grads must be on one device, "
            f"got {activations.device} and {output_grads.device}: move one to the other's."
        )


def accumulator(out: Tensor | None, shape: Sequence[int], grads: Tensor, name: str = "out") -> Tensor:
    """Return the tensor that squares are added to.

    Args:
        out: The caller's tensor; ``None`` for zeros.
        shape: Shape that it must have.
        grads: Gradients to be squared, which set the device, and the dtype: float32, or float64 for float64.
        name: Its name in messages.

    Returns:
        ``out`` itself, or zeros.

    Raises:
        ValueError: ``out`` has another shape, dtype or device, or two of its entries may share a place.
    """
    shape, dtype = tuple(shape), accumulates_in(grads.dtype)
    if out is None:
        return torch.zeros(shape, dtype=dtype, device=grads.device)
    if (tuple(out.shape), out.dtype, out.device) != (shape, dtype, grads.device):
        raise ValueError(
            f"{name} must be {shape}, {dtype}, on {grads.device}, got {tuple(out.shape)}, {out.dtype}, on "
            f"{out.device}: pass such a tensor of zeros, or None."
        )
    if not out.is_contiguous():
        inner = 0  # extent of all axes of smaller strides together
        for stride, length in reversed(_axes(out)):
            if stride <= inner:
                raise ValueError(
                    f"{name} must have a place for each entry, got strides {out.stride()} of {shape}, as an expanded "
                    "tensor has: pass its contiguous()."
                )
            inner += (length - 1) * stride
    return out


def check_apart(out: Tensor, other: Tensor, names: str) -> None:
    """Check that two accumulators share no memory, by addresses and strides alone.

    Args:
        out: As :func:`accumulator` returns it.
        other: Of the same shape and dtype.
        names: Their names in messages.

    Raises:
        ValueError: They share an entry; or their strides differ, and their ranges of addresses overlap.
    """
    first, second = out.data_ptr(), other.data_ptr()
    axes = _axes(out) if first <= second else _axes(other)
    gap = abs(second - first) // out.element_size()
    extent = sum((length - 1) * stride for stride, length in axes)
    if not first or gap > extent:  # no memory, or one ends before the other begins
        return
    if _axes(out) != _axes(other) or _reaches(gap, axes):
        raise ValueError(f"{names} must not overlap, got two views of the same memory: pass one of them its own.")


def _axes(tensor: Tensor) -> list[tuple[int, int]]:
    """Strides and lengths, the largest stride first; not of axes of one entry, whose strides mean nothing."""
    axes = zip(tensor.stride(), tensor.shape, strict=True)
    return sorted(((stride, length) for stride, length in axes if length > 1), reverse=True)


def _reaches(gap: int, axes: list[tuple[int, int]]) -> bool:
    """Whether two entries can be so far apart; each stride is larger than all smaller axes together extend."""
    if not axes:
        return gap == 0
    (stride, length), *rest = axes
    # the smaller axes bridge less than one stride, in either direction: only the two nearest steps can do
    steps = gap // stride
    return any(abs(step) < length and _reaches(gap - step * stride, rest) for step in (steps, steps + 1))


def check_offsets(offsets: Tensor, num_positions: int) -> None:
    """Check that offsets cut packed positions into examples.

    Args:
        offsets: ``[N + 1]``, int64 or int32, ascending from 0.
        num_positions: What they must end with.

    Raises:
        ValueError: They are something else.
    """
    if offsets.ndim != 1 or offsets.numel() == 0 or offsets.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            "offsets must be [N + 1], int64 or int32: where each example begins, and last the number of "
            f"positions; got {tuple(offsets.shape)}, {offsets.dtype}."
        )
    firsts = offsets.tolist()
    if firsts != sorted(firsts) or (firsts[0], firsts[-1]) != (0, num_positions):
        raise ValueError(
            f"offsets must ascend from 0 to the number of positions, {num_positions}; got {len(firsts)} numbers from "
            f"{firsts[0]} to {firsts[-1]}{'' if firsts == sorted(firsts) else ', which do not ascend'}."
        )
