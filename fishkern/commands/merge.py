"""``fishkern merge``: one model of several, each weight by how much each of them needs it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

import fishkern as fk
from fishkern.commands.options import Json, with_options
from fishkern.commands.output import console, progress


@with_options
def merge(
    models: Annotated[
        list[Path], Argument(metavar="MODEL", help="Folders of two or more models, as save_pretrained writes them.")
    ],
    fisher: Annotated[
        list[Path], Option(metavar="FILE", help="Statistics of each model, in the order of the models; once for each.")
    ],
    weight: Annotated[
        list[float], Option(metavar="W", help="Weight of each model; once for each, or not at all for equal ones.")
    ] = (),
    floor: Annotated[float, Option(min=0.0, metavar="F", help="Least Fisher information of an entry.")] = 0.0,
    own: Annotated[
        list[str],
        Option(
            metavar="PATTERN", help="Tensors that are not merged but are the first model's, such as 'classifier.*'."
        ),
    ] = (),
    out: Annotated[str, Option(metavar="FOLDER", help="Output folder, new or empty.")] = "merged",
    json_: Json = False,
) -> None:
    """Merge models of one architecture: the mean of each weight, by the Fisher information in each model.

    Models and statistics are read piece by piece, never as a whole. Config, tokenizer and --own are those of the first
    model.
    """  # noqa: DOC501 - it is the help text
    if len(fisher) != len(models):
        raise ValueError(
            f"--fisher names the statistics of each model, in their order: {len(models)} models and {len(fisher)} "
            "files are given."
        )
    if weight and len(weight) != len(models):
        raise ValueError(f"--weight is given once for each model: {len(models)} models and {len(weight)} weights.")
    if len(set(models)) < len(models):
        raise ValueError("a model is named twice.")
    statistics = [fk.Statistics.load(file, lazy=True) for file in fisher]
    start = time.perf_counter()
    with progress("merging", "entries") as report:
        folder = fk.merge_checkpoints(
            dict(zip(models, statistics, strict=True)),
            out,
            weights=weight or None,
            floor=floor,
            own=own,
            progress=report,
        )
    seconds = time.perf_counter() - start
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if json_:
        print(json.dumps({"folder": str(folder), "bytes": size, "seconds": round(seconds, 3)}, indent=2))
        return
    say = console().print
    say(f"merged  {', '.join(map(str, models))}")
    say(f"took    {seconds:.1f} s")
    say(f"saved   {folder}, {size / 1e6:,.1f} MB")
