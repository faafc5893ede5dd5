"""Selected rows, and whole parameters, stepped by torch's own fused updates: views, without indices or gathering."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fishkern.ops._entries import followed
from fishkern.optim.compact import Bucket


class FusedOperands(NamedTuple):
    """What a fused update of torch takes, one of each for each range of rows, or for a parameter's master.

    Attributes:
        weights: ``[n]`` each, changed in place.
        grads: ``[n]`` each, of the same dtype.
        state: By name ``[n]`` each, changed in place.
        steps: Which update this is, zero-dimensional.
    """

    weights: list[Tensor]
    grads: list[Tensor]
    state: dict[str, list[Tensor]]
    steps: list[Tensor]


FusedUpdate = Callable[..., None]  # (operands, *, first)


def step_fused(bucket: Bucket, grads: Sequence[Tensor | None], scale: Tensor | None, update: FusedUpdate) -> None:
    """Update the parameters of a bucket, whose steps are already counted.

    Args:
        bucket: Without indices.
        grads: The gradient of each parameter, of its shape or ``[K_i]``; ``None``: it stays as it is.
        scale: Zero-dimensional, what gradients are multiplied by; or ``None``.
        update: ``update(operands, first=first)`` does the step; ``first``: it is the first one of these entries.
    """
    for first in (True, False):
        numbers = [i for i, grad in enumerate(grads) if grad is not None and bucket.is_first(i) is first]
        if not numbers:
            continue
        operands = _operands(bucket, numbers, grads, scale)
        update(operands, first=first)
        if bucket.master is None:
            # Torch's fused update does not count its writes: a later backward through weights that have changed since
            # would raise no error.
            torch.autograd.graph.increment_version([bucket.params[i] for i in numbers])
        else:
            for i, weight in zip(numbers, operands.weights, strict=True):
                bucket.selected[i].entries.scatter_(bucket.params[i], weight)


def _operands(
    bucket: Bucket, numbers: Sequence[int], grads: Sequence[Tensor | None], scale: Tensor | None
) -> FusedOperands:
    operands = FusedOperands([], [], {name: [] for name in bucket.flat if name != "master"}, [])
    for i in numbers:
        param, selected, views = bucket.params[i], bucket.selected[i], bucket.views(i)
        if bucket.master is None:
            operands.weights.extend(bucket.param_views(i))
            operands.grads.extend(selected.views(grads[i].to(param.dtype)))
        else:  # a master is compact, so its ranges are one piece
            operands.weights.append(followed(views["master"][0], selected.gather(param)))
            grad = grads[i] if grads[i].shape != param.shape else selected.gather(grads[i])
            operands.grads.append(grad.to(bucket.master.dtype))
        for name, parts in operands.state.items():
            parts.extend(views[name])
        operands.steps.extend(views["step"])
    if scale is not None:
        return operands._replace(grads=torch._foreach_mul(operands.grads, scale))
    return operands
