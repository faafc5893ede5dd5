"""``fishkern select``: the coordinates to train, from statistics in a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

import fishkern as fk
from fishkern.commands.options import Json, with_options
from fishkern.commands.output import checked_path, console, next_command, progress, size_on_disk
from fishkern.commands.rule_options import RuleOptions
from fishkern.commands.watching import watched
from fishkern.report.tables import contributions_table


@with_options
def select(
    file: Annotated[Path, Argument(metavar="FILE", help="Statistics, as fishkern estimate saves them.")],
    rule: RuleOptions,
    out: Annotated[str, Option(metavar="FILE", help="Output file.")] = "selection.safetensors",
    json_: Json = False,
) -> None:
    """Select the coordinates to train by their scores; exact, whatever the size of the file.

    The statistics are read piece by piece, never as a whole.
    """
    recipe = rule.made()
    target = checked_path(out, fk.Selection)
    statistics = fk.Statistics.load(file, lazy=True)
    with progress("reading", "entries") as report:
        selection = fk.select(watched(statistics, report, times=rule.reads), recipe)
    path = selection.save(target)
    if json_:
        result = {"file": str(path), "count": selection.count, "total": selection.total, "density": selection.density}
        print(json.dumps({**result, **selection.provenance}, indent=2))
        return
    console().print(repr(selection))
    if isinstance(recipe, fk.ContributionTopK):
        console().print(contributions_table(fk.Contributions.of(selection)))
    console().print(f"saved as {path}, {size_on_disk(path)}")
    next_command("fishkern", "show", path)
    console().print(f"or in Python:  optimizer = fk.MaskedAdamW(model, fk.Selection.load({str(path)!r}), lr=5e-5)")
