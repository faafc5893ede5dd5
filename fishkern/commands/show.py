"""``fishkern show``: what a file holds, as a table, a picture, or JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from fishkern.commands.options import Json
from fishkern.commands.output import console, note, progress
from fishkern.report import locate, summarise
from fishkern.report.tables import comparison_table, selection_table, summary_table
from fishkern.selection import Selection
from fishkern.statistics import Statistics


def show(
    file: Annotated[Path, Argument(metavar="FILE", help="Statistics or a selection.")],
    other: Annotated[Path | None, Argument(metavar="OTHER", help="A selection to compare it with.")] = None,
    plot: Annotated[str | None, Option(metavar="PNG", help="Also draw a picture: .png, .pdf or .svg.")] = None,
    density: Annotated[
        float | None,
        Option(metavar="D", help="The fraction that counts as the top, of statistics.", show_default="0.005"),
    ] = None,
    json_: Json = False,
) -> None:
    """Show what lies where: by layer, by type of module, as a picture.

    Of statistics the Fisher information, of a selection its density, of two selections what they have in common.
    """  # noqa: DOC501 - it is the help text
    picture = None
    if plot is not None:
        from fishkern.report.plots import checked_picture

        picture = checked_picture(plot)
    held = _load(file)
    if density is not None and not isinstance(held, Statistics):
        raise ValueError("a selection has its own density: leave out --density.")
    if other is not None:
        if plot is not None:
            raise ValueError("two selections are compared in a table: leave out --plot, or show one file.")
        _show_comparison(held, _load(other), json_)
    elif isinstance(held, Statistics):
        _show_statistics(held, file, picture, 0.005 if density is None else density, json_)
    else:
        _show_selection(held, file, picture, json_)
    if plot is not None and not json_:
        console().print(f"The picture is in {plot}.")


def _load(path: Path) -> Statistics | Selection:
    try:
        return Statistics.load(path, lazy=True)
    except ValueError as error:
        if "format=fishkern.selection" not in str(error):
            raise
    return Selection.load(path)


def _show_statistics(statistics: Statistics, file: Path, picture: Path | None, density: float, as_json: bool) -> None:
    with progress("reading", "entries") as report:
        summary = summarise(statistics, density, report)
    of = f"of {summary.whole.coordinates:,} entries are"
    if infinite := summary.whole.infinite:
        note(f"{infinite:,} {of} infinite and stand in no sum: something overflowed where they come from")
    if summary.negative and "fisher_type" in statistics.provenance["definition"]:
        note(f"{summary.negative:,} {of} negative, which no mean of squares is: these are not what the file says")
    if as_json:
        held = {"file": str(file), "count": statistics.count, **statistics.provenance, **summary.to_dict()}
        print(json.dumps(held, indent=2))
    else:
        console().print(f"{file}: {statistics!r}\n")
        for run in statistics.provenance["runs"]:
            for key in ("model", "from", "task", "data", "rows", "dtype"):
                if key in run:
                    value = run[key]
                    console().print(f"{key:6} {', '.join(value) if isinstance(value, list) else value}")
            console().print()
        console().print(summary_table(summary))
    if picture is not None:
        from fishkern.report.plots import draw, save

        name = (statistics.provenance["runs"] or [{}])[0].get("model", "")
        title = f"{name} ({file.name}, mean over {statistics.count:,})".strip()
        save(draw(summary, title=title, quantity="Fisher information", unit="nats² per parameter unit²"), picture)


def _show_selection(selection: Selection, file: Path, picture: Path | None, as_json: bool) -> None:
    parts = locate(selection)
    if as_json:
        held = {"file": str(file), "count": selection.count, "total": selection.total, "density": selection.density}
        print(json.dumps({**held, **selection.provenance, **parts.to_dict()}, indent=2))
    else:
        console().print(f"{file}: {selection!r}\n")
        console().print(selection_table(parts))
    if picture is not None:
        from fishkern.report.plots import draw_selection, save

        save(draw_selection(parts, title=f"{file.name}: {selection.count:,} of {selection.total:,}"), picture)


def _show_comparison(one: Statistics | Selection, other: Statistics | Selection, as_json: bool) -> None:
    if not isinstance(one, Selection) or not isinstance(other, Selection):
        raise ValueError("only two selections are compared, and one of these files holds statistics: show it alone.")
    overlap = one.overlap(other)
    shared = one & other
    if as_json:
        by_parameter = one.overlap_by_parameter(other)
        print(json.dumps({"overlap": overlap, "shared": shared.count, "parameters": by_parameter}, indent=2))
        return
    console().print(f"first   {one!r}")
    console().print(f"second  {other!r}")
    console().print(f"overlap {overlap:.2%} (selected by both / selected by either): {shared.count:,} coordinates\n")
    console().print(comparison_table(locate(one), locate(other), locate(shared)))
