"""``n`` of each ``m`` neighbours: the pattern that sparse tensor cores take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fishkern.arguments import at_least, one_of
from fishkern.backend import Backend
from fishkern.files import AnyTensor
from fishkern.ops.streaming_topk import ORDERS, Order
from fishkern.selection._rows import some_rows, topk_of_rows, widths_of
from fishkern.selection.base import Rule
from fishkern.selection.ranking import warn_of_zeros


@dataclass(frozen=True)
class NofM(Rule):
    """Select the ``n`` first scores of each ``m`` consecutive entries of a row, such as 2 of 4.

    A row is everything at one index of the first axis, in row-major order, as in :class:`~fishkern.PerRowTopK`; the
    first ``m`` of its entries are one group, the next ``m`` another. In a group ties go to the smaller index. So of
    each ranked parameter exactly n / m is selected. Parameters with fewer than two dimensions have no rows, and must be
    named in ``always`` or ``never``.

    Args:
        n: How many of each group, from 0 to ``m``.
        m: How many entries are a group; the length of every row must be a multiple of it.
        order: ``"largest"`` scores first, or ``"smallest"``.
        always: As for every rule.
        never: As for every rule.

    Raises:
        ValueError: ``n`` or ``m`` is out of range, or ``order`` is neither of the two.
        TypeError: ``n`` or ``m`` is not an integer.
    """

    streams: ClassVar[bool] = True
    on_shards: ClassVar[bool] = True

    n: int
    m: int
    order: Order = "largest"

    def __post_init__(self) -> None:
        super().__post_init__()
        vars(self).update(m=at_least(1, self.m, "m"), n=at_least(0, self.n, "n"))
        if self.n > self.m:
            raise ValueError(f"n={self.n} of each m={self.m} entries cannot be selected: n is at most m.")
        one_of(self.order, ORDERS, "order")

    def choose(
        self, scores: Mapping[str, AnyTensor], total: int, backend: Backend | None = None
    ) -> Mapping[str, Tensor]:
        widths = widths_of(scores)
        if uneven := [name for name, width in widths.items() if width % self.m]:
            raise ValueError(
                f"the rows of {len(uneven)} of {len(scores)} parameters are not made of groups of m={self.m}, such as "
                f"{uneven[0]} with rows of {widths[uneven[0]]}: choose another m, or name them in always= or never=."
            )
        selected, zeros = topk_of_rows(scores, dict.fromkeys(scores, self.n), dict.fromkeys(scores, self.m), self.order)
        if zeros:
            warn_of_zeros(self.order, f"n={self.n} of m={self.m}", some_rows(zeros, scores))
        return selected
