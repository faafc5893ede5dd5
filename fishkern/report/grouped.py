"""Parts of a model that add up, by layer and by type of module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Generic, Protocol, Self, TypeVar

from fishkern.report.cells import Cell, cells_of


class Addable(Protocol):
    """A dataclass whose fields are sums over the parameters of a part."""

    def add(self, other: Self) -> None:
        """Add another part to this one."""


Value = TypeVar("Value", bound=Addable)


@dataclass
class Grouped(Generic[Value]):
    """Parts of a model, and their sums.

    Attributes:
        kind: Makes an empty part.
        parameters: Parts by parameter name, in the model's order.
    """

    kind: Callable[[], Value]
    parameters: dict[str, Value]

    @property
    def whole(self) -> Value:
        """Sum over the model."""
        return self._summed(lambda _: "").get("", self.kind())

    @property
    def cells(self) -> dict[Cell, Value]:
        """Sums by layer and type of module, in the model's order."""
        return self._summed(lambda cell: cell)

    @property
    def layers(self) -> dict[str, Value]:
        """Sums by layer, and outside the layers by module."""
        return self._summed(lambda cell: cell.layer or cell.module)

    @property
    def modules(self) -> dict[str, Value]:
        """Sums by type of module."""
        return self._summed(lambda cell: cell.module)

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain values.

        Returns:
            Dictionaries and numbers, for JSON.
        """
        groups = {"layers": self.layers, "modules": self.modules, "parameters": self.parameters}
        plain = {group: {name: self._plain(part) for name, part in parts.items()} for group, parts in groups.items()}
        return {"whole": self._plain(self.whole), **plain}

    @staticmethod
    def _plain(part: Value) -> dict[str, Any]:
        return asdict(part)

    def _summed(self, label: Callable[[Cell], Any]) -> dict[Any, Value]:
        cells = cells_of(self.parameters)
        groups: dict[Any, Value] = {}
        for name, part in self.parameters.items():
            groups.setdefault(label(cells[name]), self.kind()).add(part)
        return groups
