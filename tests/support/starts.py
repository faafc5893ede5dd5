"""Starts of adapters, made by hand from the singular directions of a model's weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from fishkern.digests import digest
from fishkern.initialization import AdapterInit, ModuleInit
from fishkern.layers import linear_maps

HEADS = ("lm_head", "classifier", "cls", "score")


def start_of(
    model: nn.Module,
    rank: Callable[[int], int] = lambda n: 1 + n % 5,
    *,
    scaling: float = 2.0,
    only: Callable[[str], bool] = lambda path: not path.startswith(HEADS),
) -> AdapterInit:
    """Take the largest directions of every other linear module, and the smallest of the rest.

    Args:
        model: Any model.
        rank: The rank of the n-th module.
        scaling: Of all modules.
        only: Which modules, by their paths.
    """
    modules, digests = {}, {}
    for n, one in enumerate(one for one in linear_maps(model).values() if only(one.path)):
        matrix = one.matrix()
        U, sigma, V = torch.linalg.svd(matrix.float(), full_matrices=False)
        chosen = torch.arange(len(sigma))[: rank(n)] if n % 2 else torch.arange(len(sigma))[-rank(n) :]
        size = (sigma[chosen] / scaling).sqrt()
        modules[one.path] = ModuleInit(
            A=size[:, None] * V[chosen], B=U[:, chosen] * size, scaling=scaling, chosen=chosen
        )
        digests[one.path] = digest(matrix)
    return AdapterInit(modules, digests=digests)
