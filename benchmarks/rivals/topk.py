"""Ways to the places of the ``k`` largest scores of several tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fishkern.files import StoredTensor
from fishkern.ops import streaming_topk


def fishkern(scores: Sequence[Tensor | StoredTensor], k: int) -> list[Tensor]:
    """By tensor, the indices in it."""
    return streaming_topk(scores, k)


def cat_topk(scores: list[Tensor], k: int) -> list[Tensor]:
    """As FISH's published code does, with indices into the concatenation."""
    return [torch.cat(scores).topk(k).indices]


def kthvalue(scores: list[Tensor], k: int) -> list[Tensor]:
    """The exact threshold, and everything at or above it: more than ``k`` where there are ties."""
    flat = torch.cat(scores)
    threshold = flat.kthvalue(len(flat) - k + 1).values
    return [(block >= threshold).nonzero().view(-1) for block in scores]


def sampled_threshold(scores: list[Tensor], k: int) -> list[Tensor]:
    """Twelve lines that a good programmer writes: a bound from a sample, and topk of the scores that reach it.

    Not exact where the sample misleads, and blind to NaN and to ties.
    """
    n = sum(map(len, scores))
    sample = torch.cat([block[torch.randint(len(block), (len(block) // 1000,))] for block in scores])
    rank = int(len(sample) * (1 - k / n) - 6 * (len(sample) * k / n) ** 0.5)
    bound = sample.kthvalue(rank).values
    candidates = [(block >= bound).nonzero().view(-1) for block in scores]
    values = torch.cat([block[indices] for block, indices in zip(scores, candidates, strict=True)])
    largest = torch.zeros(len(values), dtype=torch.bool)
    largest[values.topk(k).indices] = True
    masks = largest.split([len(indices) for indices in candidates])
    return [indices[mask] for indices, mask in zip(candidates, masks, strict=True)]
