"""The ``k`` best connections of each output neuron."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fishkern.backend import Backend
from fishkern.files import AnyTensor
from fishkern.selection._rows import some_rows, topk_of_rows, widths_of
from fishkern.selection.budgeted import density_of
from fishkern.selection.ranking import TopK, warn_of_zeros


@dataclass(frozen=True)
class PerRowTopK(TopK):
    """Select the ``k`` first scores of each output neuron: of each row ``w[o]`` of a parameter.

    A row is everything at one index of the first axis, so a convolution's row is its whole filter. In a row, ties go to
    the smaller index. Parameters with fewer than two dimensions (biases, norms) have no rows, and must be named in
    ``always`` or ``never``.

    Args:
        k: How many of each row; or
        density: floor(density * width) of each row, at least one.
        order: ``"largest"`` scores first, or ``"smallest"``.
        always: As for every rule; for example ``"*.bias"``, as in Zhang et al. (2024, 2312.10136).
        never: As for every rule.

    Raises:
        ValueError: Not exactly one of ``k`` and ``density`` is given, or an argument is out of range.
        TypeError: ``k`` or ``density`` is not a number.
    """

    streams: ClassVar[bool] = True
    on_shards: ClassVar[bool] = True

    def choose(
        self, scores: Mapping[str, AnyTensor], total: int, backend: Backend | None = None
    ) -> Mapping[str, Tensor]:
        widths = widths_of(scores)
        counts = {name: self.budget_of(width) for name, width in widths.items()}
        if narrow := [name for name, width in widths.items() if width < counts[name] and scores[name].numel()]:
            raise ValueError(
                f"k={self.k} exceeds the rows of {len(narrow)} of {len(scores)} parameters, such as {narrow[0]} with "
                f"rows of {widths[narrow[0]]}: lower k, or name them in always= or never=."
            )
        none = [name for name, count in counts.items() if count == 0 and scores[name].numel()]
        if none and self.k is None:
            width = min(widths[name] for name in none)
            raise ValueError(
                f"density={self.density} is less than one of each row in {len(none)} of {len(scores)} parameters, such "
                f"as {none[0]} with rows of {widths[none[0]]}: the smallest density for all of them is "
                f"{density_of(1, width)}."
            )
        selected, zeros = topk_of_rows(scores, counts, widths, self.order)
        if zeros:
            budget = f"density={self.density}" if self.k is None else f"k={self.k:,}"
            warn_of_zeros(self.order, budget, some_rows(zeros, scores))
        return selected
