"""Starts that know less, at the same sizes: what an informed start must beat."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch
from torch import Tensor, nn

from benchmarks.studies.starts.attach import Factors


def randomised(start: Mapping[str, Factors], seed: int) -> dict[str, Factors]:
    """Random orthonormal directions in place of the start's own; ranks and the norm of each direction stay."""
    draws = torch.Generator().manual_seed(seed)
    return {
        path: Factors(
            factors.A.norm(dim=1)[:, None] * orthonormal(factors.A.shape[1], len(factors.A), draws).T,
            factors.B.norm(dim=0) * orthonormal(len(factors.B), len(factors.A), draws),
            factors.scaling,
        )
        for path, factors in start.items()
    }


def orthonormal(size: int, count: int, draws: torch.Generator) -> Tensor:
    """``[size, count]``: random columns, orthogonal and of norm 1."""
    return torch.linalg.qr(torch.randn(size, count, generator=draws)).Q


def permuted(ranks: Mapping[str, int], groups: Mapping[str, Hashable], seed: int) -> dict[str, int]:
    """Deal the ranks of each group out to its members anew: the same ranks, at other matrices."""
    draws = torch.Generator().manual_seed(seed)
    dealt = {}
    for group in dict.fromkeys(groups[name] for name in ranks):
        names = [name for name in ranks if groups[name] == group]
        order = torch.randperm(len(names), generator=draws).tolist()
        dealt.update({name: ranks[names[n]] for name, n in zip(names, order, strict=True)})
    return {name: dealt[name] for name in ranks}


def smallest(modules: Mapping[str, nn.Linear], rank: int) -> dict[str, Factors]:
    """MiLoRA's start: the smallest singular values of each matrix, split between both factors."""
    starts = {}
    for path, module in modules.items():
        U, sigma, Vh = torch.linalg.svd(module.weight.detach().float(), full_matrices=False)
        root = sigma[-rank:].sqrt()
        starts[path] = Factors(root[:, None] * Vh[-rank:], U[:, -rank:] * root)
    return starts
