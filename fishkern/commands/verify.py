"""``fishkern verify``: the Fisher against a loop with batch size 1, on one's own model and data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from fishkern.commands.options import Workload, with_options
from fishkern.commands.output import checked_report, console, progress, rows_in_words, waiting

if TYPE_CHECKING:
    from fishkern.statistics import Statistics


@with_options
def verify(
    work: Workload,
    samples: Annotated[
        int | None,
        Option(min=1, metavar="N", help="On how many examples; with --statistics on theirs.", show_default="32"),
    ] = None,
    statistics: Annotated[
        Path | None,
        Option(metavar="FILE", help="Verify this file, made with the same options; else estimated afresh."),
    ] = None,
    density: Annotated[float, Option(metavar="D", help="Compare the largest fraction D of all entries.")] = 0.005,
    all_: Annotated[bool, Option("--all", help="Show the error of every parameter, not the largest alone.")] = False,
    json_: Annotated[
        str, Option("--json", metavar="FILE", help="Also write the whole report as JSON; - for standard output.")
    ] = "",
) -> int:
    """Compare the Fisher with a loop that back-propagates one example at a time.

    The exit status is 0 when every parameter equals the loop up to rounding and the model's own batch noise, else 1.
    """  # noqa: DOC201, DOC501 - it is the help text
    import fishkern as fk
    from fishkern.files import atomic_write
    from fishkern.report.tables import verification_rows, verification_table

    if not 0 < density <= 1:
        raise ValueError(f"--density is a fraction in (0, 1], got {density:g}.")

    if json_ not in ("", "-"):
        checked_report(json_, "--json", ("ok", "failures", "compared"))
    given = None if statistics is None else fk.Statistics.load(statistics, lazy=True)
    with waiting("loading libraries"):
        from fishkern.commands.workload import fitting, likelihood_of, predicate, prepare
    prepared = prepare(work, samples or (32 if given is None else given.count))
    if given is not None:
        _check_same(given, prepared.described, statistics)
    said = "" if given is None else str(given.provenance["definition"].get("likelihood"))
    likelihood = likelihood_of("sum" if "reduction='sum'" in said else "mean", prepared.described["task"])
    device = next(prepared.model.parameters()).device
    with progress("comparing", "examples") as report:
        found = fitting(
            lambda size: fk.verify(
                prepared.model,
                prepared.batches(size),
                given,
                predicate(work.parameters, prepared.model),
                likelihood=likelihood,
                density=density,
                progress=report,
            ),
            work.batch_size,
            device,
            len(prepared.examples),
        )
    if json_ == "-":
        print(found.to_json())
    else:
        rows = verification_rows(found, len(found.compared) if all_ else 12)
        if len(rows) < len(found.compared):
            console().print(f"the {len(rows)} largest errors of {len(found.compared):,} (--all shows each)\n")
        console().print(verification_table(rows))
        for line in found.summary:
            console().print(line)
        if json_:
            with atomic_write(json_, "w") as file:
                file.write(found.to_json() + "\n")
            console().print(f"The report is in {json_}.")
    return 0 if found.ok else 1


def _check_same(given: Statistics, described: dict, path: Path) -> None:
    """Refuse statistics that were estimated on other examples."""
    for run in given.provenance["runs"]:
        for key, value in described.items():
            if (there := run.get(key, value)) == value:
                continue
            if key == "rows":
                there, value = rows_in_words(there), rows_in_words(value)
            if there != value:
                raise ValueError(f"{path} was estimated with {key} = {there}, these options give {value}.")
