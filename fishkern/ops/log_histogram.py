"""Histogram of the logarithm of magnitudes."""

from __future__ import annotations

import torch
from torch import Tensor

from fishkern.backend import Backend, choose
from fishkern.ops.magnitudes import count_below, key_dtype, keys_reaching

SMALLEST = 1e-12
"""What is added to a magnitude before its logarithm is taken, so that zero has one."""


def log_histogram(values: Tensor, edges: Tensor, *, backend: Backend | None = None) -> Tensor:
    """Count values by the logarithm of their magnitudes.

        counts[b] = #{x : edges[b] <= log10(|x| + 1e-12) < edges[b + 1]}

    The last bin includes its upper edge, as numpy's does. What lies outside of the edges counts nowhere, nor does NaN.
    The logarithm is that of float64. Counts are exact: each edge is turned into the smallest magnitude that reaches it,
    so that no logarithm of a value is taken, and neither the backend nor the order of the values makes a difference.
    The values are read once.

    Args:
        values: Any shape, floating.
        edges: ``[B + 1]``, floating, none below the one before; converted to float64. On any device.
        backend: See :mod:`fishkern.backend`.

    Returns:
        ``[B]``, int64, on the device of the values.

    Raises:
        ValueError: The values are not floating; or the edges are fewer than two, fall, or are NaN.
        BackendUnavailableError: ``backend="triton"`` cannot run on these tensors.
    """
    if not values.is_floating_point():
        raise ValueError(f"values must be of a floating dtype, got {values.dtype}: cast them.")
    if edges.ndim != 1 or len(edges) < 2 or not edges.is_floating_point():
        raise ValueError(f"edges must be [B + 1], floating, at least two; got {edges.dtype} {tuple(edges.shape)}.")
    edges = edges.detach().to("cpu", torch.float64)
    if not bool((edges.diff() >= 0).all()):
        raise ValueError(f"edges must not fall nor be NaN, got {edges.tolist()}.")
    return choose(log_histogram_torch, backend, values)(values.detach(), edges)


def log_histogram_torch(values: Tensor, edges: Tensor) -> Tensor:
    """Compute :func:`log_histogram` in plain PyTorch."""
    return count_below(values, log_keys(edges, key_dtype(values.dtype)).to(values.device)).diff()


def log_keys(edges: Tensor, integer: torch.dtype) -> Tensor:
    """Find the keys of the smallest magnitudes whose logarithm reaches the edges of a histogram, or exceeds the last.

    Args:
        edges: ``[E]``, float64, on the CPU.
        integer: Of the keys, see :mod:`fishkern.ops.magnitudes`.

    Returns:
        ``[E]``.
    """
    about = (10.0**edges - SMALLEST).clamp_(min=0)
    return keys_reaching(edges, log_magnitude, about, integer)


def log_magnitude(values: Tensor) -> Tensor:
    """Take the logarithm of magnitudes.

    Args:
        values: Floating, any shape.

    Returns:
        log10(|x| + 1e-12), float64.
    """
    return (values.double().abs() + SMALLEST).log10()
