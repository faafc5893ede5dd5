"""Sum over examples of the squared weight gradient of a linear layer."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fishkern.backend import Backend, choose
from fishkern.ops._arguments import accumulator, check_apart, check_linear
from fishkern.ops._tiles import tiles
from fishkern.steps import Step, copied, in_one_step

# Up to this size a matrix product costs no more than its call, so that several examples share one call.
_SMALL_TILE = 2**15
_EXAMPLES_PER_CALL = 16
# Of examples with one position, so many are squared at a time.
_SQUARED_AT_ONCE = 1024


def sum_grad_squared(
    activations: Tensor,
    output_grads: Tensor,
    *,
    offsets: Tensor | None = None,
    out: Tensor | None = None,
    grad_out: Tensor | None = None,
    allow_tf32: bool = False,
    backend: Backend | None = None,
) -> Tensor:
    """Sum the squared per-example weight gradients of a linear layer.

    Example ``n`` passes ``T`` positions through ``y = x W^T``, so its weight gradient is a sum over positions, and the
    square is taken after that sum:

        out[o, i] = sum_n ( sum_t output_grads[n, t, o] * activations[n, t, i] )^2

    Divided by the number of examples this is the layer's block of the diagonal Fisher; which Fisher depends on the
    labels behind ``output_grads`` (Kunstner et al., 2019, arXiv:1905.12558). It is neither the square of the batch
    gradient nor a sum over single positions (:func:`fishkern.ops.sum_position_grad_squared`).

    Under ``torch.compile`` it is one node of the graph, which runs as here.

    Products are summed and squared in float32 (float64 for float64 inputs), also for 16-bit inputs, whose squares would
    underflow. The per-example gradients ``[N, O, I]`` are never stored: the reference holds 8 MiB of float32 at a time
    on a CPU, 32 MiB on a GPU, and of 16-bit inputs a float32 copy of the examples and columns that it works on. Nothing
    is recorded for autograd.

    Args:
        activations: Inputs of the layer, ``[N, T, I]``, floating. Values in padded positions do not matter as long as
            they are finite and ``output_grads`` is zero there.
        output_grads: Gradient of the **summed** loss by the outputs of the layer, ``[N, T, O]``, same dtype and device.
        offsets: ``[N + 1]``, int64 or int32, ascending from 0 to ``S``: then ``activations`` is ``[S, I]`` and
            ``output_grads`` is ``[S, O]``, the examples packed one after the other, and example ``n`` has the positions
            ``offsets[n]`` to ``offsets[n + 1] - 1``, possibly none. On the CPU they spare a synchronisation.
        out: ``[O, I]``, of the result's dtype, any strides that give each entry its place: the sum is added to it, in
            place. ``None``: to zeros.
        grad_out: ``[O, I]``, of the result's dtype, any strides, not overlapping ``out``: the sum of the gradients
            themselves, ``sum_n sum_t output_grads[n, t, o] * activations[n, t, i]``, is added to it in the same pass.
        allow_tf32: Whether a kernel may round float32 inputs to tf32, with 10 bits of mantissa, which matrix units
            multiply faster. The reference ignores it.
        backend: ``None`` for the ambient choice, see :mod:`fishkern.backend`.

    Returns:
        ``out``, or a new ``[O, I]``; float32 (float64 for float64 inputs).

    Raises:
        ValueError: Shapes, dtypes or devices are not as described, ``offsets`` do not ascend from 0 to ``S``, or
            entries of the results share a place.
        BackendUnavailableError: Triton was named, and cannot run.
    """
    if torch.compiler.is_compiling():
        if out is None:
            dtype = torch.promote_types(output_grads.dtype, torch.float32)
            out = output_grads.new_zeros(output_grads.shape[-1], activations.shape[-1], dtype=dtype)
        torch.ops.fishkern.sum_grad_squared_(out, grad_out, activations, output_grads, offsets, allow_tf32, backend)
        return out
    check_linear(activations, output_grads, offsets)
    results = {name: tensor for name, tensor in (("out", out), ("grad_out", grad_out)) if tensor is not None}
    for name, tensor in results.items():
        accumulator(tensor, (output_grads.shape[-1], activations.shape[-1]), output_grads, name)
    if len(results) == 2:
        check_apart(out, grad_out, "out and grad_out")
    run = choose(sum_grad_squared_torch, backend, activations, output_grads, *results.values())
    return run(activations, output_grads, offsets=offsets, out=out, grad_out=grad_out, allow_tf32=allow_tf32)


def _described(
    activations: Tensor,
    output_grads: Tensor,
    *,
    offsets: Tensor | None = None,
    out: Tensor | None = None,
    grad_out: Tensor | None = None,
    allow_tf32: bool = False,
) -> Step:
    """Describe a call of the reference: no tile takes more memory than the first."""
    O, I = output_grads.shape[-1], activations.shape[-1]
    total = accumulator(out, (O, I), output_grads)
    dtype, positions = total.dtype, activations[..., 0].numel()
    lengths = None if offsets is None else offsets.diff().tolist()
    N, T = activations.shape[:2] if lengths is None else (len(lengths), max(lengths, default=0))
    rows, columns = next(tiles(O, I, total.device))
    o, i = len(range(O)[rows]), len(range(I)[columns])
    single = lengths is None and T == 1
    if single:
        n = min(N, _SQUARED_AT_ONCE)
        scratch = copied(activations, dtype, n * (o + i)) + n * (o + i) * dtype.itemsize
    elif lengths is None and N > 1 and o * i <= _SMALL_TILE:
        n = min(N, _EXAMPLES_PER_CALL)
        scratch = (n + 1) * o * i * dtype.itemsize  # gradients, and the sum of their squares
        scratch = max(scratch, n * o * i * dtype.itemsize + copied(activations, dtype, n * T * (o + i)))
    else:
        scratch = o * i * dtype.itemsize + copied(activations, dtype, T * (o + i))
    products = 1 + (single and grad_out is not None)
    return Step(total, scratch, 2 * products * positions * O * I)


@in_one_step(_described)
@torch.no_grad()
def sum_grad_squared_torch(
    activations: Tensor,
    output_grads: Tensor,
    *,
    offsets: Tensor | None = None,
    out: Tensor | None = None,
    grad_out: Tensor | None = None,
    allow_tf32: bool = False,
) -> Tensor:
    """Compute :func:`sum_grad_squared` in plain PyTorch, one tile of the result after the other."""
    total = accumulator(out, (output_grads.shape[-1], activations.shape[-1]), output_grads)
    lengths = None if offsets is None else offsets.diff().tolist()
    scratch = None
    for rows, columns in tiles(*total.shape, total.device):
        tile, x, g = total[rows, columns], activations[..., columns], output_grads[..., rows]
        grad_sum = None if grad_out is None else grad_out[rows, columns]
        if lengths is None and x.shape[1] == 1:
            _add_single_positions_(tile, grad_sum, x[:, 0], g[:, 0])
        elif lengths is None and len(x) > 1 and tile.numel() <= _SMALL_TILE:
            _add_several_(tile, grad_sum, x, g)
        else:
            scratch = tile.new_empty(tile.numel()) if scratch is None else scratch  # no later tile is larger
            grad = scratch[: tile.numel()].view(tile.shape)
            if lengths is None:
                _add_each_(tile, grad_sum, x.unbind(), g.mT.unbind(), grad)
            else:
                _add_each_(tile, grad_sum, x.split(lengths), g.mT.split(lengths, dim=1), grad)
    return total


def _add_each_(tile: Tensor, grad_sum: Tensor | None, xs: Iterable[Tensor], gs: Iterable[Tensor], grad: Tensor) -> None:
    for x, g in zip(xs, gs, strict=True):  # [T, I], [O, T]
        if x.dtype != tile.dtype:
            x, g = x.to(tile.dtype), g.to(tile.dtype)
        torch.mm(g, x, out=grad)
        tile.addcmul_(grad, grad)
        if grad_sum is not None:
            grad_sum.add_(grad)


def _add_several_(tile: Tensor, grad_sum: Tensor | None, x: Tensor, g: Tensor) -> None:
    if tile.shape[0] > tile.shape[1]:  # the short side first: up to three times faster
        tile, grad_sum, x, g = tile.mT, None if grad_sum is None else grad_sum.mT, g, x
    grads = tile.new_empty(min(_EXAMPLES_PER_CALL, len(x)), *tile.shape)
    for x_part, g_part in zip(x.split(len(grads)), g.split(len(grads)), strict=True):  # [n, T, I], [n, T, O]
        part = torch.bmm(g_part.to(tile.dtype).mT, x_part.to(tile.dtype), out=grads[: len(x_part)])
        if grad_sum is not None:
            grad_sum.add_(part.sum(0))
        tile.add_(part.square_().sum(0))


def _add_single_positions_(tile: Tensor, grad_sum: Tensor | None, x: Tensor, g: Tensor) -> None:
    """Add ``(g x)^2 = g^2 x^2``, which is one matrix product for all examples."""
    for x_part, g_part in zip(x.split(_SQUARED_AT_ONCE), g.split(_SQUARED_AT_ONCE), strict=True):  # [N, I], [N, O]
        x_part, g_part = x_part.to(tile.dtype), g_part.to(tile.dtype)
        if grad_sum is not None:
            grad_sum.addmm_(g_part.mT, x_part)
        tile.addmm_(g_part.square().mT, x_part.square())
