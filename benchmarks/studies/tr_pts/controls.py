"""Connections and layers that are chosen knowing less, as many as TR-PTS has."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import fishkern as fk

Place = Callable[[fk.TaskRelevance, int], list[int]]
"""From TR-PTS's result and a seed to the layers that reduce tokens."""


def same_counts(selection: fk.Selection, seed: int) -> fk.Selection:
    """As many entries of each row by chance; what is selected whole stays so."""
    draws = torch.Generator().manual_seed(seed)
    drawn: dict[str, Tensor] = {}
    whole = []
    for name, count in selection.counts.items():
        shape = selection.shapes[name]
        if count == shape.numel():
            whole.append(name)
        elif count:
            rows = shape[0]
            of_row = torch.rand(rows, shape[1:].numel(), generator=draws).topk(count // rows, dim=1).indices
            drawn[name] = (of_row + torch.arange(rows)[:, None] * shape[1:].numel()).flatten()
    return fk.Selection(selection.shapes, drawn, whole=whole)


def densest(result: fk.TaskRelevance, seed: int) -> list[int]:
    """The layers with the most connections a row, as many as TR-PTS reduces in; never the first, as there."""
    counts = _counts(result)
    order = sorted(counts, key=lambda layer: (-counts[layer], layer))
    return sorted(order[: len(result.reduction.layers)])


def drawn(result: fk.TaskRelevance, seed: int) -> list[int]:
    """Layers by chance; never the first."""
    counts = sorted(_counts(result))
    order = torch.randperm(len(counts), generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(counts[n] for n in order[: len(result.reduction.layers)])


def _counts(result: fk.TaskRelevance) -> dict[int, int]:
    """Entries of the top set by the number of the layer, without the first layer."""
    layers = result.contributions.layers.values()
    return {entry.layer.number: entry.top_count for entry in layers if entry.layer and entry.layer.number > 0}
