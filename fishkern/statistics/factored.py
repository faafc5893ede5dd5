"""Factored statistics: for each weight matrix two vectors whose outer product is the statistic of its entries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fishkern.files import Format, StoredTensor, in_brief
from fishkern.statistics.parted import Parted, part_of

_FACTORED, _WHOLE = {"rows", "columns", "positions"}, {"values", "positions"}


class FactoredValues(NamedTuple):
    """The factors of one weight, stored as a matrix ``[m, n]``: entry ``(i, j)`` is ``rows[i] * columns[j]``.

    Rows are those of the stored weight: output features of ``nn.Linear`` and of a convolution, whose columns are the
    entries under its kernel, and input features of transformers' ``Conv1D``.

    Args:
        rows: ``[m]``, float32.
        columns: ``[n]``, float32.
    """

    rows: Tensor
    columns: Tensor


class FactoredStatistics(Parted[Tensor]):
    """What :class:`DiagonalKronecker` estimates: two vectors for each weight matrix, values for all other parameters.

    A read-only mapping from the canonical name of a parameter to a float32 tensor of its shape, in the model's order.
    That of a weight matrix is formed from its factors whenever it is looked up and is not kept; :meth:`factors` gives
    the factors themselves. Results of different data merge exactly: what is held are means over examples of sums over
    positions, and of the number of these positions, by which they are divided on access.

    Args:
        tensors: Entries ``"<name>/<part>"``: ``positions []``, the mean number of positions of an example that count;
            and sums over these, mean over examples: of a weight ``[m, *shape]`` with factors ``rows [m]`` and
            ``columns [*shape]``, of any other parameter ``values`` of its shape.
        count: Number of examples.
        provenance: As for :class:`fishkern.Statistics`.
        coverage: As for :class:`fishkern.Statistics`.

    Raises:
        TypeError: As for :class:`fishkern.Statistics`.
        ValueError: As for :class:`fishkern.Statistics`; or a part is missing or unknown, or has another shape.
    """

    FORMAT: ClassVar[Format] = Format("fishkern.factored-statistics", version=1, saved_by="FactoredStatistics.save")

    @staticmethod
    def _check_parts(name: str, shapes: Mapping[str, torch.Size]) -> None:
        _check_parts(name, shapes)

    @property
    def total(self) -> int:
        """Number of coordinates of all parameters."""
        return sum(self.shape(name).numel() for name in self)

    def shape(self, name: str) -> torch.Size:
        """Return the shape of a parameter, without reading anything.

        Args:
            name: Its name.

        Returns:
            The shape of what :meth:`__getitem__` gives.

        Raises:
            KeyError: There is no such parameter.
        """
        parts = {part_of(entry): self.shapes[entry] for entry in self._entries_of(name)}
        return parts["values"] if "values" in parts else torch.Size((*parts["rows"], *parts["columns"]))

    def factors(self, name: str) -> FactoredValues | None:
        """Return the factors of a weight matrix: mean squares over positions of its two sides.

        Args:
            name: Its name.

        Returns:
            The factors, or ``None`` for a parameter that has values.

        Raises:
            KeyError: There is no such parameter.
        """
        if f"{name}/rows" not in self._entries_of(name):
            return None
        return FactoredValues(self._per_position(name, "rows"), self._per_position(name, "columns").flatten())

    def __getitem__(self, name: str) -> Tensor:
        factors = self.factors(name)
        if factors is None:
            return self._per_position(name, "values")
        return torch.outer(factors.rows, factors.columns).view(self.shape(name))

    def __repr__(self) -> str:
        definition = self.provenance["definition"]
        factored = sum(f"{name}/rows" in self._entries for name in self)
        parts = [
            f"{definition['estimator']}" if "estimator" in definition else "",
            f"{factored:,} {'matrix' if factored == 1 else 'matrices'} by their factors",
            f"{len(self) - factored:,} other parameter{'s' * (len(self) - factored != 1)}",
            f"{self.total:,} coordinate{'s' * (self.total != 1)}",
            f"mean over {self.count:,} example{'s' * (self.count != 1)}",
        ]
        if any(isinstance(entry, StoredTensor) for entry in self._entries.values()):
            parts.append("on disk")
        return f"FactoredStatistics({', '.join(filter(None, parts))})"

    def _per_position(self, name: str, part: str) -> Tensor:
        sums, positions = self._read(f"{name}/{part}"), self._read(f"{name}/positions")
        return sums / positions if positions else sums


def _check_parts(name: str, shapes: Mapping[str, torch.Size]) -> None:
    """Check that a parameter has the parts of one of the two forms, and that these have axes as they should."""
    name = in_brief(name, 80)
    if shapes.keys() not in (_FACTORED, _WHOLE):
        found = ", ".join(in_brief(part, 40) for part in list(shapes)[:4])
        raise ValueError(
            f"a parameter has the parts {', '.join(sorted(_FACTORED))}, or {' and '.join(sorted(_WHOLE))}; {name} has "
            f"{found}."
        )
    fits = len(shapes["positions"]) == 0
    if "rows" in shapes:
        fits = fits and len(shapes["rows"]) == 1 and len(shapes["columns"]) >= 1
    if not fits:
        found = ", ".join(f"{part} {tuple(shape)}" for part, shape in shapes.items())
        raise ValueError(f"{name} has parts of shapes that do not fit: {in_brief(found, 200)}.")
