"""What a statistic says of one slice at one time: its values, or the two factors that they are products of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from fishkern.selection.entries import Entries
from fishkern.selection.ranges import Ranges, Rows


class Factors(NamedTuple):
    """Values that are products of two factors, without the products: entry ``(i, j)`` is ``rows[i] * columns[j]``.

    Args:
        rows: ``[m]``, floating.
        columns: ``[n]``, floating. Products are those of float64.
    """

    rows: Tensor
    columns: Tensor

    @property
    def size(self) -> int:
        """Number of products."""
        return len(self.rows) * len(self.columns)

    def values(self) -> Tensor:
        """Multiply them out.

        Returns:
            ``[m * n]``, float32, row by row.
        """
        values = torch.empty(len(self.rows), len(self.columns), device=self.rows.device)
        columns = self.columns.double()
        for row, factor in zip(values, self.rows.double(), strict=True):
            row.copy_(factor * columns)
        return values.view(-1)


Reading: TypeAlias = Tensor | Factors
"""Of one slice: its values ``[entries]``, float32, or their factors."""


@runtime_checkable
class Factored(Protocol):
    """Statistics that know factors."""

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Give the factors of a parameter's values, ``rows [O]`` and ``columns [I]``; ``None`` where it has none."""


def reading_of(statistics: Mapping[str, Tensor], name: str, piece: Ranges) -> Reading:
    """Read one slice from statistics.

    Args:
        statistics: Tensors of the parameters' shapes by name, such as :class:`~fishkern.Statistics`; or what has
            ``factors(name)`` beside them, which is asked first, so that no product is formed.
        name: The parameter's.
        piece: The slice, one of :meth:`Slices.of <fishkern.Slices.of>`.

    Returns:
        The slice's values, flat, float32 (float64 stays), a view where its rows are neighbours; or the factors of them.

    Raises:
        KeyError: The statistics have no such parameter.
        ValueError: The parameter has fewer rows or columns than the slice says.
    """
    pair = statistics.factors(name) if isinstance(statistics, Factored) else None
    if pair is None:
        values = statistics[name]
        values = values if values.dtype == torch.float64 else values.float()
        return Entries.of(values.shape, piece, name).gather(values)
    cut = [part.detach() for part in pair]
    Entries.of(torch.Size(map(len, cut)), piece, name)  # checks that the slice is inside
    axis = 0 if isinstance(piece, Rows) else 1
    cut[axis] = torch.cat([cut[axis][start:stop] for start, stop in piece.bounds])
    return Factors(*cut)


def is_zero(reading: Reading) -> bool:
    """Tell whether every entry of a reading is exactly zero.

    Args:
        reading: The values of a slice, or its factors.

    Returns:
        Whether it is.
    """
    return not (reading.any() if isinstance(reading, Tensor) else (reading.rows.any() and reading.columns.any()))
