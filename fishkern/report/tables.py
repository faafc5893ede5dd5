"""Summaries and verifications as tables of the terminal."""

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
    """Show where the scores lie: by layer, then by type of module.

    Args:
        summary: What :func:`fishkern.report.summarise` found.

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
    """Show what is selected: by layer, then by type of module.

    Args:
        parts: What :func:`fishkern.report.locate` found.

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
    """Show where values lie, how large they are, and how far they have moved: by layer, then by type of module.

    Args:
        values: What :func:`fishkern.report.held_values` found.

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
    """Show what two selections have in common: by layer, then by type of module.

    Args:
        one: The first selection's parts.
        other: The second one's.
        shared: Those of what both select, out of both pools.

    Returns:
        The table; overlap is selected by both / selected by either.
    """
    table = _headed(("by the first", "by the second", "by both", "overlap"))
    for group in ("layers", "modules"):
        ours, theirs, both = (getattr(parts, group) for parts in (one, other, shared))
        for name, part in both.items():
            counts = [found[name].selected if name in found else 0 for found in (ours, theirs)]
            either = sum(counts) - part.selected
            overlap = f"{part.selected / either:.1%}" if either else "-"
            table.add_row(name, *(f"{count:,}" for count in (*counts, part.selected)), overlap)
        table.add_section()
    return _wide_enough(table)


def verification_rows(found: Verification, most: int = 12) -> tuple[Compared, ...]:
    """Choose the parameters that are farthest from the loop.

    Args:
        found: What :func:`fishkern.verify` found.
        most: How many; every one that fails is among them.

    Returns:
        The farthest first.
    """
    failing = sum(not one.holds for one in found.compared)
    return tuple(found.worst_first)[: max(most, failing)]


def verification_table(rows: Sequence[Compared]) -> Table:
    """Show how far parameters are from the loop.

    Args:
        rows: What :func:`verification_rows` chose.

    Returns:
        The table.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("parameter", overflow="fold")
    table.add_column("path")
    for heading in ("error", "noise", "allowed"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for one in rows:
        verdict = "FAILS" if not one.holds else one.note or "holds"
        figures = (f"{one.error:.1e}", f"{one.noise:.1e}", f"{one.allowed:.1e}")
        table.add_row(one.name, one.path, *figures, verdict)
    return table


def _by_parts(parts: Parts | Values, headings: Sequence[str], cells: Callable[[Any], Sequence[str]]) -> Table:
    table = _headed(headings)
    for group in (parts.layers, parts.modules):
        for name, part in group.items():
            table.add_row(name, *cells(part))
        table.add_section()
    return _wide_enough(table)


def _wide_enough(table: Table) -> Table:
    """Keep every figure whole where the terminal is narrow: a line then goes on in the next one."""
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
