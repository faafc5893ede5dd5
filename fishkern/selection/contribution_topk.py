"""As many connections of each output neuron as the layer has in the highest scores of all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, ClassVar, Literal

from torch import Tensor

from fishkern import hosts
from fishkern.arguments import fraction_of, integer, one_of
from fishkern.backend import Backend
from fishkern.files import AnyTensor
from fishkern.ops.streaming_topk import ORDERS, Order
from fishkern.selection._rows import some_rows, topk_of_rows, widths_of
from fishkern.selection._sums import exact_sum
from fishkern.selection.base import Rule
from fishkern.selection.budgeted import density_of
from fishkern.selection.budgeted import share as share_of
from fishkern.selection.contributions import Contributions, LayerContribution, connections_of
from fishkern.selection.ranking import num_non_zero, position_decides, topk, warn_of_zeros
from fishkern.selection.scored import scores_of, split_off
from fishkern.statistics import FactoredStatistics, Statistics
from fishkern.warning import warn_caller

BY = ("layer", "parameter")
SHARES = ("count", "sum", "count-per-entry")

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
    3. C_b = max(1, floor(least_per_row * count_b / least)), in whole numbers, but at most ``most`` and the length of
       a row.
    4. Of each row of each parameter in layer b the first C_b scores are selected; in a row ties go to the smaller
       index. So each output neuron has at least one connection.

    A layer is a transformer layer (:func:`fishkern.hosts.layer_of`); a parameter outside the layers (an embedding, a
    head) is a layer of its own. A row is everything at one index of the first axis, so a convolution's row is its whole
    filter. Parameters with fewer than two dimensions have no rows, and must be named in ``always`` or ``never``.

    What is selected follows from the ratios of the counts, and is no fraction that one can see from ``top``. It is in
    the selection, and layer by layer in :meth:`connections`. A layer with next to nothing in the top set lets all
    others grow, above all with ``by="parameter"``: if more than 10 times ``least_per_row`` of each row is selected,
    that is warned of.

    The scores are read twice, once more for ``share="sum"``; the top set takes 4 to 8 bytes an entry meanwhile.

    Args:
        top: Fraction of the ranked entries that is the top set.
        density: Not yet.
        least_per_row: Connections of each row in the layer with the smallest count, at least 1.
        by: ``"layer"``, or ``"parameter"``, where each parameter counts by itself.
        share: How a layer's entries in the top set are counted: ``"count"``, their number; ``"sum"``, the exact sum of
            their scores, which must not be negative; ``"count-per-entry"``, their number over the layer's entries.
        most: The most connections of a row; ``None`` for no limit but the row's length.
        order: ``"largest"`` scores first, or ``"smallest"``.
        always: As for every rule; for example the head.
        never: As for every rule; for example ``"*norm*"``.

    Raises:
        ValueError: Not exactly one of ``top`` and ``density`` is given, or an argument is out of range.
        TypeError: An argument is not a number.
    """

    streams: ClassVar[bool] = True

    top: float | None = None
    density: float | None = None
    least_per_row: int = 1
    by: Literal["layer", "parameter"] = field(default="layer", kw_only=True)
    share: Literal["count", "sum", "count-per-entry"] = field(default="count", kw_only=True)
    most: int | None = field(default=None, kw_only=True)
    order: Order = field(default="largest", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.top is None) == (self.density is None):
            raise ValueError(f"give either top or density, got top={self.top} and density={self.density}.")
        given = "density" if self.top is None else "top"
        vars(self).update({given: fraction_of(getattr(self, given), given)})
        vars(self).update(least_per_row=_at_least(1, self.least_per_row, "least_per_row"))
        if self.most is not None:
            vars(self).update(most=_at_least(self.least_per_row, self.most, "most"))
        one_of(self.by, BY, "by")
        one_of(self.share, SHARES, "share")
        one_of(self.order, ORDERS, "order")

    def connections(
        self,
        scores: Statistics | FactoredStatistics | Mapping[str, AnyTensor],
        *,
        backend: Backend | None = None,
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
        pool = scores_of(scores)
        _, ranked = split_off(self, pool)
        return self._contributions(ranked, sum(score.numel() for score in pool.values()), backend)

    def choose(
        self, scores: Mapping[str, AnyTensor], total: int, backend: Backend | None = None
    ) -> Mapping[str, Tensor]:
        return self.choose_and_report(scores, total, backend)[0]

    def choose_and_report(
        self, scores: Mapping[str, AnyTensor], total: int, backend: Backend | None = None
    ) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
        contributions = self._contributions(scores, total, backend)
        self._warn_of_many(scores, contributions)
        widths = widths_of(scores)
        per_row = contributions.per_row
        counts = {name: min(per_row[name], width) for name, width in widths.items()}
        selected, zeros = topk_of_rows(scores, counts, widths, self.order)
        if zeros:
            warn_of_zeros(self.order, "what each row gets", some_rows(zeros, scores))
        return selected, {"contributions": contributions.to_json()}

    def _contributions(self, scores: Mapping[str, AnyTensor], total: int, backend: Backend | None) -> Contributions:
        widths = widths_of(scores)
        layers = self._layers(scores)
        available = sum(score.numel() for score in scores.values())
        if not available:
            return Contributions(self.top or 0.0, {})
        indices = self._top_set(scores, available, backend)
        weights = {key: self._weight(scores, names, indices) for key, (_, names) in layers.items()}
        summed = sum(weights.values())
        per_row = connections_of(weights.values(), self.least_per_row, self.most)
        by_layer = {}
        for (key, (layer, names)), connections in zip(layers.items(), per_row, strict=True):
            by_layer[key] = LayerContribution(
                names=tuple(names),
                layer=layer,
                numel=sum(scores[name].numel() for name in names),
                top_count=sum(len(indices[name]) for name in names),
                share=float(weights[key] / summed) if summed else 0.0,
                connections=connections,
                count=sum(_rows(scores[name]) * min(connections, widths[name]) for name in names),
            )
        return Contributions(self.top, by_layer)

    def _layers(self, names: Iterable[str]) -> dict[str, tuple[hosts.Layer | None, list[str]]]:
        """Group the ranked parameters."""
        names = list(names)
        places = hosts.layer_of(names) if self.by == "layer" else dict.fromkeys(names)
        layers: dict[str, tuple[hosts.Layer | None, list[str]]] = {}
        for name, layer in places.items():
            layers.setdefault(layer.path if layer else name, (layer, []))[1].append(name)
        return layers

    def _top_set(self, scores: Mapping[str, AnyTensor], available: int, backend: Backend | None) -> dict[str, Tensor]:
        """Select the top set, and warn where the position of zeros decides."""
        if not (size := share_of(self.top, available)):
            smallest = density_of(1, available)
            raise ValueError(f"top={self.top} of {available:,} ranked entries is none: the least is {smallest}.")
        indices, threshold = topk(scores, size, self.order, backend)
        if threshold == 0:
            non_zero = num_non_zero(scores.values())
            if position_decides(self.order, size, non_zero, available):
                count = non_zero if self.order == "largest" else available - non_zero
                warn_of_zeros(self.order, f"top={self.top} ({size:,} entries)", "the pool", count)
        return indices

    def _weight(
        self, scores: Mapping[str, AnyTensor], names: Iterable[str], indices: Mapping[str, Tensor]
    ) -> int | Fraction:
        if self.share == "sum":
            return sum((exact_sum(name, scores[name], indices[name]) for name in names), Fraction(0))
        count = sum(len(indices[name]) for name in names)
        if self.share == "count":
            return count
        return Fraction(count, max(1, sum(scores[name].numel() for name in names)))

    def _warn_of_many(self, scores: Mapping[str, AnyTensor], contributions: Contributions) -> None:
        """Warn if layers with next to nothing in the top set have let the others grow."""
        least = sum(_rows(score) * min(self.least_per_row, score.shape[1:].numel()) for score in scores.values())
        if self.top is None or contributions.count <= _MANY * least:
            return
        layers = contributions.layers
        smallest = min((key for key in layers if layers[key].share), key=lambda key: layers[key].share)
        warn_caller(
            f"{contributions.count:,} of {contributions.total:,} ranked entries are selected (density "
            f"{contributions.count / contributions.total:.2g}), more than {_MANY} times as many as least_per_row="
            f"{self.least_per_row} of each row ({least:,}): {smallest} has only {layers[smallest].top_count:,} of the "
            f"{contributions.top_count:,} entries in the top set, and the others get multiples of what it gets. Give "
            f"density=, most=, or a larger top."
        )


def _rows(score: AnyTensor) -> int:
    return score.shape[0] if score.numel() else 0


def _at_least(least: int, value: Any, name: str) -> int:
    if (number := integer(value, name)) < least:
        raise ValueError(f"{name} must be at least {least}, got {number}.")
    return number
