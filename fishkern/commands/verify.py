"""``fishkern verify``: the Fisher against a loop with batch size 1, on a model and data of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Option

import fishkern as fk
from fishkern.commands.options import Workload, with_options
from fishkern.commands.output import checked_report, console, progress, rows_in_words
from fishkern.commands.workload import Prepared, fitting, likelihood_of, predicate, prepare
from fishkern.files import atomic_write
from fishkern.report.tables import verification_rows, verification_table

SAMPLES = 32
ROWS = 12  # of the table, without --all


@with_options
def verify(
    work: Workload,
    samples: Annotated[
        int | None,
        Option(
            min=1,
            metavar="N",
            help="Number of examples; with --statistics that of the file.",
            show_default=str(SAMPLES),
        ),
    ] = None,
    statistics: Annotated[
        Path | None,
        Option(metavar="FILE", help="Verify this file, made with the same options; else estimate first."),
    ] = None,
    density: Annotated[float, Option(metavar="D", help="Compare the largest fraction D of all entries.")] = 0.005,
    all_: Annotated[bool, Option("--all", help="Show the error of every parameter, not only the largest.")] = False,
    json_: Annotated[
        str, Option("--json", metavar="FILE", help="Also write the whole report as JSON; - for standard output.")
    ] = "",
) -> int:
    """Compare the Fisher with a loop that back-propagates one example at a time.

    The exit status is 0 if every parameter equals the loop up to rounding and the model's own batch noise, else 1.
    """  # noqa: DOC201, DOC501 - it is the help text
    if not 0 < density <= 1:
        raise ValueError(f"--density is a fraction in (0, 1], got {density:g}.")
    if json_ not in ("", "-"):
        checked_report(json_, "--json", ("ok", "failures", "compared"))
    stored = None if statistics is None else fk.Statistics.load(statistics, lazy=True)
    prepared = prepare(work, samples or (SAMPLES if stored is None else stored.count))
    if stored is not None:
        _check_same(stored, prepared.described, statistics)
    verification = _verify(prepared, work, stored, density)
    if json_ == "-":
        print(verification.to_json())
    else:
        _show(verification, len(verification.compared) if all_ else ROWS)
        if json_:
            with atomic_write(json_, "w") as file:
                file.write(verification.to_json() + "\n")
            console().print(f"The report is in {json_}.")
    return 0 if verification.ok else 1


def _verify(prepared: Prepared, work: Workload, stored: fk.Statistics | None, density: float) -> fk.Verification:
    definition = "" if stored is None else str(stored.provenance["definition"].get("likelihood"))
    reduction = "sum" if "reduction='sum'" in definition else "mean"
    likelihood = likelihood_of(reduction, prepared.described["task"])

    def run(size: int) -> fk.Verification:
        return fk.verify(
            prepared.model,
            prepared.batches(size),
            stored,
            predicate(work.parameters, prepared.model),
            likelihood=likelihood,
            density=density,
            progress=report,
        )

    with progress("comparing", "examples") as report:
        return fitting(run, work.batch_size, prepared.device, len(prepared.examples))


def _show(verification: fk.Verification, most: int) -> None:
    rows = verification_rows(verification, most)
    if len(rows) < len(verification.compared):
        console().print(f"the {len(rows)} largest errors of {len(verification.compared):,} (--all shows each)\n")
    console().print(verification_table(rows))
    for line in verification.summary:
        console().print(line)


def _check_same(stored: fk.Statistics, described: dict[str, Any], path: Path) -> None:
    """Refuse statistics that were estimated on other examples."""
    for run in stored.provenance["runs"]:
        for key, value in described.items():
            if (recorded := run.get(key, value)) == value:
                continue
            if key == "rows":  # files of older versions have them in words
                recorded, value = rows_in_words(recorded), rows_in_words(value)
            if recorded != value:
                raise ValueError(f"{path} was estimated with {key} = {recorded}, these options give {value}.")
