"""The ``k`` best connections of each output neuron."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fishkern.arguments import count_of, one_of
from fishkern.backend import Backend
from fishkern.files import PIECE, AnyTensor, pieces
from fishkern.ops.streaming_topk import ORDERS, Order
from fishkern.selection.base import Rule
from fishkern.selection.ranking import check_ordered, no_rank, warn_of_zeros


@dataclass(frozen=True)
class PerRowTopK(Rule):
    """Select the ``k`` first scores of each output neuron: of each row ``w[o]`` of a parameter.

    A row is everything at one index of the first axis, so a convolution's row is its whole filter. In a row, ties go to
    the smaller index. Parameters with fewer than two dimensions (biases, norms) have no rows, and must be named in
    ``always`` or ``never``.

    Args:
        k: How many of each row.
        order: ``"largest"`` scores first, or ``"smallest"``.
        always: As for every rule; for example ``"*.bias"``, as in Zhang et al. (2024, 2312.10136).
        never: As for every rule.

    Raises:
        ValueError: ``k`` is negative, or ``order`` is neither of the two.
        TypeError: ``k`` is not an integer.
    """

    streams: ClassVar[bool] = True
    k: int
    order: Order = "largest"

    def __post_init__(self) -> None:
        super().__post_init__()
        vars(self).update(k=count_of(self.k))
        one_of(self.order, ORDERS, "order")

    def choose(
        self, scores: Mapping[str, AnyTensor], total: int, backend: Backend | None = None
    ) -> Mapping[str, Tensor]:
        if flat := [name for name, score in scores.items() if len(score.shape) < 2]:
            raise ValueError(
                f"{len(flat)} of {len(scores)} parameters have no rows, such as {flat[0]} of shape "
                f"{tuple(scores[flat[0]].shape)}: name them in always= or never=."
            )
        check_ordered(scores)
        widths = {name: score.shape[1:].numel() for name, score in scores.items()}
        if narrow := [name for name, width in widths.items() if width < self.k and scores[name].numel()]:
            raise ValueError(
                f"k={self.k} exceeds the rows of {len(narrow)} of {len(scores)} parameters, such as {narrow[0]} with "
                f"rows of {widths[narrow[0]]}: lower k, or name them in always= or never=."
            )
        selected = {}
        zeros = []
        for name, score in scores.items():
            parts = list(self._of_rows(name, score, widths[name]))
            selected[name] = torch.cat([torch.empty(0, dtype=torch.int64), *(indices for indices, _ in parts)])
            if any(by_position for _, by_position in parts):
                zeros.append(name)
        if zeros:
            where = f"some rows of {len(zeros)} of {len(scores)} parameters (such as {zeros[0]})"
            warn_of_zeros(self.order, f"k={self.k:,}", where)
        return selected

    def _of_rows(self, name: str, score: AnyTensor, width: int) -> Iterator[tuple[Tensor, bool]]:
        """Yield, for one group of rows after another, the flat indices selected, and whether position chose a zero."""
        if self.k == 0 or score.numel() == 0:
            return
        first = 0
        for piece in pieces(score, max(1, PIECE // width) * width):
            rows = piece.view(-1, width)
            if rows.isnan().any():
                raise ValueError(no_rank(name, first + int(piece.isnan().nonzero()[0])))
            largest = self.order == "largest"
            threshold = rows.topk(self.k, dim=1, largest=largest).values[:, -1:]
            better = rows > threshold if largest else rows < threshold
            equal = rows == threshold
            room = self.k - better.sum(1, keepdim=True)
            better |= equal & (equal.cumsum(1) <= room)
            non_zero = rows.count_nonzero(1)
            among_largest = (non_zero < self.k) & (self.k < width)
            tied = among_largest if largest else (threshold[:, 0] == 0) & (width - non_zero > self.k)
            yield better.view(-1).nonzero().view(-1) + first, bool(tied.any())
            first += len(piece)
