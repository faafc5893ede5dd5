"""Everything that is timed, by the name it has in the records."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

import fishkern as fk
from benchmarks import rivals

Provider = Callable[[nn.Module, list[dict[str, Tensor]]], object]


def fishkern(model: nn.Module, batches: list[dict[str, Tensor]]) -> fk.Statistics:
    """As a user calls it, self-check included."""
    return fk.estimate(model, batches)


PROVIDERS: dict[str, Provider] = {
    "fishkern": fishkern,
    "one_by_one": rivals.one_by_one,
    "vmap_grad": rivals.vmap_grad,
}
