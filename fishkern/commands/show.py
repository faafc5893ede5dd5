"""``fishkern show``: what a file holds, as a table, a picture, or JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from fishkern.commands.options import Json
from fishkern.commands.output import console, note, progress, rows_in_words
from fishkern.commands.watching import watched
from fishkern.files import StoredTensor, format_of, in_brief
from fishkern.report import held_values, locate, summarise
from fishkern.report.tables import comparison_table, selection_table, summary_table, values_table
from fishkern.selection import Delta, Selection, open_start
from fishkern.statistics import Statistics


def show(
    file: Annotated[Path, Argument(metavar="FILE", help="Statistics, a selection, a delta or a start.")],
    other: Annotated[
        Path | None,
        Argument(metavar="OTHER", help="A selection to compare it with, or the start that a delta moved from."),
    ] = None,
    plot: Annotated[str | None, Option(metavar="PNG", help="Also draw a picture: .png, .pdf or .svg.")] = None,
    density: Annotated[
        float | None,
        Option(metavar="D", help="The fraction that counts as the top, of statistics.", show_default="0.005"),
    ] = None,
    json_: Json = False,
) -> None:
    """Show what lies where: by layer, by type of module, as a picture.

    Of statistics the Fisher information, of a selection its density, of two selections what they have in common, of a
    delta its values and how far they have moved from the start that lies beside it.
    """  # noqa: DOC501 - it is the help text
    if density is not None and not 0 < density <= 1:
        raise ValueError(f"--density is a fraction in (0, 1], got {density:g}.")
    picture = None
    if plot is not None:
        from fishkern.report.plots import checked_picture

        picture = checked_picture(plot)
    held = _load(file)
    if density is not None and not isinstance(held, Statistics):
        raise ValueError(f"--density is for statistics, and {file} holds {_what(held)}: leave it out.")
    if isinstance(held, Delta | Start):
        if plot is not None:
            raise ValueError(f"{_what(held)} is shown in a table: leave out --plot.")
        _show_values(held, file, other, json_)
    elif other is not None:
        if plot is not None:
            raise ValueError("two selections are compared in a table: leave out --plot, or show one file.")
        _show_comparison(held, _load(other), json_)
    elif isinstance(held, Statistics):
        _show_statistics(held, file, picture, 0.005 if density is None else density, json_)
    else:
        _show_selection(held, file, picture, json_)
    if plot is not None and not json_:
        console().print(f"The picture is in {plot}.")


class Start(dict[str, StoredTensor]):
    """The values of a start by parameter name, on disk."""


Shown = Statistics | Selection | Delta | Start

_KINDS: dict[str, Callable[[Path], Shown]] = {
    "fishkern.statistics": lambda path: Statistics.load(path, lazy=True),
    "fishkern.selection": Selection.load,
    "fishkern.delta": Delta.load,
    "fishkern.start": lambda path: Start(open_start(path)),
}


def _load(path: Path) -> Shown:
    expected = "statistics, a selection, a delta or a start; made by fishkern estimate / select / tune"
    if path.is_dir():
        inside = sorted(file.name for file in path.glob("*.safetensors"))
        found = f"name a file in it, such as {path / inside[0]}" if inside else f"expected {expected}"
        raise IsADirectoryError(f"{path} is a folder: {found}.")
    try:
        kind = format_of(path)
    except ValueError as error:
        raise ValueError(f"{str(error).rstrip('.')}; expected {expected}.") from None
    if kind not in _KINDS:
        says = "says nothing of a format" if kind is None else f"says format={in_brief(kind, 40)}"
        raise ValueError(f"{path} is no file of fishkern's (its header {says}): expected {expected}.")
    return _KINDS[kind](path)


def _what(held: Shown) -> str:
    names = {Statistics: "statistics", Selection: "a selection", Delta: "a delta", Start: "a start"}
    return names[type(held)]


def _show_values(held: Delta | Start, file: Path, other: Path | None, as_json: bool) -> None:
    if isinstance(held, Start):
        if other is not None:
            raise ValueError("a start is compared with a delta: name the delta first.")
        found, title = held_values({name: tensor.read() for name, tensor in held.items()}), f"a start of {len(held)}"
        title += " parameters"
        beside = None
    else:
        beside = file.with_name("start.safetensors") if other is None else other
        start = None
        if other is not None or beside.is_file():
            start = _load(beside)
            if not isinstance(start, Start):
                raise ValueError(f"a delta is compared with a start, and {beside} holds {_what(start)}.")
        read = None if start is None else {name: tensor.read() for name, tensor in start.items()}
        found, title = held_values(held, read), repr(held)
        beside = None if start is None else beside
    if as_json:
        whose = {} if beside is None else {"start": str(beside)}
        print(json.dumps({"file": str(file), **whose, **found.to_dict()}, indent=2))
        return
    console().print(f"{file}: {title}\n")
    console().print(values_table(found))
    whole = found.whole
    if beside is not None:
        moved = f"{whole.moved:,} of {whole.values:,} have moved from {beside}"
        console().print(f"{moved}, by {whole.largest_move:.3g} at most")
    elif isinstance(held, Delta):
        note("how far they have moved is not known without the start: fishkern show DELTA START")


def _show_statistics(statistics: Statistics, file: Path, picture: Path | None, density: float, as_json: bool) -> None:
    with progress("reading", "entries") as report:
        summary = summarise(watched(statistics, report, times=2), density)
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
                    console().print(f"{key:6} {in_brief(_in_words(key, run[key]), 400)}")
            console().print()
        console().print(summary_table(summary))
    if picture is not None:
        from fishkern.report.plots import draw, save

        name = (statistics.provenance["runs"] or [{}])[0].get("model", "")
        title = f"{name} ({file.name}, mean over {statistics.count:,})".strip()
        save(draw(summary, title=title, quantity="Fisher information", unit="nats² per parameter unit²"), picture)


def _in_words(key: str, value: Any) -> str:
    if key == "rows":
        return rows_in_words(value)
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


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


def _show_comparison(one: Shown, other: Shown, as_json: bool) -> None:
    for held in (one, other):
        if not isinstance(held, Selection):
            raise ValueError(f"only two selections are compared, and one of these is {_what(held)}: show it alone.")
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
