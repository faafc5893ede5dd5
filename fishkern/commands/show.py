"""``fishkern show``: what a file holds, as a table, a picture, or JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from fishkern.commands.options import Json
from fishkern.commands.output import console, progress


def show(
    file: Annotated[Path, Argument(metavar="FILE", help="What fishkern estimate saved.")],
    plot: Annotated[Path | None, Option(metavar="PNG", help="Also draw a picture: .png, .pdf or .svg.")] = None,
    density: Annotated[float, Option(metavar="D", help="The fraction that counts as the top.")] = 0.005,
    json_: Json = False,
) -> None:
    """Show where the Fisher information lies: by layer, by type of module, as a picture."""
    import fishkern as fk
    from fishkern.report import summarise
    from fishkern.report.tables import summary_table

    if plot is not None:
        from fishkern.report import plots

        plots.checked_picture(plot)
    statistics = fk.Statistics.load(file, lazy=True)
    with progress("reading", "entries") as report:
        summary = summarise(statistics, density, report)
    if json_:
        held = {"file": str(file), "count": statistics.count, **statistics.provenance, **summary.to_dict()}
        print(json.dumps(held, indent=2))
    else:
        console().print(f"{file}: {statistics!r}\n")
        for run in statistics.provenance["runs"]:
            described = {key: run[key] for key in ("model", "from", "task", "data", "rows", "dtype") if key in run}
            for key, value in described.items():
                console().print(f"{key:6} {', '.join(value) if isinstance(value, list) else value}")
            console().print()
        console().print(summary_table(summary))
    if plot is not None:
        name = (statistics.provenance["runs"] or [{}])[0].get("model", "")
        figure = plots.draw(
            summary,
            title=f"{name} ({file.name}, mean over {statistics.count:,})".strip(),
            quantity="Fisher information",
            unit="nats² per parameter unit²",
        )
        plots.save(figure, plot)
        if not json_:
            console().print(f"The picture is in {plot}.")
