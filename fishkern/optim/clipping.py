"""Clipping by the norm of the entries that move, which is not that of whole gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fishkern.hosts import Share
from fishkern.ops.dtypes import accumulates_in
from fishkern.optim.compact import Bucket

Work: TypeAlias = list[tuple[Bucket, dict[str, Any], list[Tensor | None]]]


def clipped(work: Work, max_norm: float) -> tuple[Work, Tensor | None, Tensor | None]:
    """Gather all gradients at the selected entries, and compute the factor to multiply them by.

    Where parameters are sharded this is a collective operation.

    Args:
        work: Buckets with their group and the gradients of their parameters, dense or gathered.
        max_norm: What the norm of all of them together is scaled down to.

    Returns:
        The work with gathered gradients ``[K]``, their norm, and the factor, at most 1; both zero-dimensional, on the
        device, and ``None`` where there is no gradient.
    """
    gathered = [
        (
            bucket,
            group,
            [
                grad if grad is None or grad.shape != parameter.shape else selected.gather(grad)
                for parameter, selected, grad in zip(bucket.params, bucket.selected, grads, strict=True)
            ],
        )
        for bucket, group, grads in work
    ]
    moving = [grad for *_, grads in gathered for grad in grads if grad is not None]
    if not moving:
        return work, None, None
    shares = [
        one.share
        for bucket, _, grads in gathered
        for one, grad in zip(bucket.selected, grads, strict=True)
        if grad is not None
    ]
    norm = _norm_of_all([g.to(accumulates_in(g.dtype)) for g in moving], shares)
    return gathered, norm, (max_norm / (norm + 1e-6)).clamp(max=1.0)


def _norm_of_all(grads: Sequence[Tensor], shares: Sequence[Share | None]) -> Tensor:
    """Compute the norm of gradients, of which the ranks of a share hold parts; what replicas hold counts once."""
    if all(share is None for share in shares):
        return torch.nn.utils.get_total_norm(grads)
    parts: dict[tuple[tuple[str, ...], tuple[str, ...]], tuple[Share | None, list[Tensor]]] = {}
    for grad, share in zip(grads, shares, strict=True):
        # meshes without names call their axes alike, and are over other ranks
        which = ((), ()) if share is None else (share.axes, tuple(group.group_name for group in share.groups))
        parts.setdefault(which, (share, []))[1].append(grad)
    squares = []
    for _, (share, own) in sorted(parts.items(), key=lambda part: part[0][0]):  # in one order on all ranks
        square = torch.nn.utils.get_total_norm(own).double().square().view(1)
        squares.append(square if share is None else share.gathered(square).sum(0, keepdim=True))
    return torch.cat([square.to(grads[0].device) for square in squares]).sum().sqrt().to(grads[0].dtype)
