"""A reader of sparse patches of a checkpoint, written from the description of the interface alone."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor

KINDS = (torch.int32, torch.int64)


def write_patches(checkpoint: dict[str, Tensor], patches: Iterable[tuple]) -> int:
    """Write patches into the tensors of a checkpoint, in place, and check what an engine checks.

    Args:
        checkpoint: Its tensors by name.
        patches: Name, whole shape, dtype, values ``[K]``, flat indices ``[K]`` into the whole tensor.

    Returns:
        Bytes of values and indices.
    """
    seen, nbytes = set(), 0
    for name, shape, dtype, values, indices in patches:
        assert name not in seen, "each tensor once"
        seen.add(name)
        tensor = checkpoint[name]
        assert (tuple(tensor.shape), tensor.dtype, values.dtype) == (shape, dtype, dtype)
        assert values.ndim == indices.ndim == 1
        assert len(values) == len(indices) > 0
        assert indices.dtype in KINDS
        assert not values.isnan().any()
        where = indices.tolist()
        assert where[0] >= 0
        assert where[-1] < tensor.numel()
        assert all(a < b for a, b in pairwise(where)), "strictly increasing"
        rows = tensor.reshape(-1)
        for place, value in zip(where, values, strict=True):
            rows[place] = value
        checkpoint[name] = rows.view(shape)
        nbytes += values.nbytes + indices.nbytes
    return nbytes
