"""``fishkern estimate``: the Fisher of a model on data, into a file."""

from __future__ import annotations

import json
import time
from collections import Counter
from typing import Annotated, Any

from typer import Option

from fishkern.commands.options import Json, Workload, with_options
from fishkern.commands.output import checked_path, console, progress, size_on_disk


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
    json_: Json = False,
) -> None:
    """Estimate the exact diagonal Fisher of a model on data.

    Columns are found by their usual names, or named by options.

    Rows are drawn at random with the seed, or from the start with --first.

    What was done stands in the file: fishkern show FILE.
    """  # noqa: DOC501 - it is the help text
    import fishkern as fk
    from fishkern.commands.workload import fitting, predicate, prepare

    target = checked_path(out)
    recipe = fk.DiagonalFisher(fisher_type, unit, mc_samples=mc_samples or 1, seed=work.seed)
    if mc_samples is not None and fisher_type != "mc":
        raise ValueError(f"--fisher-type {fisher_type} draws nothing: leave out --mc-samples, or --fisher-type mc.")
    prepared = prepare(work, samples)
    device = next(prepared.model.parameters()).device
    used = 0

    def run(size: int) -> fk.Statistics:
        nonlocal used
        used = size
        return fk.estimate(
            prepared.model,
            prepared.batches(size),
            recipe,
            parameters=predicate(work.parameters, prepared.model),
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
        console().print(f"{key:9} {_plain(found[key])}")
    console().print(f"{'fisher':9} {_plain(found['definition'])}")
    paths = ", ".join(f"{path} {number:,}" for path, number in found["coverage"].items())
    console().print(f"{'covered':9} {paths} of {len(statistics.coverage):,} parameters")
    rate = len(prepared.examples) / seconds
    console().print(f"{'took':9} {seconds:.1f} s on {device}, {rate:.1f} examples/s, batch size {used}")
    console().print(f"{'saved':9} {path}, {size_on_disk(path)}")
    console().print(f"\nNext:  fishkern show {path} --plot {path.name.partition('.')[0]}.png")


def _with_run(statistics: Any, more: dict[str, Any]) -> Any:
    """Add to the provenance where the examples came from."""
    provenance = statistics.provenance
    provenance["runs"][0] |= more
    return type(statistics)(
        dict(statistics), count=statistics.count, provenance=provenance, coverage=statistics.coverage
    )


def _plain(value: Any) -> str:
    return ", ".join(f"{key} = {entry}" for key, entry in value.items()) if isinstance(value, dict) else str(value)
