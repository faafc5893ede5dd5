"""A part of a parameter's per-example gradients: some columns of the matrix of its first axis and all others."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fishkern.layers.grads import EmbeddingGrads, OuterProductGrads, PerExampleGrads, SummedGrads, TiedRows
from fishkern.layers.packed_grads import PackedEmbeddingGrads, PackedOuterProductGrads

Columns = slice | Tensor
"""A slice, or indices ``[C]``."""


def columns_of(grads: PerExampleGrads, columns: Columns) -> PerExampleGrads | None:
    """Take some columns of every example's gradient, of a parameter seen as a matrix ``[shape[0], P / shape[0]]``.

    Args:
        grads: Gradients of the whole parameter.
        columns: Which.

    Returns:
        Gradients of shape ``[shape[0], C]``; ``None`` if the form cannot be cut without forming the whole.
    """
    if isinstance(grads, OuterProductGrads | PackedOuterProductGrads):
        rows = grads.output_grads.shape[-1]
        if len(grads.shape) < 2 or rows != grads.shape[0]:
            return None
        x = grads.activations[..., columns]
        return replace(grads, activations=x, shape=torch.Size((rows, x.shape[-1])))
    if isinstance(grads, EmbeddingGrads | PackedEmbeddingGrads):
        return replace(grads, output_grads=grads.output_grads[..., columns])
    if isinstance(grads, TiedRows):
        embedding = columns_of(grads.embedding, columns)
        return replace(grads, embedding=embedding, head_rows=grads.head_rows[:, columns])
    if isinstance(grads, SummedGrads):
        parts = [columns_of(use, columns) for use in grads.uses]
        return None if any(part is None for part in parts) else SummedGrads(tuple(parts))
    return None
