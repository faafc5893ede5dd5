"""What each layer contributes to a task, as rows and as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from fishkern.report.cells import cells_of
from fishkern.selection import Contributions

_HEADINGS = ("layer", "weights", "of the top set", "connections of a neuron", "selected", "density")


def contribution_rows(contributions: Contributions) -> list[dict[str, Any]]:
    """Put the contributions of layers into plain values.

    Args:
        contributions: Of a selection.

    Returns:
        For each layer its label, its number (``None`` outside the layers), and what it contributes and gets.
    """
    cells = cells_of(contributions.per_row)
    rows = []
    for one in contributions.layers.values():
        cell = cells[one.names[0]]
        label = (cell.layer if one.layer or len(one.names) > 1 else None) or cell.module
        if one.layer is None and cell.layer:  # a parameter that counts by itself
            label = f"{cell.layer} {cell.module}"
        rows.append(
            {
                "layer": label,
                "number": one.layer and one.layer.number,
                "weights": one.numel,
                "top": one.top_count,
                "share": one.share,
                "connections": one.connections,
                "selected": one.count,
            }
        )
    return rows


def contributions_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Show what each layer contributes, and where it drops tokens.

    Args:
        rows: From :func:`contribution_rows`; those of layers that drop tokens may have ``"tokens"`` as well, the
            numbers that enter and leave.

    Returns:
        The table.
    """
    reduces = any("tokens" in row for row in rows)
    table = Table()
    for heading in (*_HEADINGS, *(("image tokens",) if reduces else ())):
        table.add_column(heading, justify="left" if heading == "layer" else "right", no_wrap=heading == "layer")
    for row in rows:
        cells = [row["layer"], f"{row['weights']:,}", f"{row['share']:.1%}", f"{row['connections']:,}"]
        cells += [f"{row['selected']:,}", f"{row['selected'] / row['weights']:.2%}" if row["weights"] else "-"]
        if reduces:
            cells.append("{:,} to {:,}".format(*row["tokens"]) if "tokens" in row else "")
        table.add_row(*cells)
    for column in table.columns[1:]:  # numbers stay in one piece on a narrow terminal
        column.min_width = max(len(word) for word in (*str(column.header).split(), *map(str, column.cells)))
    return table
