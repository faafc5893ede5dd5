"""Summaries as tables of the terminal."""

from __future__ import annotations

from rich import box
from rich.table import Table

from fishkern.report.summary import Summary
from fishkern.statistics import Verification


def summary_table(summary: Summary) -> Table:
    """Show where the scores lie: by layer, then by type of module.

    Args:
        summary: What :func:`fishkern.report.summarise` found.

    Returns:
        The table.
    """
    found = Table()
    found.add_column("part", no_wrap=True)
    for heading in ("coordinates", "share of the sum", "mean", f"among the top {summary.density:.2%}"):
        found.add_column(heading, justify="right")
    total = summary.whole.total or 1.0
    for group in (summary.layers, summary.modules):
        for name, part in group.items():
            top = part.top / part.coordinates if part.coordinates else 0.0
            found.add_row(name, f"{part.coordinates:,}", f"{part.total / total:.1%}", f"{part.mean:.1e}", f"{top:.2%}")
        found.add_section()
    return found


def verification_table(found: Verification, rows: int = 12) -> Table:
    """Show the parameters that are farthest from the loop.

    Args:
        found: What :func:`fishkern.verify` found.
        rows: How many parameters; every one that fails is among them.

    Returns:
        The table.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("parameter", overflow="fold")
    table.add_column("path")
    for heading in ("error", "noise", "allowed"):
        table.add_column(heading, justify="right")
    table.add_column("")
    failing = sum(not one.holds for one in found.compared)
    for one in found.worst_first[: max(rows, failing)]:
        verdict = "FAILS" if not one.holds else one.note or "holds"
        figures = (f"{one.error:.1e}", f"{one.noise:.1e}", f"{one.allowed:.1e}")
        table.add_row(one.name, one.path, *figures, verdict)
    return table
