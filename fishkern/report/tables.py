"""Summaries and verifications as tables for the terminal."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from fishkern.report.cells import cells_of
from fishkern.report.freezing import FreezerSummary
from fishkern.report.grouped import Grouped
from fishkern.report.matrices import SHARE, EnergyPart, EnergySummary, StartPart
from fishkern.report.sensitivity import SensitivityPart
from fishkern.report.summary import Part, Parts, Summary
from fishkern.report.tokens import TokenCount
from fishkern.report.values import ValuePart
from fishkern.selection import Contributions
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


def sensitivity_table(parts: Grouped[SensitivityPart]) -> Table:
    """Show what rounding to few bits costs: by layer, then by type of module.

    Args:
        parts: From :func:`fishkern.report.sensitivity`.

    Returns:
        The table.
    """
    bits = list(parts.whole.costs)
    headings = ["coordinates", *(f"cost in {number} bits" for number in bits)]
    return _by_parts(
        parts, headings, lambda part: [f"{part.coordinates:,}", *(f"{part.costs[number]:.2e}" for number in bits)]
    )


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


def contributions_table(contributions: Contributions, tokens: Mapping[str, TokenCount] | None = None) -> Table:
    """Show what each layer has in the top set, and what it gets for that.

    Args:
        contributions: Of a selection, or of a rule.
        tokens: The image tokens of layers that drop some, by the layer's path.

    Returns:
        The table.
    """
    headings = (f"in the top {contributions.top:.3g}", "share", "of each row", "selected")
    table = _headed((*headings, "image tokens") if tokens else headings)
    for name, one in contributions.layers.items():
        counts = f"{one.connections:,}", f"{one.count:,} of {one.numel:,}"
        table.add_row(
            name, f"{one.top_count:,}", f"{one.share:.1%}", *counts, *([_left(tokens, name)] if tokens else [])
        )
    return _wide_enough(table)


def _left(tokens: Mapping[str, TokenCount], layer: str) -> str:
    return f"{tokens[layer].entering:,} to {tokens[layer].leaving:,}" if layer in tokens else ""


def values_table(values: Grouped[ValuePart]) -> Table:
    """Show how many values there are, how large, and how far they moved: by layer, then by type of module.

    Args:
        values: From :func:`fishkern.report.summarise_values`.

    Returns:
        The table.
    """
    whole = values.whole
    headings = ["coordinates", "values", "largest value"]
    headings += ["moved", "largest move"] if whole.moved is not None else []
    headings += ["infinite"] if whole.infinite else []

    def cells(part: ValuePart) -> list[str]:
        shown = [f"{part.coordinates:,}", f"{part.values:,}", f"{part.largest:.3g}"]
        if whole.moved is not None:
            shown += [f"{part.moved or 0:,}", f"{part.largest_move or 0.0:.3g}"]
        return [*shown, f"{part.infinite:,}"] if whole.infinite else shown

    return _by_parts(values, headings, cells)


def energies_table(summary: EnergySummary) -> Table:
    """Show the energies of weight matrices: by layer, then by type of module.

    Args:
        summary: From :func:`fishkern.report.summarise_energies`.

    Returns:
        The table.
    """
    whole = summary.whole
    headings = ["matrices", "directions", "mean energy", "mean exact energy", f"{SHARE:.0%} of it in"]
    headings += ["mean importance"] if whole.mean_importance is not None else []
    headings += ["without energy"] if whole.unreached else []

    def cells(part: EnergyPart) -> list[str]:
        shown = [f"{part.matrices:,}", f"{part.directions:,}", f"{part.mean:.1e}", f"{part.mean_exact:.1e}"]
        shown.append(f"{part.holding / part.directions:.1%}")
        shown += [f"{part.mean_importance:.1e}"] if whole.mean_importance is not None else []
        return [*shown, f"{part.unreached:,}"] if whole.unreached else shown

    return _by_parts(summary, headings, cells)


def start_table(parts: Grouped[StartPart]) -> Table:
    """Show the start of an adapter: by layer, then by type of module.

    Args:
        parts: From :func:`fishkern.report.summarise_start`.

    Returns:
        The table.
    """
    whole = parts.whole
    headings = ["modules", "ranks", "mean rank", "entries", "start / weight"]
    headings += ["directions"] if whole.orders else []
    headings += ["of them dead"] if whole.dead else []

    def cells(part: StartPart) -> list[str]:
        ranks = f"{part.least}" if part.least == part.most else f"{part.least} to {part.most}"
        shown = [f"{part.modules:,}", ranks, f"{part.mean_rank:.4g}", f"{part.entries:,}", f"{part.size:.2g}"]
        shown += [" and ".join(part.orders)] if whole.orders else []
        return [*shown, f"{part.dead:,}"] if whole.dead else shown

    return _by_parts(parts, headings, cells)


def freezing_table(summary: FreezerSummary) -> Table:
    """Show how much of what was trained at first still is: by layer, then by type of module.

    Args:
        summary: From :func:`fishkern.report.summarise_freezer`.

    Returns:
        The table.
    """
    return _by_parts(
        summary,
        ("entries at first", "in training", "kept", "slices", "of them stopped"),
        lambda part: (
            f"{part.entries:,}",
            f"{part.kept:,}",
            f"{part.kept / part.entries:.1%}",
            f"{part.slices:,}",
            f"{part.stopped:,}",
        ),
    )


def events_table(rows: Sequence[Sequence[str]], headings: Sequence[str]) -> Table:
    """Show what stopped, one row for each event.

    Args:
        rows: The cells.
        headings: Of the columns.

    Returns:
        The table.
    """
    table = Table()
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*row)
    return _wide_enough(table)


def ranks_tables(ranks: Mapping[str, int], width: int = 100) -> list[Table]:
    """Show the ranks of matrices: a row for each layer, a column for each type of module, and the means of both.

    Args:
        ranks: By parameter name, in the model's order.
        width: Characters in a line; columns that do not fit follow in another table.

    Returns:
        The tables. A cell of several matrices, such as experts, shows their smallest and largest rank.
    """
    rows: dict[str, list[int]] = {}
    columns: dict[str, list[int]] = {}
    groups: dict[tuple[str, str], list[int]] = {}
    for name, cell in cells_of(ranks).items():
        row = cell.layer or cell.module
        rows.setdefault(row, []).append(ranks[name])
        columns.setdefault(cell.module, []).append(ranks[name])
        groups.setdefault((row, cell.module), []).append(ranks[name])
    texts = [
        [_in_lines(column), *(_span(groups.get((row, column))) for row in rows), f"{_mean(own):.1f}"]
        for column, own in columns.items()
    ]
    texts.append(["mean", *(f"{_mean(own):.1f}" for own in rows.values()), f"{_mean(list(ranks.values())):.4g}"])
    first = ["layer", *rows, "mean"]
    return [_of_columns([first, *some]) for some in _fitting(texts, width - _width(first) - 1)]


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


def _by_parts(parts: Grouped[Any], headings: Sequence[str], cells: Callable[[Any], Sequence[str]]) -> Table:
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


def _in_lines(label: str) -> str:
    """Break a long label after dots, and before the words of a name such as SelfAttention."""
    return re.sub(r"(?<=\.)(?=.)|(?<=[a-z])(?=[A-Z])", "\n", label)


def _fitting(columns: Sequence[Sequence[str]], width: int) -> list[list[Sequence[str]]]:
    """Put columns into as few tables as their widths allow."""
    tables: list[list[Sequence[str]]] = [[]]
    for column in columns:
        if tables[-1] and sum(map(_width, [*tables[-1], column])) > width:
            tables.append([])
        tables[-1].append(column)
    return tables


def _width(column: Sequence[str]) -> int:
    """Measure a column with its margins and its border."""
    return max(len(line) for text in column for line in text.split("\n")) + 3


def _of_columns(columns: Sequence[Sequence[str]]) -> Table:
    """Make a table of columns, each a heading, cells, and a mean below a line."""
    table = Table()
    for number, (heading, *_) in enumerate(columns):
        table.add_column(heading, justify="right" if number else "left", no_wrap=True)
    *rows, last = zip(*(cells for _, *cells in columns), strict=True)
    for row in rows:
        table.add_row(*row)
    table.add_section()
    table.add_row(*last)
    return table


def _span(ranks: Sequence[int] | None) -> str:
    if not ranks:
        return "-"
    return f"{ranks[0]}" if min(ranks) == max(ranks) else f"{min(ranks)}-{max(ranks)}"


def _mean(ranks: Sequence[int]) -> float:
    return sum(ranks) / len(ranks)


def _headed(headings: Sequence[str]) -> Table:
    table = Table()
    table.add_column("part", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table
