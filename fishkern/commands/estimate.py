"""``fishkern estimate``: the Fisher of a model on data, into a file."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from typer import Option

import fishkern as fk
from fishkern.arguments import byte_count
from fishkern.commands.options import Json, Workload, with_options
from fishkern.commands.output import (
    checked_path,
    console,
    next_command,
    note,
    progress,
    rows_in_words,
    size_on_disk,
)
from fishkern.commands.parts import demand_same_passes, discard, divided, unfinished_pass
from fishkern.commands.workload import Prepared, checked_device, fitting, likelihood_of, predicate, prepare, with_origin


@with_options
def estimate(
    work: Workload,
    out: Annotated[str, Option(metavar="FILE", help="Output file.")] = "fisher.safetensors",
    samples: Annotated[int, Option(min=1, metavar="N", help="Number of examples.")] = 128,
    fisher_type: Annotated[
        str, Option(metavar="TYPE", help="Labels: empirical (the data's), mc (drawn), type-2 (all).")
    ] = "empirical",
    unit: Annotated[
        str, Option(metavar="UNIT", help="Whose gradients are squared: example, position, batch.")
    ] = "example",
    mc_samples: Annotated[
        int | None, Option(min=1, metavar="N", help="With mc: draws for each example.", show_default="1")
    ] = None,
    max_label_passes: Annotated[
        int | None,
        Option(min=1, metavar="N", help="With type-2: most backward passes for a batch.", show_default="4096"),
    ] = None,
    draws: Annotated[
        int | None,
        Option(min=1, metavar="N", help="Approximate the Fisher by a sketch instead, with N draws of random signs."),
    ] = None,
    reduction: Annotated[
        str, Option(metavar="HOW", help="Loss of an example: mean over its tokens, or sum (of its whole text).")
    ] = "mean",
    no_check: Annotated[
        bool, Option("--no-check", help="Do not compare two examples with ordinary autograd first.")
    ] = False,
    memory: Annotated[
        str,
        Option(
            metavar="SIZE",
            help="Most memory above the model's, such as 8GB: the data is read once for each part of the parameters "
            "whose sums fit.",
        ),
    ] = "",
    accumulate_on: Annotated[
        str,
        Option(metavar="NAME", help="Device of the sums, such as cpu, or a folder for them; by default the model's."),
    ] = "",
    save_every: Annotated[
        float | None,
        Option(min=0, metavar="SECONDS", help="Save unfinished sums so often.", show_default="never"),
    ] = None,
    until: Annotated[
        float | None,
        Option(
            min=0,
            max=1,
            metavar="SHARE",
            help="Stop before --samples, when this share of the top entries is expected to be right, such as 0.9.",
            show_default="never",
        ),
    ] = None,
    until_density: Annotated[
        float | None,
        Option(min=0, max=1, metavar="D", help="With --until: size of the top.", show_default="0.005"),
    ] = None,
    restart: Annotated[bool, Option("--restart", help="Discard unfinished sums.")] = False,
    json_: Json = False,
) -> None:
    """Estimate the exact diagonal Fisher of a model on data.

    Columns are recognised by their usual names, or named by options.

    Rows are drawn at random with the seed, or read from the start with --first.

    The file records how it was made: fishkern show FILE.

    With --save-every the same command goes on after an interruption, with the same result as without; until the end
    the sums are beside FILE, with the suffix .part. With --memory it goes on in the pass where it was.

    With --until it reads no more examples than that takes, and at most --samples.
    """
    goal = _goal(until, until_density)
    target = checked_path(out)
    recipe = _recipe(fisher_type, unit, mc_samples, max_label_passes, draws=draws, seed=work.seed)
    if accumulate_on and not Path(accumulate_on).is_dir():
        checked_device(accumulate_on, "--accumulate-on")
    if memory:
        byte_count(memory, "--memory")
    likelihood_of(reduction, work.task)
    prepared = prepare(work, samples)
    likelihood = likelihood_of(reduction, prepared.described["task"])
    total = len(prepared.examples)
    part = target.with_suffix(".part")
    if restart:
        discard(part)
    before = None if save_every is None else unfinished_pass(part)
    if before is not None:
        of_pass = f" of pass {before.number}" if before.number else ""
        note(f"going on from {before.file}: {before.place.examples:,} of {total:,} examples{of_pass} counted")
    options: dict[str, Any] = {
        "likelihood": likelihood,
        "parameters": predicate(work.parameters, prepared.model),
        "accumulate_on": accumulate_on or None,
        "check": not no_check,
    }
    saving = {} if save_every is None else {"checkpoint": part, "save_every": save_every}
    size = work.batch_size or (None if before is None else before.place.batch_size)
    if memory:
        parts, size = divided(memory, prepared, recipe, options, size)
        saving |= {} if parts is None else {"parts": parts, "results_on": target.parent}
    demand_same_passes(before, several=len(saving.get("parts", [])) > 1)
    sizes: list[int] = []

    def run(size: int) -> tuple[fk.Statistics, int]:
        if sizes:  # the last one did not fit, and sums of batches of another size do not go on
            part.unlink(missing_ok=True)
        sizes.append(size)
        statistics = fk.estimate(
            prepared.model,
            prepared.batches(size),
            recipe,
            progress=lambda done, _: report(done, total),
            until=goal,
            **options,
            **saving,
        )
        return statistics, size

    start = time.perf_counter()
    begun = 0 if before is None else before.place.examples
    with _saying_how_to_go_on(part, saves=save_every is not None), progress("estimating", "examples", begun) as report:
        statistics, batch_size = fitting(run, size, prepared.device, total, "--memory, which takes the sums in parts")
    seconds = time.perf_counter() - start
    statistics = with_origin(statistics, {**prepared.described, "batch_size": batch_size, "from": work.model})
    path = statistics.save(target)
    result = _result(statistics, path, prepared, {"batch_size": batch_size, "seconds": round(seconds, 3)})
    if json_:
        print(json.dumps(result, indent=2))
    else:
        _show(result, path, statistics.provenance["runs"][0]["examples"] / seconds)


@contextmanager
def _saying_how_to_go_on(part: Path, *, saves: bool) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        if saves and unfinished_pass(part) is not None:
            note("the same command goes on from there")
        raise


def _goal(until: float | None, density: float | None) -> float | tuple[float, float] | None:
    if until is None and density is not None:
        raise ValueError("--until-density is the top that --until speaks of: give --until, such as --until 0.9.")
    return until if density is None else (until, density)


def _recipe(
    fisher_type: str, unit: str, mc_samples: int | None, max_label_passes: int | None, *, draws: int | None, seed: int
) -> fk.Estimator:
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


def _result(statistics: fk.Statistics, path: Path, prepared: Prepared, run: dict[str, Any]) -> dict[str, Any]:
    return {
        "file": str(path),
        "model": statistics.provenance["runs"][0]["model"],
        "device": str(prepared.device),
        **prepared.described,
        "definition": statistics.provenance["definition"],
        "count": statistics.count,
        "coordinates": statistics.total,
        **({} if (precision := statistics.precision) is None else {"precision": precision.plain()}),
        "coverage": dict(Counter(covered.path for covered in statistics.coverage.values())),
        **run,
    }


def _show(result: dict[str, Any], path: Path, rate: float) -> None:
    say = console().print
    for key in ("model", "task", "data", "rows", "columns"):
        words = rows_in_words if key == "rows" else _plain
        say(f"{key:9} {words(result[key])}")
    say(f"{'fisher':9} {_plain(result['definition'])}")
    paths = ", ".join(f"{path} {number:,}" for path, number in result["coverage"].items())
    say(f"{'covered':9} {paths} of {sum(result['coverage'].values()):,} parameters")
    if "precision" in result:
        say(f"{'precision':9} {_precise(fk.statistics.Precision.of_plain(result['precision']))}")
    where = f"on {result['device']}, {rate:,.1f} examples/s, batch size {result['batch_size']}"
    say(f"{'took':9} {result['seconds']:.1f} s {where}")
    say(f"{'saved':9} {path}, {size_on_disk(path)}")
    next_command("fishkern", "show", path, "--plot", f"{path.name.partition('.')[0]}.png")


def _precise(precision: fk.statistics.Precision) -> str:
    error = f"relative error {precision.relative_error:.2g}"
    tops = [
        f"{precision.overlap(one):.0%} of the top {100 * one:g} %" for one in (0.005, 0.05) if one in precision.noise
    ]
    return f"{error}, right are {' and '.join(tops)}" if tops else error


def _plain(value: Any) -> str:
    return ", ".join(f"{key} = {entry}" for key, entry in value.items()) if isinstance(value, dict) else str(value)
