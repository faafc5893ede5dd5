"""Summaries and verifications as tables for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich import box
from rich.table import Table

from fishkern.report.summary import Part, Parts, Summary
from fishkern.report.values import Held, Values
from fishkern.statistics import Verification
from fishkern.statistics.verification import Compared


def summary_table(summary: Summary) -> Table:
    """Show how the scores are distributed: by layer, then by type of module.

    Args:
        summary: From :func:`fishkern.report.summarise`.

    Returns:
        The table.
    """
    total = summary.whole.sum or 1.0
    some_infinite = summary.whole.infinite > 0
    headings = ["coordinates", "share of the sum", "mean", f"among the top {summary.density:.2%}"]

    def cells(part: Part) -> list[str]:
        shown = [f"{part.coordinates:,}", f"{part.sum / total:.1%}", f"{part.mean:.1e}", f"{part.density:.2%}"]
        return [*shown, f"{part.infinite:,}"] if some_infinite else shown

    return _by_parts(summary, [*headings, "infinite"] if some_infinite else headings, cells)


def selection_table(parts: Parts) -> Table:
    """Show how many entries are selected: by layer, then by type of module.

    Args:
        parts: From :func:`fishkern.report.locate`.

    Returns:
        The table.
    """
    count = parts.whole.selected or 1
    return _by_parts(
        parts,
        ("coordinates", "selected", "share of the selection", "density"),
        lambda part: (
            f"{part.coordinates:,}", f"{part.selected:,}", f"{part.selected / count:.1%}", f"{part.density:.2%}"
        ),
    )  # fmt: skip


def values_table(values: Values) -> Table:
    """Show how many values there are, how large, and how far they moved: by layer, then by type of module.

    Args:
        values: From :func:`fishkern.report.held_values`.

    Returns:
        The table.
    """
    whole = values.whole
    headings = ["coordinates", "values", "largest value"]
    headings += ["moved", "largest move"] if whole.moved is not None else []
    headings += ["infinite"] if whole.infinite else []

    def cells(held: Held) -> list[str]:
        shown = [f"{held.coordinates:,}", f"{held.values:,}", f"{held.largest:.3g}"]
        if whole.moved is not None:
            shown += [f"{held.moved or 0:,}", f"{held.largest_move or 0.0:.3g}"]
        return [*shown, f"{held.infinite:,}"] if whole.infinite else shown

    return _by_parts(values, headings, cells)


def comparison_table(one: Parts, other: Parts, shared: Parts) -> Table:
    """Show the overlap of two selections: by layer, then by type of module.

    Args:
        one: Parts of the first selection.
        other: Parts of the second.
        shared: Parts of their intersection, with a pool of all names in either.

    Returns:
        The table. Overlap is selected by both / selected by either.
    """
    table = _headed(("by the first", "by the second", "by both", "overlap"))
    for group in ("layers", "modules"):
        ours, theirs, both = (getattr(parts, group) for parts in (one, other, shared))
        for name, part in both.items():
            counts = [groups[name].selected if name in groups else 0 for groups in (ours, theirs)]
            either = sum(counts) - part.selected
            overlap = f"{part.selected / either:.1%}" if either else "-"
            table.add_row(name, *(f"{count:,}" for count in (*counts, part.selected)), overlap)
        table.add_section()
    return _wide_enough(table)


def verification_rows(verification: Verification, most: int = 12) -> tuple[Compared, ...]:
    """Choose the parameters with the largest errors.

    Args:
        verification: From :func:`fishkern.verify`.
        most: Number of parameters; all that fail are included, even if there are more.

    Returns:
        The parameters, largest error first.
    """
    failing = sum(not row.holds for row in verification.compared)
    return tuple(verification.worst_first)[: max(most, failing)]


def verification_table(rows: Sequence[Compared]) -> Table:
    """Show the errors of parameters against the batch-size-1 loop.

    Args:
        rows: From :func:`verification_rows`.

    Returns:
        The table.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("parameter", overflow="fold")
    table.add_column("path")
    for heading in ("error", "noise", "allowed"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for row in rows:
        verdict = "FAILS" if not row.holds else row.note or "holds"
        figures = (f"{row.error:.1e}", f"{row.noise:.1e}", f"{row.allowed:.1e}")
        table.add_row(row.name, row.path, *figures, verdict)
    return table


def _by_parts(parts: Parts | Values, headings: Sequence[str], cells: Callable[[Any], Sequence[str]]) -> Table:
    table = _headed(headings)
    for group in (parts.layers, parts.modules):
        for name, part in group.items():
            table.add_row(name, *cells(part))
        table.add_section()
    return _wide_enough(table)


def _wide_enough(table: Table) -> Table:
    """Keep numbers in one piece on a narrow terminal, where rows wrap."""
    for column in table.columns[1:]:
        words = [*str(column.header).split(), *map(str, column.cells)]
        column.min_width = max(map(len, words))
    return table


def _headed(headings: Sequence[str]) -> Table:
    table = Table()
    table.add_column("part", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table
