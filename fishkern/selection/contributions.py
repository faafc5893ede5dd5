"""How much each layer contributes to the highest scores, and how many connections of each row that gives it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from types import MappingProxyType
from typing import Any

from fishkern.arguments import count_of, number
from fishkern.hosts import Layer
from fishkern.selection.frozen import Frozen
from fishkern.selection.result import Selection


@dataclass(frozen=True)
class LayerContribution:
    """One layer's part in the top set.

    Attributes:
        names: Its parameters among those that are ranked.
        layer: Its place in the model; ``None`` for a parameter by itself.
        numel: Entries of these parameters.
        top_count: How many of them are in the top set.
        share: Its share of the top set, by what the rule counts; 0 where no entry is in it.
        connections: How many of each row are selected; all of a shorter one.
        count: How many are selected in all.
    """

    names: tuple[str, ...]
    layer: Layer | None
    numel: int
    top_count: int
    share: float
    connections: int
    count: int


class Contributions(Frozen):
    """What :class:`fishkern.ContributionTopK` has counted and decided, layer by layer.

    Args:
        top: The fraction of the ranked entries that the top set is.
        layers: By the layer's path (``"vit.encoder.layer.3"``), or by the parameter's name where one counts by itself.

    Attributes:
        top: As given. A rule with this ``top`` selects the same.
        layers: As given, in the model's order.
    """

    top: float
    layers: Mapping[str, LayerContribution]

    def __init__(self, top: float, layers: Mapping[str, LayerContribution]) -> None:
        vars(self).update(top=top, layers=MappingProxyType(dict(layers)))

    @classmethod
    def of(cls, selection: Selection) -> Contributions:
        """Get the contributions that a selection was made by; no score is read.

        Args:
            selection: Made by :class:`fishkern.ContributionTopK`, also loaded from a file.

        Returns:
            The contributions. Names are those that parameters had when they were scored.

        Raises:
            ValueError: The selection was made in another way.
        """
        try:
            stored = selection.provenance["contributions"]
            layers = {key: _layer_contribution(values) for key, values in stored["layers"].items()}
            return cls(number(stored["top"], "top"), layers)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise ValueError(
                f"{selection!r} does not say what each layer contributes: select with ContributionTopK."
            ) from None

    def to_json(self) -> dict[str, Any]:
        """Give the contributions in plain values, for the header of a file.

        Returns:
            The values.
        """
        return {"top": self.top, "layers": {key: asdict(one) for key, one in self.layers.items()}}

    @property
    def top_count(self) -> int:
        """Number of entries in the top set."""
        return sum(one.top_count for one in self.layers.values())

    @property
    def count(self) -> int:
        """Number of entries selected, without those of ``always``."""
        return sum(one.count for one in self.layers.values())

    @property
    def total(self) -> int:
        """Number of ranked entries."""
        return sum(one.numel for one in self.layers.values())

    @property
    def per_row(self) -> dict[str, int]:
        """How many of each row are selected, where a row has as many, by parameter."""
        return {name: one.connections for one in self.layers.values() for name in one.names}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Contributions):
            return NotImplemented
        return self.top == other.top and dict(self.layers) == dict(other.layers)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        connections = ", ".join(f"{key}: {one.connections}" for key, one in self.layers.items())
        return f"Contributions(top={self.top:g}, {self.count:,} of {self.total:,} selected, per row {{{connections}}})"


def connections_of(weights: Iterable[int | Fraction], least_per_row: int, most: int | None = None) -> list[int]:
    """Compute C_b = max(1, floor(least_per_row * w_b / w_least)) exactly, for each layer b.

    ``w_least`` is the smallest positive weight. A layer of weight 0 counts as it.

    Args:
        weights: Of the layers; none is negative.
        least_per_row: What the layer of the smallest weight gets.
        most: What no layer may exceed.

    Returns:
        Connections of each row, by layer.
    """
    weights = list(weights)
    least = min((weight for weight in weights if weight > 0), default=1)
    counts = [max(1, int(least_per_row * max(weight, least) // least)) for weight in weights]
    return counts if most is None else [min(count, most) for count in counts]


def _layer_contribution(values: Mapping[str, Any]) -> LayerContribution:
    counts = {key: count_of(values[key], key) for key in ("numel", "top_count", "connections", "count")}
    layer = Layer(**values["layer"]) if values["layer"] else None
    return LayerContribution(
        names=tuple(values["names"]), layer=layer, share=number(values["share"], "share"), **counts
    )
