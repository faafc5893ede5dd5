"""Sums of squares along rank-one directions of a linear layer's weight: of both factors, and of the gradient."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fishkern.backend import Backend, choose
from fishkern.ops._arguments import check_linear
from fishkern.ops._tiles import TILE_ENTRIES, TILE_ENTRIES_ON_GPU, spans
from fishkern.ops.dtypes import accumulates_in
from fishkern.steps import Step, copied, in_one_step

# Directions that are projected on at a time: fewer make slow matrix products on a CPU, more leave fewer positions room.
_DIRECTIONS = 768


def project_sum_squared(
    activations: Tensor,
    output_grads: Tensor,
    V: Tensor,
    U: Tensor,
    *,
    counted: Tensor | None = None,
    allow_tf32: bool = False,
    backend: Backend | None = None,
) -> Tensor:
    """Sum the squares of a linear layer's activations, output gradients and gradients along rank-one directions.

    Direction ``k`` of the weight ``[O, I]`` is ``U[:, k] V[:, k]^T``. With the projections ``h[n, t, k] =
    sum_i activations[n, t, i] * V[i, k]`` and ``d[n, t, k] = sum_o output_grads[n, t, o] * U[o, k]``

        out[0, k] = sum_{n, t: counted[n, t]} h[n, t, k]^2
        out[1, k] = sum_{n, t: counted[n, t]} d[n, t, k]^2
        out[2, k] = sum_n ( sum_t h[n, t, k] * d[n, t, k] )^2

    The last is the square of the per-example weight gradient's product with the direction, ``<G_n, U_k V_k^T>^2``,
    summed over examples: the diagonal of the Fisher in these directions. The product of the means behind the first two
    is its Kronecker-factored estimate, ``v^T E[a a^T] v * u^T E[g g^T] u`` (Martens and Grosse, 2015,
    arXiv:1503.05671), without the two covariances ``[I, I]`` and ``[O, O]``, and without an eigenbasis of them.

    The cost is that of two matrix products, ``N T K (I + O)`` multiplications. Products are summed and squared in
    float32 (float64 where an input is float64), also for 16-bit inputs. The projections ``[N, T, K]`` are never stored:
    the reference holds 8 MiB of float32 at a time on a CPU, 32 MiB on a GPU, and as much again for each float32 copy of
    what it works on, of 16-bit factors and of 16-bit directions. Nothing is recorded for autograd.

    Args:
        activations: Inputs of the layer, ``[N, T, I]``, floating. Values in padded positions do not matter if these are
            not counted, as long as their projections are finite and ``output_grads`` is zero there.
        output_grads: Gradient of the **summed** loss by the outputs of the layer, ``[N, T, O]``, same dtype and device.
        V: Directions of the inputs, ``[I, K]``, any floating dtype, same device; of any length.
        U: Directions of the outputs, ``[O, K]``, dtype of ``V``, same device; of any length.
        counted: ``[N, T]``, bool, same device: the positions that the first two rows sum over. ``None``: all. The third
            sums over all positions, since the gradient of an example does.
        allow_tf32: Whether a kernel may round float32 inputs to tf32, with 10 bits of mantissa, which matrix units
            multiply faster. The reference ignores it.
        backend: ``None`` for the ambient choice, see :mod:`fishkern.backend`.

    Returns:
        ``[3, K]``; float32 (float64 if any input is float64). Never negative.

    Raises:
        ValueError: Shapes, dtypes or devices are not as described.
        BackendUnavailableError: Triton was named, and cannot run.
    """
    check_linear(activations, output_grads, None)
    _check_directions(activations, output_grads, V, U)
    _check_counted(activations, counted)
    masks = () if counted is None else (counted,)
    run = choose(project_sum_squared_torch, backend, activations, output_grads, V, U, *masks)
    return run(activations, output_grads, V, U, counted=counted, allow_tf32=allow_tf32)


def _described(
    activations: Tensor,
    output_grads: Tensor,
    V: Tensor,
    U: Tensor,
    *,
    counted: Tensor | None = None,
    allow_tf32: bool = False,
) -> Step:
    """Describe a call of the reference: its first directions, examples and positions take the most memory."""
    dtype = accumulates_in(torch.promote_types(activations.dtype, V.dtype))
    N, T, I = activations.shape
    O, K = U.shape
    total = torch.zeros(3, K, dtype=dtype, device=V.device)
    if not N * T * K:
        return Step(total, 0, 0)
    columns, positions = next(_directions(K, V.device))
    n = next(spans(N, max(1, positions // T))).stop
    t = next(spans(T, positions)).stop
    k, rows = columns.stop, n * t
    one = rows * k * dtype.itemsize  # projections on one side

    def projecting(factors: Tensor, directions: Tensor) -> int:
        F = factors.shape[-1]
        f = next(_features(F, rows, k, V.device)).stop if F else 0
        # examples and positions may be one axis without a copy, unless these are a part of several examples' positions
        viewed = n == 1 or (t == T and factors.stride(0) == T * factors.stride(1))
        features = 0 if viewed and factors.dtype == dtype else rows * f * dtype.itemsize
        return one + features + copied(directions, dtype, f * k)

    sums = n * k * dtype.itemsize
    masks = 0 if counted is None else 2 * one + rows
    first, second = projecting(activations, V), one + projecting(output_grads, U)
    scratch = sums + max(first, second, 3 * one + sums, masks)
    return Step(total, scratch, 2 * N * T * K * (I + O))


@in_one_step(_described)
@torch.no_grad()
def project_sum_squared_torch(
    activations: Tensor,
    output_grads: Tensor,
    V: Tensor,
    U: Tensor,
    *,
    counted: Tensor | None = None,
    allow_tf32: bool = False,
) -> Tensor:
    """Compute :func:`project_sum_squared` in plain PyTorch, some directions and examples after the other."""
    dtype = accumulates_in(torch.promote_types(activations.dtype, V.dtype))
    N, T, _ = activations.shape
    K = V.shape[1]
    total = torch.zeros(3, K, dtype=dtype, device=V.device)
    if not N * T * K:
        return total
    for columns, positions in _directions(K, V.device):
        sums, v, u = total[:, columns], V[:, columns], U[:, columns]
        for examples in spans(N, max(1, positions // T)):
            part = None if counted is None else counted[examples]
            _add_(sums, activations[examples], output_grads[examples], v, u, part, positions)
    return total


def _directions(K: int, device: torch.device) -> Iterator[tuple[slice, int]]:
    """Yield some directions after the other, and the number of positions with room for their projections."""
    for columns in spans(K, _DIRECTIONS):
        # both projections and their products
        yield columns, max(1, _most(device) // (3 * (columns.stop - columns.start)))


def _features(F: int, rows: int, K: int, device: torch.device) -> Iterator[slice]:
    """Yield so many features at a time as there is room for in copies of ``rows`` positions and ``K`` directions."""
    return spans(F, max(1, _most(device) // max(rows, K)))


def _most(device: torch.device) -> int:
    return TILE_ENTRIES if device.type == "cpu" else TILE_ENTRIES_ON_GPU


def _add_(total: Tensor, x: Tensor, g: Tensor, v: Tensor, u: Tensor, counted: Tensor | None, positions: int) -> None:
    """Add the sums of some examples; of one that is longer than ``positions``, a part after the other."""
    joint = total.new_zeros(len(x), v.shape[1])
    for part in spans(x.shape[1], positions):
        # projections end with the call, before there are others
        _add_positions_(total, joint, x[:, part], g[:, part], v, u, None if counted is None else counted[:, part])
    total[2] += joint.square_().sum(0)


def _add_positions_(
    total: Tensor, joint: Tensor, x: Tensor, g: Tensor, v: Tensor, u: Tensor, counted: Tensor | None
) -> None:
    h, d = _project(x, v, total.dtype), _project(g, u, total.dtype)  # [n, t, K]
    joint += (h * d).sum(1)
    if counted is not None:
        # Before squaring: squares of what is in padded positions may be infinite.
        left_out = ~counted[..., None]
        h.masked_fill_(left_out, 0)
        d.masked_fill_(left_out, 0)
    total[0] += h.square_().sum((0, 1))
    total[1] += d.square_().sum((0, 1))


def _project(factors: Tensor, directions: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply ``[n, t, F]`` by ``[F, K]``, so many features at a time as there is room for copies in ``dtype``."""
    n, t, F = factors.shape
    K = directions.shape[1]
    if F == 0:
        return torch.zeros(n, t, K, dtype=dtype, device=factors.device)
    projections = torch.empty(n * t, K, dtype=dtype, device=factors.device)
    for features in _features(F, n * t, K, factors.device):
        beta = int(features.start > 0)  # what is there before the first is not read
        # In place, which autocast leaves alone. No name for the copies: they would be alive beside the next ones.
        torch.addmm(
            projections,
            factors[..., features].to(dtype).flatten(0, 1),
            directions[features].to(dtype),
            beta=beta,
            out=projections,
        )
    return projections.view(n, t, K)


def _check_directions(activations: Tensor, output_grads: Tensor, V: Tensor, U: Tensor) -> None:
    I, O = activations.shape[-1], output_grads.shape[-1]
    if V.ndim != 2 or U.ndim != 2 or V.shape[1] != U.shape[1] or (V.shape[0], U.shape[0]) != (I, O):
        raise ValueError(
            f"V must be [I, K] and U [O, K] for activations with I = {I} features and output_grads with O = {O}, "
            f"got {tuple(V.shape)} and {tuple(U.shape)}: pass one column of each for every direction."
        )
    if V.dtype != U.dtype or not V.is_floating_point():
        raise ValueError(f"V and U must have the same floating dtype, got {V.dtype} and {U.dtype}: cast one of them.")
    if not V.device == U.device == activations.device:
        raise ValueError(
            f"V and U must be on the device of the activations, {activations.device}, got {V.device} and {U.device}: "
            "move them there."
        )


def _check_counted(activations: Tensor, counted: Tensor | None) -> None:
    if counted is None:
        return
    if counted.shape != activations.shape[:2] or counted.dtype != torch.bool or counted.device != activations.device:
        raise ValueError(
            f"counted must be {tuple(activations.shape[:2])}, torch.bool, on {activations.device}, got "
            f"{tuple(counted.shape)}, {counted.dtype}, on {counted.device}: pass True for each position that counts."
        )
