"""Clipping by the norm of the entries that move, which is not that of whole gradients."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from fishkern.ops.dtypes import accumulates_in
from fishkern.optim.compact import Bucket

Work: TypeAlias = list[tuple[Bucket, dict[str, Any], list[Tensor | None]]]


def clipped(work: Work, max_norm: float) -> tuple[Work, Tensor | None, Tensor | None]:
    """Gather all gradients at the selected entries, and compute the factor to multiply them by.

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
    norm = torch.nn.utils.get_total_norm([g.to(accumulates_in(g.dtype)) for g in moving])
    return gathered, norm, (max_norm / (norm + 1e-6)).clamp(max=1.0)
