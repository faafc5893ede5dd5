"""``fishkern show``: the contents of a file, as a table, a picture, or JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from fishkern.commands.options import Json
from fishkern.commands.output import console, note, progress, rows_in_words
from fishkern.commands.show_freezer import show_freezer
from fishkern.commands.show_tokens import show_tokens
from fishkern.commands.watching import watched
from fishkern.files import StoredTensor, format_of, in_brief
from fishkern.freezing.saved import FreezerState
from fishkern.initialization import AdapterInit
from fishkern.report import Summary, locate, summarise, summarise_energies, summarise_start, summarise_values
from fishkern.report.tables import (
    comparison_table,
    contributions_table,
    energies_table,
    ranks_tables,
    selection_table,
    start_table,
    summary_table,
    values_table,
)
from fishkern.selection import Contributions, Delta, Selection, open_start
from fishkern.statistics import Energies, FactoredStatistics, Statistics
from fishkern.tokens import TokenReduction
from fishkern.tokens.recipe import FILE as TOKENS
from fishkern.tokens.recipe import FORMAT as REDUCTION

DENSITY = 0.005
_TEXT = (".json", ".yaml", ".yml", ".txt", ".md", ".csv")


class Start(dict[str, StoredTensor]):
    """The values of a start by parameter name, on disk."""


Content = (
    Statistics | FactoredStatistics | Selection | Delta | Start | Energies | AdapterInit | FreezerState | TokenReduction
)


@dataclass(frozen=True)
class _Kind:
    """A kind of file: the type of its content, what to call it, and how to read it."""

    content: type[Content]
    name: str
    load: Callable[[Path], Content]


_KINDS: dict[str, _Kind] = {
    "fishkern.statistics": _Kind(Statistics, "statistics", lambda path: Statistics.load(path, lazy=True)),
    "fishkern.factored-statistics": _Kind(
        FactoredStatistics, "factored statistics", lambda path: FactoredStatistics.load(path, lazy=True)
    ),
    "fishkern.selection": _Kind(Selection, "a selection", Selection.load),
    "fishkern.delta": _Kind(Delta, "a delta", Delta.load),
    "fishkern.start": _Kind(Start, "a start", lambda path: Start(open_start(path))),
    "fishkern.energies": _Kind(Energies, "energies", lambda path: Energies.load(path, lazy=True)),
    "fishkern.adapter-init": _Kind(AdapterInit, "the start of an adapter", AdapterInit.load),
    "fishkern.freezer": _Kind(FreezerState, "a freezer", FreezerState.load),
    REDUCTION.name: _Kind(TokenReduction, "a token reduction", TokenReduction.load),
}


def show(
    file: Annotated[
        Path,
        Argument(
            metavar="FILE",
            help="Statistics, a selection, a delta, a start, energies, an adapter's start, a freezer, or a token "
            "reduction.",
        ),
    ],
    other: Annotated[
        Path | None,
        Argument(metavar="OTHER", help="A selection to compare it with, or the start that a delta was trained from."),
    ] = None,
    plot: Annotated[str | None, Option(metavar="PNG", help="Also draw a picture: .png, .pdf or .svg.")] = None,
    density: Annotated[
        float | None,
        Option(metavar="D", help="The fraction that counts as the top, of statistics.", show_default=str(DENSITY)),
    ] = None,
    model: Annotated[
        str,
        Option(metavar="MODEL", help="The model of a token reduction: its folder or id.", show_default="none"),
    ] = "",
    image: Annotated[
        list[Path],
        Option(metavar="FILE", help="An image to draw a token reduction on; may be repeated.", show_default="none"),
    ] = (),
    json_: Json = False,
) -> None:
    """Show the contents of a file: by layer, by type of module, as a picture.

    For statistics the Fisher information, for a selection its density, for two selections what they share, for a delta
    its values and how far they have moved from the start, by default start.safetensors in the same folder. For energies
    how many directions hold them, for the start of an adapter its ranks and its size relative to the weights. For a
    freezer what has stopped training and when, and with --plot the score of every slice by reading. For a token
    reduction which layers drop image tokens; with --model, --image and --plot, which patches of the images are left.
    """  # noqa: DOC501 - it is the help text
    if density is not None and not 0 < density <= 1:
        raise ValueError(f"--density is a fraction in (0, 1], got {density:g}.")
    picture = None
    if plot is not None:
        from fishkern.report.plots import checked_picture

        picture = checked_picture(plot)
    content = _load(file)
    of_entries = isinstance(content, Statistics | FactoredStatistics)
    if density is not None and not of_entries:
        raise ValueError(f"--density is for statistics, and {file} holds {_name(content)}: leave it out.")
    if plot is not None and isinstance(content, Delta | Start):
        raise ValueError(f"{_name(content)} is shown in a table: leave out --plot.")
    if other is not None and isinstance(content, Energies | AdapterInit | FreezerState | TokenReduction):
        raise ValueError(f"only selections and deltas are compared, and {file} holds {_name(content)}: show it alone.")
    if (model or image) and not isinstance(content, TokenReduction):
        option = "--model" if model else "--image"
        raise ValueError(f"{option} is for a token reduction, and {file} holds {_name(content)}: leave it out.")
    if plot is not None and other is not None:
        raise ValueError("two selections are compared in a table: leave out --plot, or show one file.")
    if isinstance(content, Start):
        if other is not None:
            raise ValueError("a start is compared with a delta: name the delta first.")
        _show_start(content, file, as_json=json_)
    elif isinstance(content, Delta):
        _show_delta(content, file, other, as_json=json_)
    elif isinstance(content, Energies):
        _show_energies(content, file, picture, as_json=json_)
    elif isinstance(content, AdapterInit):
        _show_init(content, file, picture, as_json=json_)
    elif isinstance(content, FreezerState):
        show_freezer(content, file, picture, as_json=json_)
    elif isinstance(content, TokenReduction):
        show_tokens(content, file, model, image, picture, as_json=json_)
    elif other is not None:
        _show_comparison(content, _load(other), as_json=json_)
    elif of_entries:
        _show_statistics(content, file, picture, DENSITY if density is None else density, as_json=json_)
    else:
        _show_selection(content, file, picture, as_json=json_)
    if plot is not None and not json_:
        console().print(f"The picture is in {plot}.")


def _load(path: Path) -> Content:
    expected = (
        "statistics, a selection, a delta, a start, energies, an adapter's start, a freezer or a token reduction; made "
        "by fishkern estimate / select / tune / ranks / init"
    )
    if path.is_dir():
        inside = sorted(file.name for file in path.glob("*.safetensors"))
        advice = f"name a file in it, such as {path / inside[0]}" if inside else f"expected {expected}"
        raise IsADirectoryError(f"{path} is a folder: {advice}.")
    if path.is_file() and _holds_reduction(path):
        return TokenReduction.load(path)
    if path.is_file() and path.suffix in _TEXT and not path.name.endswith(".index.json"):
        raise ValueError(f"{path} is a text, which any editor shows: expected {expected}.")
    try:
        kind = format_of(path)
    except ValueError as error:
        raise ValueError(f"{str(error).rstrip('.')}; expected {expected}.") from None
    if kind not in _KINDS:
        says = "names no format" if kind is None else f"says format={in_brief(kind, 40)}"
        raise ValueError(f"{path} cannot be shown (its header {says}): expected {expected}.")
    return _KINDS[kind].load(path)


def _holds_reduction(path: Path) -> bool:
    """Recognise a token reduction by its name, or else by how its text begins."""
    if path.name == TOKENS:
        return True
    with path.open("rb") as file:
        return path.suffix == ".json" and REDUCTION.name.encode() in file.read(100)


def _name(content: Content) -> str:
    return next(kind.name for kind in _KINDS.values() if kind.content is type(content))


def _show_start(start: Start, file: Path, *, as_json: bool) -> None:
    values = summarise_values({name: tensor.read() for name, tensor in start.items()})
    if as_json:
        _print_json({"file": str(file), **values.to_dict()})
        return
    console().print(f"{file}: a start of {len(start)} parameters\n")
    console().print(values_table(values))


def _show_delta(delta: Delta, file: Path, other: Path | None, *, as_json: bool) -> None:
    path = _start_of(file, other)
    start = None if path is None else _load(path)
    if start is not None and not isinstance(start, Start):
        raise ValueError(f"a delta is compared with a start, and {path} holds {_name(start)}.")
    values = summarise_values(delta, None if start is None else {name: tensor.read() for name, tensor in start.items()})
    if as_json:
        _print_json({"file": str(file), **({} if path is None else {"start": str(path)}), **values.to_dict()})
        return
    console().print(f"{file}: {delta!r}\n")
    console().print(values_table(values))
    if path is None:
        note("how far they have moved is not known without the start: fishkern show DELTA START")
    else:
        whole = values.whole
        moved = f"{whole.moved:,} of {whole.values:,} have moved from {path}"
        console().print(f"{moved}, by {whole.largest_move:.3g} at most")


def _start_of(file: Path, other: Path | None) -> Path | None:
    """Give the start that the user names, else the one in the folder of the delta, if there is one."""
    neighbour = file.with_name("start.safetensors")
    return other or (neighbour if neighbour.is_file() else None)


def _show_statistics(
    statistics: Statistics | FactoredStatistics, file: Path, picture: Path | None, density: float, *, as_json: bool
) -> None:
    with progress("reading", "entries") as report:
        if isinstance(statistics, Statistics):
            summary = summarise(watched(statistics, report, times=2), density)
        else:  # whose entries are formed from factors that are soon read
            summary = summarise(dict(statistics), density, report)
    _note_impossible(summary, statistics)
    if as_json:
        _print_json({"file": str(file), "count": statistics.count, **statistics.provenance, **summary.to_dict()})
    else:
        console().print(f"{file}: {statistics!r}\n")
        _print_runs(statistics)
        console().print(summary_table(summary))
    if picture is not None:
        from fishkern.report.plots import draw, save

        model = (statistics.provenance["runs"] or [{}])[0].get("model", "")
        title = f"{model} ({file.name}, mean over {statistics.count:,})".strip()
        quantity, unit = _quantity(statistics.provenance["definition"])
        save(draw(summary, title=title, quantity=quantity, unit=unit), picture)


def _quantity(definition: dict[str, Any]) -> tuple[str, str]:
    """Name the numbers of statistics, and their unit where they are a Fisher information."""
    if "fisher_type" in definition:
        return "Fisher information", "nats² per parameter unit²"
    return str(definition.get("score") or definition.get("estimator") or "score"), ""


def _print_runs(content: Statistics | FactoredStatistics | Energies) -> None:
    for run in content.provenance["runs"]:
        for key in ("model", "from", "task", "data", "rows", "dtype"):
            if key in run:
                console().print(f"{key:6} {in_brief(_in_words(key, run[key]), 400)}")
        console().print()


def _note_impossible(summary: Summary, statistics: Statistics | FactoredStatistics) -> None:
    """Point out entries that no Fisher can have."""
    of = f"of {summary.whole.coordinates:,} entries are"
    if infinite := summary.whole.infinite:
        note(f"{infinite:,} {of} infinite and left out of every sum: something overflowed while they were computed")
    if summary.negative and "fisher_type" in statistics.provenance["definition"]:
        note(f"{summary.negative:,} {of} negative, which a mean of squares cannot be: the file is not what it says")


def _in_words(key: str, value: Any) -> str:
    if key == "rows":
        return rows_in_words(value)
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _show_selection(selection: Selection, file: Path, picture: Path | None, *, as_json: bool) -> None:
    parts = locate(selection)
    if as_json:
        numbers = {"count": selection.count, "total": selection.total, "density": selection.density}
        _print_json({"file": str(file), **numbers, **selection.provenance, **parts.to_dict()})
    else:
        console().print(f"{file}: {selection!r}\n")
        console().print(selection_table(parts))
        if "contributions" in selection.provenance:
            console().print(contributions_table(Contributions.of(selection)))
    if picture is not None:
        from fishkern.report.plots import draw_selection, save

        save(draw_selection(parts, title=f"{file.name}: {selection.count:,} of {selection.total:,}"), picture)


def _show_energies(energies: Energies, file: Path, picture: Path | None, *, as_json: bool) -> None:
    with progress("reading", "matrices") as report:
        summary = summarise_energies(energies, report)
    if as_json:
        _print_json({"file": str(file), "count": energies.count, **energies.provenance, **summary.to_dict()})
    else:
        console().print(f"{file}: {energies!r}\n")
        _print_runs(energies)
        console().print(energies_table(summary))
    if picture is not None:
        from fishkern.report.plots import draw_energies, save

        model = (energies.provenance["runs"] or [{}])[0].get("model", "")
        title = f"{model} ({file.name}, mean over {energies.count:,})".strip()
        save(draw_energies(summary, title=title), picture)


def _show_init(init: AdapterInit, file: Path, picture: Path | None, *, as_json: bool) -> None:
    parts, ranks = summarise_start(init), {f"{path}.weight": rank for path, rank in init.ranks.items()}
    if as_json:
        _print_json({"file": str(file), **init.provenance, **parts.to_dict()})
    else:
        console().print(f"{file}: {init!r}\n")
        origin = {**init.provenance.get("inputs", {}), **{"method": init.provenance.get("method", {}).get("name")}}
        for key in ("method", "model", "from", "task", "data", "rows"):
            if origin.get(key) is not None:
                console().print(f"{key:6} {in_brief(_in_words(key, origin[key]), 400)}")
        console().print()
        if parts.whole.least != parts.whole.most:
            for table in ranks_tables(ranks):
                console().print(table)
        console().print(start_table(parts))
    if picture is not None:
        from fishkern.report.plots import draw_start, save

        save(draw_start(parts, title=f"{file.name}: {init!r}"), picture)


def _show_comparison(one: Content, other: Content, *, as_json: bool) -> None:
    for content in (one, other):
        if not isinstance(content, Selection):
            raise ValueError(f"only two selections are compared, and one of these is {_name(content)}: show it alone.")
    overlap, shared = one.overlap(other), one & other
    if as_json:
        by_parameter = one.overlap_by_parameter(other)
        _print_json({"overlap": overlap, "shared": shared.count, "parameters": by_parameter})
        return
    console().print(f"first   {one!r}")
    console().print(f"second  {other!r}")
    console().print(f"overlap {overlap:.2%} (selected by both / selected by either): {shared.count:,} coordinates\n")
    console().print(comparison_table(locate(one), locate(other), locate(shared)))


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, indent=2))
