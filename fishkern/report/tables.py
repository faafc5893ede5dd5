"""Summaries and verifications as tables of the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich import box
from rich.table import Table

from fishkern.report.summary import Part, Parts, Summary
from fishkern.statistics import Verification


def summary_table(summary: Summary) -> Table:
    """Show where the scores lie: by layer, then by type of module.

    Args:
        summary: What :func:`fishkern.report.summarise` found.

    Returns:
        The table.
    """
    total = summary.whole.total or 1.0
    some_infinite = summary.whole.infinite > 0
    headings = ["coordinates", "share of the sum", "mean", f"among the top {summary.density:.2%}"]

    def cells(part: Part) -> list[str]:
        shown = [f"{part.coordinates:,}", f"{part.total / total:.1%}", f"{part.mean:.1e}", f"{part.density:.2%}"]
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
    return table


def verification_table(found: Verification, rows: int = 12) -> Table:
    """Show the parameters that are farthest from the loop.

    Args:
        found: What :func:`fishkern.verify` found.
        rows: How many parameters; every one that fails is among them.

    Returns:
        The table.
    """
    failing = sum(not one.holds for one in found.compared)
    shown = found.worst_first[: max(rows, failing)]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=found.headline(len(shown)), title_justify="left")
    table.add_column("parameter", overflow="fold")
    table.add_column("path")
    for heading in ("error", "noise", "allowed"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for one in shown:
        verdict = "FAILS" if not one.holds else one.note or "holds"
        figures = (f"{one.error:.1e}", f"{one.noise:.1e}", f"{one.allowed:.1e}")
        table.add_row(one.name, one.path, *figures, verdict)
    return table


def _by_parts(parts: Parts, headings: Sequence[str], cells: Callable[[Part], Sequence[str]]) -> Table:
    table = _headed(headings)
    for group in (parts.layers, parts.modules):
        for name, part in group.items():
            table.add_row(name, *cells(part))
        table.add_section()
    return table


def _headed(headings: Sequence[str]) -> Table:
    table = Table()
    table.add_column("part", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table
