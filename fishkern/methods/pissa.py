"""PiSSA (Meng et al., NeurIPS 2024, arXiv:2404.02948): LoRA that starts from the largest components of the weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fishkern import hosts
from fishkern.arguments import at_least, positive
from fishkern.digests import digest
from fishkern.initialization import AdapterInit, ModuleInit
from fishkern.initialization.directions import VANISHES
from fishkern.initialization.targets import check_rank, linear_weights, targeted
from fishkern.layers import linear_maps
from fishkern.selection.base import Patterns
from fishkern.statistics.bases import svd_directions


def pissa(
    model: nn.Module,
    *,
    rank: int = 16,
    targets: Patterns | None = None,
    scaling: float = 1.0,
    progress: Callable[[int, int | None], None] | None = None,
) -> AdapterInit:
    """Make the start of a LoRA adapter by PiSSA: the ``rank`` largest singular values of each weight, without data.

    The start is ``scaling * B A = sum_i sigma_i u_i v_i^T``. Unlike PEFT's ``init_lora_weights="pissa"`` it leaves the
    frozen weights alone, since :func:`fishkern.integrations.lora.attach_init` runs the negative start beside them; it
    is also made for weights that are stored in 16 bits or quantised.

    Args:
        model: A model without an adapter. Nothing is changed in it.
        rank: Components of each weight.
        targets: Patterns of weights or modules, ``"*.q_proj"`` or ``"q_proj"``; ``None`` for every linear weight in
            the layers.
        scaling: alpha / rank of every module. It is compensated for in the factors.
        progress: Called with the number of weights done and of all.

    Returns:
        The start of each module.

    Raises:
        TypeError: ``rank`` is not an integer, or ``scaling`` is not a number.
        ValueError: ``rank`` is below 1 or above what a weight has, ``scaling`` is not positive, or a pattern matches
            nothing.
        UnsupportedModuleError: The model has an adapter already.
    """
    rank = at_least(1, rank, "rank")
    scaling = positive(scaling, "scaling")
    layers = linear_weights(model)
    names = list(layers) if targets is None else targeted(layers, targets)
    maps = linear_maps(hosts.unwrap(model))
    for name in names:
        check_rank(name, rank, maps[name].shape)
    starts: dict[str, ModuleInit] = {}
    digests: dict[str, tuple[float, float]] = {}
    for number, name in enumerate(names, start=1):
        matrix = maps[name].matrix()
        starts[maps[name].path] = _start(name, matrix, rank, scaling)
        digests[maps[name].path] = digest(matrix)
        if progress:
            progress(number, len(names))
    method = {"name": "PiSSA", "rank": int(rank)}
    facts = {maps[name].path: {"weight": name, "order": "largest"} for name in names}
    return AdapterInit(starts, digests=digests, provenance={"method": method, "modules": facts})


def _start(name: str, matrix: Tensor, rank: int, scaling: float) -> ModuleInit:
    U, V, sigma = svd_directions(matrix)
    if sigma[rank - 1] <= VANISHES * sigma[0]:
        count = int((sigma > VANISHES * sigma[0]).sum())
        raise ValueError(
            f"{name}: rank {rank} was asked for, and only {count} of its singular values do not vanish: lower the rank "
            "or leave the matrix out with targets=."
        )
    root = (sigma[:rank] / scaling).sqrt().to(U)
    return ModuleInit((V[:, :rank] * root).T, U[:, :rank] * root, scaling, torch.arange(rank))
