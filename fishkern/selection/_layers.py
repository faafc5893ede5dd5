"""The layers among which :class:`fishkern.ContributionTopK` deals out connections."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from fishkern import hosts
from fishkern.files import AnyTensor
from fishkern.selection._rows import widths_of


@dataclass(frozen=True)
class RankedLayer:
    """The ranked parameters of one layer.

    Attributes:
        key: The layer's path, or the parameter's name where one counts by itself.
        place: The layer's place in the model; ``None`` for a parameter by itself.
        names: Of its parameters.
        numel: Their entries.
        rows: How many rows there are of each length.
    """

    key: str
    place: hosts.Layer | None
    names: tuple[str, ...]
    numel: int
    rows: Mapping[int, int]

    @property
    def longest(self) -> int:
        """Entries of its longest row."""
        return max(self.rows, default=0)

    def entries(self, connections: int | None) -> int:
        """Count the entries selected.

        Args:
            connections: Of each row, where it has as many; ``None`` for all.

        Returns:
            The count.
        """
        if connections is None:
            return self.numel
        return sum(count * min(connections, width) for width, count in self.rows.items())


def ranked_layers(scores: Mapping[str, AnyTensor], by: str) -> list[RankedLayer]:
    """Group parameters by the layer that they are in.

    Args:
        scores: By name.
        by: ``"layer"``, where a parameter outside the layers is one of its own; or ``"parameter"``.

    Returns:
        The layers, in the order of their first parameters.

    Raises:
        ValueError: A parameter has no rows.
    """
    widths = widths_of(scores)
    places = hosts.layer_of(scores) if by == "layer" else dict.fromkeys(scores)
    names: dict[str, list[str]] = {}
    for name, place in places.items():
        names.setdefault(place.path if place else name, []).append(name)
    layers = []
    for key, own in names.items():
        rows = Counter()
        for name in own:
            if scores[name].numel():
                rows[widths[name]] += scores[name].shape[0]
        numel = sum(scores[name].numel() for name in own)
        layers.append(RankedLayer(key, places[own[0]], tuple(own), numel, dict(rows)))
    return layers
