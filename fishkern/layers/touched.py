"""Which rows of an output gradient are not zero, and of which example each row is thereby found to be."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from fishkern.layers.row_order import ONE_EACH, RowOrder, orders


class Touched(NamedTuple):
    """The rows of an output gradient that are not zero.

    Attributes:
        call: Number of the call that the output is of.
        example: Number of the example whose loss was back-propagated.
        rows: How many rows the gradient has; ``None`` for a scalar.
        nonzero: Which of them are not zero, ``[U, 1]``, int64.
    """

    call: int
    example: int
    rows: int | None
    nonzero: Tensor


class TouchedColumns(NamedTuple):
    """The columns (second axis) of an output gradient that are not zero.

    Attributes:
        example: Number of the example whose loss was back-propagated.
        nonzero: Which columns are not zero, ``[U, 1]``, int64.
    """

    example: int
    nonzero: Tensor


def owned(touched: Touched, owners: Tensor, positions: int = 1) -> bool:
    """Tell whether a loss touches no rows but those of its own example.

    Args:
        touched: The rows that it touches.
        owners: The example of each row, ``[G N]``.
        positions: How many rows of the gradient there are for each of these.

    Returns:
        Whether they are as many, and those touched are the example's.
    """
    if touched.rows != len(owners) * positions:
        return False
    return bool((owners.to(touched.nonzero.device)[touched.nonzero // positions] == touched.example).all())


def order_of(reached: Iterable[Touched], rows: int, num_examples: int, said: RowOrder = ONE_EACH) -> RowOrder | None:
    """Find which rows each example has by the rows that its loss touches.

    Args:
        reached: What losses of the examples touch; of other numbers of rows it is ignored.
        rows: The number of rows.
        num_examples: ``N``.
        said: The order that the batch says.

    Returns:
        The order: that of the batch if it agrees with what is touched, else the first possible one where nothing is,
        and ``None`` where none, or more than one, agrees.
    """
    reached = [one for one in reached if one.rows == rows and len(one.nonzero)]
    fitting = [
        order for order in orders(rows, num_examples) if all(owned(one, order.owners(num_examples)) for one in reached)
    ]
    if said in fitting:
        return said
    return fitting[0] if len(fitting) == 1 or (fitting and not reached) else None
