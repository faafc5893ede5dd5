"""``fishkern select``: the coordinates to train, from statistics in a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

import fishkern as fk
from fishkern.commands.options import Json
from fishkern.commands.output import checked_path, console, next_command, progress, size_on_disk
from fishkern.commands.watching import watched

RULES = ("global", "per-tensor", "per-row", "random")


def select(
    file: Annotated[Path, Argument(metavar="FILE", help="Statistics, as fishkern estimate saves them.")],
    density: Annotated[
        float | None, Option(metavar="D", help="Fraction of the coordinates to select.", show_default="0.005")
    ] = None,
    k: Annotated[int | None, Option(metavar="N", help="Or this many coordinates.")] = None,
    rule: Annotated[
        str, Option(metavar="RULE", help="global, per-tensor, per-row (k of each row), random.")
    ] = "global",
    smallest: Annotated[bool, Option("--smallest", help="The smallest scores instead of the largest.")] = False,
    always: Annotated[list[str], Option(metavar="PATTERN", help="Parameters to select whole; repeatable.")] = (),
    never: Annotated[list[str], Option(metavar="PATTERN", help="Parameters to select nothing of; repeatable.")] = (),
    seed: Annotated[int | None, Option(metavar="N", help="Seed of the random rule.", show_default="0")] = None,
    out: Annotated[str, Option(metavar="FILE", help="Output file.")] = "selection.safetensors",
    json_: Json = False,
) -> None:
    """Select the coordinates to train by their scores; exact, whatever the size of the file.

    The statistics are read piece by piece, never as a whole.
    """
    recipe = _recipe(rule, k, density, smallest=smallest, seed=seed, always=always, never=never)
    target = checked_path(out, fk.Selection)
    statistics = fk.Statistics.load(file, lazy=True)
    with progress("reading", "entries") as report:
        selection = fk.select(watched(statistics, report), recipe)
    path = selection.save(target)
    if json_:
        result = {"file": str(path), "count": selection.count, "total": selection.total, "density": selection.density}
        print(json.dumps({**result, **selection.provenance}, indent=2))
        return
    console().print(repr(selection))
    console().print(f"saved as {path}, {size_on_disk(path)}")
    next_command("fishkern", "show", path)


def _recipe(
    rule: str, k: int | None, density: float | None, *, smallest: bool, seed: int | None, **patterns: list[str]
) -> fk.Rule:
    order = "smallest" if smallest else "largest"
    if rule not in RULES:
        raise ValueError(f"--rule is one of {', '.join(RULES)}, got {rule!r}.")
    if rule == "random" and smallest:
        raise ValueError("--rule random looks at no score: leave out --smallest.")
    if rule != "random" and seed is not None:
        raise ValueError(f"--rule {rule} draws nothing: leave out --seed.")
    if rule == "per-row":
        if k is None or density is not None:
            raise ValueError("--rule per-row takes --k, the number of coordinates of each row, and no --density.")
        return fk.PerRowTopK(k, order, **patterns)
    if k is None and density is None:
        density = 0.005
    if rule == "random":
        return fk.Random(k, density, seed or 0, **patterns)
    return (fk.GlobalTopK if rule == "global" else fk.PerTensorTopK)(k, density, order, **patterns)
