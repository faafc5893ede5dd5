"""As many connections of each output neuron as the layer has in the highest scores of all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fishkern.arguments import at_least, fraction_of, one_of
from fishkern.backend import Backend
from fishkern.files import AnyTensor
from fishkern.ops.streaming_topk import ORDERS, Order
from fishkern.selection._layers import RankedLayer, ranked_layers
from fishkern.selection._reaching import Search, Steps
from fishkern.selection._rows import some_rows, topk_of_rows, widths_of
from fishkern.selection._sums import exact_sum
from fishkern.selection.base import Rule
from fishkern.selection.budgeted import density_of
from fishkern.selection.budgeted import share as share_of
from fishkern.selection.contributions import Contributions, LayerContribution, connections_of
from fishkern.selection.ranking import (
    check_ordered,
    count_selected,
    num_non_zero,
    position_decides,
    topk,
    warn_of_zeros,
)
from fishkern.selection.scored import pool_of, split_off
from fishkern.selection.shards import Shards
from fishkern.statistics import FactoredStatistics, Statistics
from fishkern.warning import warn_caller

BY = ("layer", "parameter")
SHARES = ("count", "sum", "count-per-entry")

USUAL_TOP = 0.2
"""The ``top`` near which a density is solved, and the default of TR-PTS, whose paper gives none.

It spreads over all layers; how much it selects depends on the model and the task.
"""

# A selection that is so many times the smallest that the rule can make is warned of.
_MANY = 10


@dataclass(frozen=True)
class ContributionTopK(Rule):
    """Select connections of every output neuron, more in the layers that have more of the highest scores.

    The parameter half of TR-PTS (Luo et al., 2025, 2507.22872), whose code was not published, so this is a
    reconstruction:

    1. The ``top`` fraction of the ranked entries (those of the pool without ``always`` and ``never``) is the top set:
       floor(top * entries), exact, ties as in :class:`~fishkern.GlobalTopK`.
    2. Layer b has ``count_b`` of them; ``least`` is the smallest count above zero, and a layer without any counts as
       that one.
    3. C_b = max(1, floor(least_per_row * count_b / least)), in whole numbers, but at most ``most_per_row`` and the
       length of a row.
    4. Of each row of each parameter in layer b the first C_b scores are selected; in a row ties go to the smaller
       index. So each output neuron has at least one connection.

    A layer is a transformer layer (:func:`fishkern.hosts.layer_of`); a parameter outside the layers (an embedding, a
    head) is a layer of its own. A row is everything at one index of the first axis, so a convolution's row is its whole
    filter. Parameters with fewer than two dimensions have no rows, and must be named in ``always`` or ``never``.

    How much is selected follows from the ratios of the counts, and cannot be seen from ``top``: :meth:`connections`
    says it layer by layer, and the selection's file too. A layer with next to nothing in the top set lets all
    others grow, above all with ``by="parameter"``: if more than 10 times ``least_per_row`` of each row is selected,
    that is warned of.

    With ``top`` the scores are read twice, once more for ``share="sum"``, and the top set takes 4 to 8 bytes an entry
    meanwhile. With ``density`` they are mostly read three times, and nothing of the top set is kept: scores that agree
    in their first digits are put into order together, about 2^23 at once.

    Args:
        top: Fraction of the ranked entries that is the top set; or
        density: floor(density * pool) entries are to be selected, beside those of ``always``; the pool is every scored
            entry, those of ``always`` and ``never`` included. Not every count can be reached. The nearest is, among
            all top sets; of several the one whose ``top`` is nearest to 0.2, then the smaller. :meth:`connections`
            says which ``top`` it is. A miss of more than one connection of each row of the largest layer is warned of.
            It goes with shares that are counted, not with ``share="sum"``.
        least_per_row: Connections of each row in the layer with the smallest count, at least 1.
        by: ``"layer"``, or ``"parameter"``, where each parameter counts by itself.
        share: How a layer's entries in the top set are counted: ``"count"``, their number; ``"sum"``, the exact sum of
            their scores, which must not be negative; ``"count-per-entry"``, their number over the layer's entries.
        most_per_row: The most connections of a row; ``None`` for no limit but the row's length.
        order: ``"largest"`` scores first, or ``"smallest"``.
        always: As for every rule; for example the head.
        never: As for every rule; for example ``"*norm*"``.

    Raises:
        ValueError: Not exactly one of ``top`` and ``density`` is given, or an argument is out of range.
        TypeError: An argument is not a number.
    """

    streams: ClassVar[bool] = True
    on_shards: ClassVar[bool] = True

    top: float | None = None
    density: float | None = None
    least_per_row: int = 1
    by: Literal["layer", "parameter"] = field(default="layer", kw_only=True)
    share: Literal["count", "sum", "count-per-entry"] = field(default="count", kw_only=True)
    most_per_row: int | None = field(default=None, kw_only=True)
    order: Order = field(default="largest", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.top is None) == (self.density is None):
            raise ValueError(f"give either top or density, got top={self.top} and density={self.density}.")
        given = "density" if self.top is None else "top"
        vars(self).update({given: fraction_of(getattr(self, given), given)})
        vars(self).update(least_per_row=at_least(1, self.least_per_row, "least_per_row"))
        if self.share == "sum" and self.top is None:
            raise ValueError("share='sum' goes with top=: density= is solved by counting.")
        if self.most_per_row is not None:
            vars(self).update(most_per_row=at_least(self.least_per_row, self.most_per_row, "most_per_row"))
        one_of(self.by, BY, "by")
        one_of(self.share, SHARES, "share")
        one_of(self.order, ORDERS, "order")

    def connections(
        self, scores: Statistics | FactoredStatistics | Mapping[str, AnyTensor], *, backend: Backend | None = None
    ) -> Contributions:
        """Count what each layer contributes, and decide how many connections its rows get, without selecting them.

        A selection made by this rule has the same in it: ``Contributions.of(selection)``.

        Args:
            scores: As for :func:`fishkern.select`.
            backend: As for :func:`fishkern.select`.

        Returns:
            The contributions.

        Raises:
            ValueError: As in :func:`fishkern.select`.
            TypeError: As in :func:`fishkern.select`.
        """
        pool, _, ranked = pool_of(scores, self)
        return self._contributions(ranked, sum(score.numel() for score in pool.values()), backend)

    def check(self, parameters: Mapping[str, AnyTensor]) -> None:
        """Refuse parameters of which ``top`` or ``density`` cannot be selected, before they are scored.

        Args:
            parameters: The whole pool by name, of which the shapes alone are looked at.

        Raises:
            ValueError: ``top`` or ``density`` is too small or too large, or a parameter has no rows; as in
                :func:`fishkern.select`.
        """
        _, ranked = split_off(self, parameters)
        layers, total = ranked_layers(ranked, self.by), sum(one.numel() for one in parameters.values())
        if available := sum(layer.numel for layer in layers):
            _ = self._top_size(available) if self.density is None else self._target(layers, total)

    def choose(
        self, scores: Mapping[str, AnyTensor], total: int, backend: Backend | None = None
    ) -> Mapping[str, Tensor]:
        return self.choose_and_report(scores, total, backend)[0]

    def choose_and_report(
        self, scores: Mapping[str, AnyTensor], total: int, backend: Backend | None = None
    ) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
        contributions = self._contributions(scores, total, backend)
        widths = widths_of(scores)
        per_row = contributions.per_row
        counts = {name: min(per_row[name], width) for name, width in widths.items()}
        selected, zeros = topk_of_rows(scores, counts, widths, self.order)
        if zeros:
            warn_of_zeros(self.order, "what each row gets", some_rows(zeros, scores))
        return selected, {"contributions": contributions.to_json()}

    def _contributions(self, scores: Mapping[str, AnyTensor], total: int, backend: Backend | None) -> Contributions:
        layers = ranked_layers(scores, self.by)
        check_ordered(scores)
        if not any(layer.numel for layer in layers):
            top, counts = self.top or 0.0, [0] * len(layers)
            weights: Sequence[int | Fraction] = counts
        elif self.top is None:
            top, counts = self._solve(scores, layers, total)
            weights = self._weights(layers, counts)
        else:
            top, indices = self.top, self._top_set(scores, backend)
            selected = count_selected(scores, indices)
            counts = [sum(selected[name] for name in layer.names) for layer in layers]
            weights = self._sums(scores, layers, indices) if self.share == "sum" else self._weights(layers, counts)
        summed = sum(weights)
        per_row = connections_of(weights, self.least_per_row, self.most_per_row)
        by_key = {
            layer.key: LayerContribution(
                names=layer.names,
                layer=layer.place,
                numel=layer.numel,
                top_count=count,
                share=float(weight / summed) if summed else 0.0,
                connections=min(connections, layer.longest),
                count=layer.entries(connections),
            )
            for layer, count, weight, connections in zip(layers, counts, weights, per_row, strict=True)
        }
        contributions = Contributions(top, by_key)
        if self.density is None:
            self._warn_of_many(layers, contributions)
        return contributions

    def _weights(self, layers: Sequence[RankedLayer], counts: Sequence[int]) -> Sequence[int | Fraction]:
        if self.share == "count":
            return counts
        return [Fraction(count, max(1, layer.numel)) for layer, count in zip(layers, counts, strict=True)]

    def _sums(
        self, scores: Mapping[str, AnyTensor], layers: Sequence[RankedLayer], indices: Mapping[str, Tensor]
    ) -> list[Fraction]:
        shards = scores if isinstance(scores, Shards) else None
        sums = {name: exact_sum(name, scores[name], indices[name], shards=shards) for name in scores}
        return [sum((sums[name] for name in layer.names), Fraction(0)) for layer in layers]

    def _top_set(self, scores: Mapping[str, AnyTensor], backend: Backend | None) -> dict[str, Tensor]:
        """Select the top set, and warn where the position of zeros decides."""
        size = self._top_size(sum(score.numel() for score in scores.values()))
        indices, threshold = topk(scores, size, self.order, backend)
        if threshold == 0:
            self._warn_of_zeros(scores, size)
        return indices

    def _top_size(self, available: int) -> int:
        if not (size := share_of(self.top, available)):
            smallest = density_of(1, available)
            raise ValueError(f"top={self.top} of {available:,} ranked entries is none: the smallest top is {smallest}.")
        return size

    def _target(self, layers: Sequence[RankedLayer], total: int) -> tuple[int, str]:
        """Count the entries that the density asks for, and say so in words."""
        target = share_of(self.density, total)
        asked = f"density={self.density} of a pool of {total:,} is {target:,} entries"
        least = sum(layer.entries(self.least_per_row) for layer in layers)
        if target < least:
            raise ValueError(
                f"{asked}, less than least_per_row={self.least_per_row} of each row ({least:,}): the smallest density "
                f"is {density_of(least, total)}."
            )
        if target > (most := sum(layer.entries(self.most_per_row) for layer in layers)):
            given = self.most_per_row
            limit = "after always= and never=" if given is None else f"with most_per_row={given} of each row"
            raise ValueError(f"{asked}, but only {most:,} are left to choose from {limit}: lower density.")
        return target, asked

    def _solve(
        self, scores: Mapping[str, AnyTensor], layers: Sequence[RankedLayer], total: int
    ) -> tuple[float, list[int]]:
        """Find the top set that selects the density, and how much of each layer is in it."""
        if isinstance(scores, Shards):
            raise ValueError(
                "ContributionTopK solves density= by following scores in their order, which is not done on scores that "
                "are sharded over processes: give top=, or save the statistics, and select from the file on every rank."
            )
        target, asked = self._target(layers, total)
        steps = Steps.of([layer.rows for layer in layers], self.most_per_row)
        available = sum(layer.numel for layer in layers)
        usual, per_entry = share_of(USUAL_TOP, available), self._per_entry(layers)
        search = Search(target, usual, steps, per_entry, self.least_per_row)
        search.run(scores, {name: number for number, layer in enumerate(layers) for name in layer.names}, self.order)
        if search.in_zeros:
            self._warn_of_zeros(scores, search.size)
        rows = max(sum(layer.rows.values()) for layer in layers)
        if abs(search.selected - target) > rows:
            warn_caller(
                f"{asked}, and the nearest that ContributionTopK reaches on these scores is {search.selected:,} "
                f"(density {search.selected / total:.3g}), because the connections of all layers follow from the "
                "counts in one top set. Another least_per_row or most_per_row reaches others."
            )
        digits = next(
            n for n in range(1, 30) if share_of(density_of(search.size, available, n), available) == search.size
        )
        return density_of(search.size, available, digits), search.counts.tolist()

    def _per_entry(self, layers: Sequence[RankedLayer]) -> Tensor:
        """Weigh an entry of each layer in whole numbers."""
        sizes = [max(1, layer.numel) for layer in layers]
        multiple = math.lcm(*sizes) if self.share == "count-per-entry" else 1
        weights = [multiple // size if self.share == "count-per-entry" else 1 for size in sizes]
        if self.least_per_row * max(weight * size for weight, size in zip(weights, sizes, strict=True)) >= 2**62:
            raise ValueError(
                f"share={self.share!r} of layers of {len(set(sizes))} sizes leads to numbers that do not fit into 64 "
                "bits: give top= instead of density=, or take share='count'."
            )
        return torch.tensor(weights, dtype=torch.int64)

    def _warn_of_zeros(self, scores: Mapping[str, AnyTensor], size: int) -> None:
        """Warn if the position of zeros decides which are in the top set."""
        non_zero, available = num_non_zero(scores), sum(score.numel() for score in scores.values())
        if position_decides(self.order, size, non_zero, available):
            count = non_zero if self.order == "largest" else available - non_zero
            warn_of_zeros(self.order, f"a top set of {size:,}", "the pool", count)

    def _warn_of_many(self, layers: Sequence[RankedLayer], contributions: Contributions) -> None:
        """Warn if layers with next to nothing in the top set have let the others grow."""
        least = sum(layer.entries(self.least_per_row) for layer in layers)
        if contributions.count <= _MANY * least:
            return
        by_share = {key: one for key, one in contributions.layers.items() if one.share}
        smallest = min(by_share, key=lambda key: by_share[key].share)
        warn_caller(
            f"{contributions.count:,} of {contributions.total:,} ranked entries are selected (density "
            f"{contributions.count / contributions.total:.2g}), more than {_MANY} times as many as least_per_row="
            f"{self.least_per_row} of each row ({least:,}): {smallest} has only {by_share[smallest].top_count:,} of "
            f"the {contributions.top_count:,} entries in the top set, and the others get multiples of what it gets. "
            "Give density=, most_per_row=, or a larger top."
        )
