"""Sum over examples of the squared weight gradients of several linear layers, of which a position passes only some."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from fishkern.arguments import at_least
from fishkern.backend import Backend, choose
from fishkern.ops._arguments import accumulator, check_linear
from fishkern.ops.sum_grad_squared import sum_grad_squared_torch
from fishkern.steps import Step, in_one_step


def expert_sum_grad_squared(
    activations: Tensor,
    output_grads: Tensor,
    num_experts: int,
    *,
    expert: Tensor,
    offsets: Tensor,
    out: Tensor | None = None,
    allow_tf32: bool = False,
    backend: Backend | None = None,
) -> Tensor:
    """Sum the squared per-example weight gradients of the experts of a layer.

    A router sends a position as a row to some of ``E`` experts, each with a weight of its own, ``y = x W[e]^T``. The
    rows are sorted by expert, and by example within each, so that those of one expert and one example lie next to each
    other: a group. An expert's gradient in an example is a sum over the rows of their group, and the square is taken
    after that sum:

        out[e, o, i] = sum_{u: expert[u] = e} ( sum_{s in group u} output_grads[s, o] * activations[s, i] )^2

    It is :func:`fishkern.ops.sum_grad_squared` of every expert, in one launch of a kernel, and what is said there of
    dtypes and memory holds here. An expert without rows gets nothing. The kernel does not split the rows of an expert
    over programs, so experts whose layers are small are fast only where the rows are spread over many of them.

    Args:
        activations: Inputs of the layers, ``[S, I]``, floating.
        output_grads: Gradient of the **summed** loss by the outputs of the layers, ``[S, O]``, same dtype and device.
        num_experts: ``E``.
        expert: Expert of each group, ``[U]``, int64 or int32, ascending, from 0 to ``E - 1``. Groups of one expert are
            those of its several examples. On the CPU it spares a synchronisation.
        offsets: ``[U + 1]``, int64 or int32, ascending from 0 to ``S``: group ``u`` has the rows ``offsets[u]`` to
            ``offsets[u + 1] - 1``, possibly none. On the CPU they spare a synchronisation.
        out: ``[E, O, I]``, of the result's dtype, any strides that give each entry its place: the sum is added to it,
            in place. ``None``: to zeros.
        allow_tf32: As for :func:`fishkern.ops.sum_grad_squared`.
        backend: ``None`` for the ambient choice, see :mod:`fishkern.backend`.

    Returns:
        ``out``, or a new ``[E, O, I]``; float32 (float64 for float64 inputs).

    Raises:
        ValueError: Shapes, dtypes or devices are not as described, ``offsets`` do not ascend from 0 to ``S``,
            ``expert`` does not ascend within 0 to ``E - 1``, or entries of ``out`` share a place.
        TypeError: ``num_experts`` is not an integer.
        BackendUnavailableError: Triton was named, and cannot run.
    """
    num_experts = at_least(0, num_experts, "num_experts")
    check_linear(activations, output_grads, offsets)
    _check_experts(expert, num_experts, len(offsets) - 1)
    given = [] if out is None else [out]
    if out is not None:
        accumulator(out, (num_experts, output_grads.shape[-1], activations.shape[-1]), output_grads)
    run = choose(expert_sum_grad_squared_torch, backend, activations, output_grads, *given)
    return run(activations, output_grads, num_experts, expert=expert, offsets=offsets, out=out, allow_tf32=allow_tf32)


def _check_experts(expert: Tensor, num_experts: int, num_groups: int) -> None:
    if expert.shape != (num_groups,) or expert.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"expert must be [{num_groups}], a number for each group that offsets describe, int64 or int32; got "
            f"{tuple(expert.shape)}, {expert.dtype}."
        )
    numbers = expert.tolist()
    if numbers != sorted(numbers):
        raise ValueError("expert must ascend: sort the rows by expert, and by example within each.")
    if numbers and not 0 <= numbers[0] <= numbers[-1] < num_experts:
        raise ValueError(
            f"expert must be from 0 to num_experts - 1 = {num_experts - 1}, got {numbers[0]} to {numbers[-1]}: leave "
            "rows that no expert gets out."
        )


def _described(
    activations: Tensor,
    output_grads: Tensor,
    num_experts: int,
    *,
    expert: Tensor,
    offsets: Tensor,
    out: Tensor | None = None,
    allow_tf32: bool = False,
) -> Step:
    """Describe a call of the reference: experts come one after the other."""
    total = accumulator(out, (num_experts, output_grads.shape[-1], activations.shape[-1]), output_grads)
    flops = scratch = 0
    for e, rows, lengths in _by_expert(expert, offsets):
        x, g = activations[rows], output_grads[rows]
        alone = lengths.count(1)
        copied = 0 < alone < len(lengths)  # the rows of both kinds, one after the other
        row = copied * (x.shape[-1] + g.shape[-1]) * x.element_size()
        for x_part, g_part, parts in (
            (x[:alone, None], g[:alone, None], None), (x[alone:], g[alone:], _offsets(lengths))
        ):  # fmt: skip
            if len(x_part):
                step = sum_grad_squared_torch.describe(x_part, g_part, offsets=parts, out=total[e])
                scratch = max(scratch, step.scratch + len(x_part) * row)
                flops += step.flops
    return Step(total, scratch, flops)


@in_one_step(_described)
@torch.no_grad()
def expert_sum_grad_squared_torch(
    activations: Tensor,
    output_grads: Tensor,
    num_experts: int,
    *,
    expert: Tensor,
    offsets: Tensor,
    out: Tensor | None = None,
    allow_tf32: bool = False,
) -> Tensor:
    """Compute :func:`expert_sum_grad_squared` in plain PyTorch, one expert after the other."""
    total = accumulator(out, (num_experts, output_grads.shape[-1], activations.shape[-1]), output_grads)
    for e, rows, lengths in _by_expert(expert, offsets):
        _add_expert_(total[e], activations[rows], output_grads[rows], lengths)
    return total


def _by_expert(expert: Tensor, offsets: Tensor) -> Iterator[tuple[int, slice, list[int]]]:
    """List the experts that got rows: number, rows, and the lengths of their groups, without those of no row."""
    firsts, group = offsets.tolist(), 0
    for e, count in sorted(Counter(expert.tolist()).items()):
        of_expert = firsts[group : group + count + 1]
        lengths = [last - first for first, last in pairwise(of_expert) if last > first]
        if lengths:
            yield e, slice(of_expert[0], of_expert[-1]), lengths
        group += count


def _add_expert_(total: Tensor, x: Tensor, g: Tensor, lengths: list[int]) -> None:
    """Add the squares of one expert. Where an example has one row, ``(g x)^2 = g^2 x^2``: one product for all these."""
    alone = [length == 1 for length in lengths for _ in range(length)]
    if all(alone):
        sum_grad_squared_torch(x[:, None], g[:, None], out=total)
        return
    if any(alone):
        marks = torch.tensor(alone)
        rows = marks.nonzero()[:, 0].to(x.device)
        sum_grad_squared_torch(x[rows, None], g[rows, None], out=total)
        rows = marks.logical_not_().nonzero()[:, 0].to(x.device)
        x, g = x[rows], g[rows]
    sum_grad_squared_torch(x, g, offsets=_offsets(lengths), out=total)


def _offsets(lengths: list[int]) -> Tensor:
    """Where groups of several rows begin, once those of one row are taken out."""
    return torch.tensor([0, *(length for length in lengths if length > 1)]).cumsum(0)
