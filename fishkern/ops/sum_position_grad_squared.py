"""Sum over positions of the squared weight gradient terms of a linear layer."""

from __future__ import annotations

from torch import Tensor

from fishkern.ops._arguments import accumulator, check_factors
from fishkern.ops.sum_grad_squared import sum_grad_squared_torch


def sum_position_grad_squared(activations: Tensor, output_grads: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Sum the squares of the single positions' terms of a linear layer's weight gradient.

        out[o, i] = sum_n sum_t ( output_grads[n, t, o] * activations[n, t, i] )^2

    This is one matrix product, of the squares, and common in the literature. It is **not** the Fisher of token losses:
    a token's loss reaches the weight through every position before it, and the gradient of an example is squared after
    the sum over its positions (:func:`fishkern.ops.sum_grad_squared`).

    The squares are taken and summed in float32 (float64 for float64 inputs), also for 16-bit inputs. Nothing is
    recorded for autograd.

    Args:
        activations: Inputs of the layer, ``[N, T, I]``, floating; any leading sizes will do, ``[S, I]`` too.
        output_grads: Gradient of the **summed** loss by the outputs of the layer, ``[N, T, O]``, same leading sizes,
            dtype and device.
        out: ``[O, I]``, of the result's dtype, any strides: the sum is added to it, in place. ``None``: to zeros.

    Returns:
        ``out``, or a new ``[O, I]``; float32 (float64 for float64 inputs).

    Raises:
        ValueError: Shapes, dtypes or devices are not as described.
    """
    check_factors(activations, output_grads)
    total = accumulator(out, (output_grads.shape[-1], activations.shape[-1]), output_grads)
    x, g = activations.flatten(0, -2), output_grads.flatten(0, -2)
    return sum_grad_squared_torch(x[:, None], g[:, None], out=total)  # every position an example of its own
