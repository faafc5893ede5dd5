"""Coordinates at random: the control that every other rule is measured against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor

from fishkern.arguments import integer
from fishkern.backend import Backend
from fishkern.files import AnyTensor
from fishkern.selection.budgeted import Budgeted
from fishkern.selection.shards import Shards

# From this share on, a mark for every coordinate takes no more memory than a list of the drawn ones, and needs no sort.
_MARKED_SHARE = 1 / 16


@dataclass(frozen=True)
class Random(Budgeted):
    """Select ``k`` coordinates of the pool at random, each set of ``k`` with the same probability.

    The scores are not read. The result depends on the seed and on the names and sizes alone, not on their order, on
    values, on devices or on PyTorch's global random state, which it leaves as it is. Memory: about 16 bytes for each of
    ``k`` or of those left out, whichever are fewer.

    Args:
        k: How many; or
        density: floor(density * pool), as in :class:`GlobalTopK`.
        seed: Of a generator of its own.
        always: As for every rule: selected whole, on top of the ``k``.
        never: As for every rule.

    Raises:
        ValueError: Not exactly one of ``k`` and ``density`` is given, or an argument is out of range.
        TypeError: ``k``, ``density`` or ``seed`` is not a number.
    """

    streams: ClassVar[bool] = True
    on_shards: ClassVar[bool] = True
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        vars(self).update(seed=integer(self.seed, "seed"))

    def choose(
        self, scores: Mapping[str, AnyTensor], total: int, backend: Backend | None = None
    ) -> Mapping[str, Tensor]:
        names = sorted(scores)
        ends = list(accumulate(scores[name].numel() for name in names))
        available = ends[-1] if ends else 0
        k = self.budget_of_pool(total, available)
        fewer = 2 * k <= available
        drawn = _distinct(available, k if fewer else available - k, self.seed)
        selected = {}
        for name, start, end in zip(names, [0, *ends], ends, strict=False):
            low, high = torch.searchsorted(drawn, torch.tensor([start, end])).tolist()
            inside = drawn[low:high] - start
            chosen = inside if fewer else _others(inside, end - start)
            selected[name] = scores.own(name, chosen) if isinstance(scores, Shards) else chosen
        return selected


def _distinct(total: int, count: int, seed: int) -> Tensor:
    """Draw ``count`` distinct numbers below ``total``, ascending: the first distinct ones of a row of draws."""
    generator = torch.Generator().manual_seed(seed)
    if count > _MARKED_SHARE * total:
        marked = torch.zeros(total, dtype=torch.bool)
        while missing := count - int(marked.sum()):  # never too many, so none has to be taken back
            marked[torch.randint(total, (missing,), generator=generator)] = True
        return marked.nonzero().view(-1)
    drawn = torch.empty(0, dtype=torch.int64)
    while len(drawn) < count:
        more = torch.randint(total, (count - len(drawn),), generator=generator)
        drawn = torch.cat([drawn, more]).unique()
    return drawn


def _others(indices: Tensor, numel: int) -> Tensor:
    left = torch.ones(numel, dtype=torch.bool)
    left[indices] = False
    return left.nonzero().view(-1)
