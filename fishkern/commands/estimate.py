"""``fishkern estimate``: the Fisher of a model on data, into a file."""

from __future__ import annotations

import json
import time
from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from fishkern.commands.options import Json, Workload, with_options
from fishkern.commands.output import checked_path, console, next_command, progress, rows_in_words, size_on_disk, waiting

if TYPE_CHECKING:
    from fishkern.statistics import Estimator


@with_options
def estimate(
    work: Workload,
    out: Annotated[str, Option(metavar="FILE", help="Where the statistics go.")] = "fisher.safetensors",
    samples: Annotated[int, Option(min=1, metavar="N", help="On how many examples.")] = 128,
    fisher_type: Annotated[
        str, Option(metavar="TYPE", help="Labels: empirical (the data's), mc (drawn), type-2 (all).")
    ] = "empirical",
    unit: Annotated[str, Option(metavar="UNIT", help="What is squared: example, position, batch.")] = "example",
    mc_samples: Annotated[
        int | None, Option(min=1, metavar="N", help="With mc: draws for each example.", show_default="1")
    ] = None,
    max_label_passes: Annotated[
        int | None,
        Option(min=1, metavar="N", help="With type-2: most backward passes for a batch.", show_default="4096"),
    ] = None,
    draws: Annotated[
        int | None,
        Option(min=1, metavar="N", help="Sketch it instead, by so many random signs of each example: no exact Fisher."),
    ] = None,
    reduction: Annotated[
        str, Option(metavar="HOW", help="Loss of an example: mean over its tokens, or sum (of its whole text).")
    ] = "mean",
    no_check: Annotated[
        bool, Option("--no-check", help="Leave out the comparison of two examples with ordinary autograd.")
    ] = False,
    accumulate_on: Annotated[
        str, Option(metavar="NAME", help="Device of the sums, such as cpu; by default the model's.")
    ] = "",
    json_: Json = False,
) -> None:
    """Estimate the exact diagonal Fisher of a model on data.

    Columns are found by their usual names, or named by options.

    Rows are drawn at random with the seed, or from the start with --first.

    What was done stands in the file: fishkern show FILE.
    """
    import fishkern as fk

    target = checked_path(out)
    recipe = _recipe(fisher_type, unit, mc_samples, max_label_passes, draws, work.seed)
    with waiting("loading libraries"):
        from fishkern.commands.workload import checked_device, fitting, likelihood_of, predicate, prepare

    if accumulate_on:
        checked_device(accumulate_on, "--accumulate-on")
    likelihood_of(reduction, work.task)
    prepared = prepare(work, samples)
    likelihood = likelihood_of(reduction, prepared.described["task"])
    device = next(prepared.model.parameters()).device
    used = 0

    def run(size: int) -> fk.Statistics:
        nonlocal used
        used = size
        return fk.estimate(
            prepared.model,
            prepared.batches(size),
            recipe,
            likelihood=likelihood,
            parameters=predicate(work.parameters, prepared.model),
            accumulate_on=accumulate_on or None,
            check=not no_check,
            progress=lambda done, _: report(done, len(prepared.examples)),
        )

    start = time.perf_counter()
    with progress("estimating", "examples") as report:
        statistics = fitting(run, work.batch_size, device, len(prepared.examples))
    seconds = time.perf_counter() - start
    statistics = _with_run(statistics, {**prepared.described, "batch_size": used, "from": work.model})
    path = statistics.save(target)
    found = {
        "file": str(path),
        "model": statistics.provenance["runs"][0]["model"],
        "device": str(device),
        **prepared.described,
        "definition": statistics.provenance["definition"],
        "count": statistics.count,
        "coordinates": statistics.total,
        "coverage": dict(Counter(covered.path for covered in statistics.coverage.values())),
        "batch_size": used,
        "seconds": round(seconds, 3),
    }
    if json_:
        print(json.dumps(found, indent=2))
        return
    for key in ("model", "task", "data", "rows", "columns"):
        say = rows_in_words if key == "rows" else _plain
        console().print(f"{key:9} {say(found[key])}")
    console().print(f"{'fisher':9} {_plain(found['definition'])}")
    paths = ", ".join(f"{path} {number:,}" for path, number in found["coverage"].items())
    console().print(f"{'covered':9} {paths} of {len(statistics.coverage):,} parameters")
    rate = len(prepared.examples) / seconds
    console().print(f"{'took':9} {seconds:.1f} s on {device}, {rate:,.1f} examples/s, batch size {used}")
    console().print(f"{'saved':9} {path}, {size_on_disk(path)}")
    next_command("fishkern", "show", path, "--plot", f"{path.name.partition('.')[0]}.png")


def _recipe(
    fisher_type: str, unit: str, mc_samples: int | None, max_label_passes: int | None, draws: int | None, seed: int
) -> Estimator:
    import fishkern as fk

    if draws is not None:
        if (fisher_type, unit, mc_samples, max_label_passes) != ("empirical", "example", None, None):
            raise ValueError("--draws sketches the empirical Fisher of examples: leave out the options of another.")
        return fk.SketchedFisher(draws, seed)
    if mc_samples is not None and fisher_type != "mc":
        raise ValueError(f"--fisher-type {fisher_type} draws nothing: leave out --mc-samples, or --fisher-type mc.")
    if max_label_passes is not None and fisher_type != "type-2":
        raise ValueError(f"--fisher-type {fisher_type} takes no pass for each label: leave out --max-label-passes.")
    more = {} if max_label_passes is None else {"max_label_passes": max_label_passes}
    return fk.DiagonalFisher(fisher_type, unit, mc_samples=mc_samples or 1, seed=seed, **more)


def _with_run(statistics: Any, more: dict[str, Any]) -> Any:
    """Add to the provenance where the examples came from."""
    provenance = statistics.provenance
    provenance["runs"][0] |= more
    return type(statistics)(
        dict(statistics), count=statistics.count, provenance=provenance, coverage=statistics.coverage
    )


def _plain(value: Any) -> str:
    return ", ".join(f"{key} = {entry}" for key, entry in value.items()) if isinstance(value, dict) else str(value)
