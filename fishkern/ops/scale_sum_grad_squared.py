"""Sum over examples of the squared gradient of a scale or a shift, which has an entry for each feature."""

from __future__ import annotations

from math import isfinite
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from fishkern.backend import Backend, choose
from fishkern.ops._arguments import accumulator

Norm = Literal["rms", "layer"]
"""What divides each position by its root mean square, or takes its mean away before that."""

_ROUNDED_TO = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Entries of the inputs that are worked on at a time, so that they stay in the cache of a processor.
_AT_ONCE = 2**17
# On a GPU the caches are larger, and each piece costs launches.
_AT_ONCE_ON_GPU = 2**24


def scale_sum_grad_squared(
    inputs: Tensor | None,
    output_grads: Tensor,
    *,
    norm: Norm | None = None,
    eps: float = 0.0,
    rounded_to: torch.dtype | None = None,
    out: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Sum the squared per-example gradients of a scale, such as the weight of a norm, or of a shift.

    The output of a scale is ``w[d] * factor[n, t, d]``, so its gradient in an example is a sum over positions, and the
    square is taken after that sum:

        out[d] = sum_n ( sum_t output_grads[n, t, d] * factor[n, t, d] )^2

    The factors are the inputs, or what a norm makes of each position:

        norm="rms"      x / sqrt(mean(x^2) + eps)               Zhang and Sennrich, 2019, arXiv:1910.07467
        norm="layer"    (x - mean(x)) / sqrt(var(x) + eps)      Ba et al., 2016, arXiv:1607.06450; var is biased

    Without inputs all factors are 1, which gives the squares of a shift, a bias. Inputs and output gradients are read
    once, and nothing of their size is stored. Factors, sums and squares are float32 (float64 for float64 output
    gradients), also of 16-bit inputs. The order of every sum is fixed. Nothing is recorded for autograd.

    Args:
        inputs: ``[N, T, D]``, floating, same device; or ``None``. Values in padded positions do not matter as long as
            their factors are finite and ``output_grads`` is zero there.
        output_grads: Gradient of the **summed** loss by what the scale gives, ``[N, T, D]``, floating.
        norm: What makes the factors of the inputs; ``None`` where they are the inputs themselves.
        eps: Of the norm, added to the mean square or the variance.
        rounded_to: Floating dtype of 16, 32 or 64 bits that a module rounds its normalised inputs to before they are
            scaled; ``None`` for none.
        out: ``[D]``, of the result's dtype, any stride that gives each entry its place: the sum is added to it, in
            place. ``None``: to zeros.
        backend: ``None`` for the ambient choice, see :mod:`fishkern.backend`.

    Returns:
        ``out``, or a new ``[D]``; float32 (float64 for float64 output gradients).

    Raises:
        ValueError: Shapes, dtypes, devices or options are not as described.
        BackendUnavailableError: Triton was named, and cannot run.
    """
    _check(inputs, output_grads, norm, eps, rounded_to)
    if out is not None:
        accumulator(out, output_grads.shape[-1:], output_grads)
    tensors = [tensor for tensor in (inputs, output_grads, out) if tensor is not None]
    run = choose(scale_sum_grad_squared_torch, backend, *tensors)
    return run(inputs, output_grads, norm=norm, eps=eps, rounded_to=rounded_to, out=out)


def scale_factors(
    inputs: Tensor, dtype: torch.dtype, *, norm: Norm | None, eps: float, rounded_to: torch.dtype | None
) -> Tensor:
    """Form the factors of :func:`scale_sum_grad_squared`.

    Args:
        inputs: ``[..., D]``.
        dtype: In which to compute.
        norm: See :func:`scale_sum_grad_squared`, as all that follows.
        eps: Of the norm.
        rounded_to: What the factors are rounded to.

    Returns:
        ``[..., D]``, of ``dtype``; the inputs themselves where nothing changes them.
    """
    factors = inputs.to(dtype)
    if norm == "layer":
        factors = F.layer_norm(factors, factors.shape[-1:], eps=eps)
    elif norm == "rms":
        # the norm needs no tensor for the squares
        mean_square = torch.linalg.vector_norm(factors, dim=-1, keepdim=True).square_().div_(inputs.shape[-1])
        factors = factors * mean_square.add_(eps).rsqrt_()
    return factors if rounded_to is None else factors.to(rounded_to).to(dtype)


@torch.no_grad()
def scale_sum_grad_squared_torch(
    inputs: Tensor | None,
    output_grads: Tensor,
    *,
    norm: Norm | None = None,
    eps: float = 0.0,
    rounded_to: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Compute :func:`scale_sum_grad_squared` in plain PyTorch, some examples at a time."""
    total = accumulator(out, output_grads.shape[-1:], output_grads)
    if output_grads.numel() == 0:
        return total
    n = _examples_at_once(output_grads)
    for first in range(0, len(output_grads), n):
        terms = output_grads[first : first + n]
        if inputs is not None:
            x = inputs[first : first + n]
            terms = _products(scale_factors(x, total.dtype, norm=norm, eps=eps, rounded_to=rounded_to), x, terms)
        total += terms.sum(1, dtype=total.dtype).square_().sum(0)
    return total


def _products(factors: Tensor, inputs: Tensor, output_grads: Tensor) -> Tensor:
    """Multiply, in place where the factors are a tensor of their own."""
    if factors.data_ptr() == inputs.data_ptr():
        return factors * output_grads
    return factors.mul_(output_grads)


def _examples_at_once(output_grads: Tensor) -> int:
    N, T, D = output_grads.shape
    entries = _AT_ONCE if output_grads.device.type == "cpu" else _AT_ONCE_ON_GPU
    return min(N, max(1, entries // max(T * D, 1)))


def _check(
    inputs: Tensor | None, output_grads: Tensor, norm: str | None, eps: float, rounded_to: torch.dtype | None
) -> None:
    if output_grads.ndim != 3 or not output_grads.is_floating_point():
        raise ValueError(
            f"output_grads must be [N, T, D], floating, got {tuple(output_grads.shape)}, {output_grads.dtype}: flatten "
            "all axes between the examples and the features to one."
        )
    if norm not in (None, *get_args(Norm)):
        raise ValueError(f'norm must be "rms", "layer" or None, got {norm!r}.')
    if not (eps >= 0 and isfinite(eps)):
        raise ValueError(f"eps must be a number, 0 or more, got {eps}.")
    if rounded_to not in (None, *_ROUNDED_TO):
        raise ValueError(f"rounded_to must be None or one of {', '.join(map(str, _ROUNDED_TO))}, got {rounded_to}.")
    if inputs is None:
        if norm is not None or rounded_to is not None:
            raise ValueError("norm and rounded_to need inputs, got None: pass the input of the norm.")
        return
    if inputs.shape != output_grads.shape or not inputs.is_floating_point():
        raise ValueError(
            f"inputs must be as output_grads, {tuple(output_grads.shape)}, and floating, got {tuple(inputs.shape)}, "
            f"{inputs.dtype}."
        )
    if inputs.device != output_grads.device:
        raise ValueError(
            f"inputs and output_grads must be on one device, got {inputs.device} and {output_grads.device}: move one "
            "to the other's."
        )
