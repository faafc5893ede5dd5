"""``fishkern ranks``: how many directions each weight needs, by its importance for the data, for PEFT or axolotl."""

from __future__ import annotations

import json
import time
from fractions import Fraction
from pathlib import Path
from statistics import median
from typing import Annotated, Any

from typer import Option

import fishkern as fk
from fishkern.commands.options import Inputs, Json, LayersPerPass, Positions, Targets, with_options
from fishkern.commands.output import (
    checked_file,
    checked_path,
    checked_report,
    console,
    note,
    progress,
    rows_in_words,
    size_on_disk,
)
from fishkern.commands.workload import (
    Prepared,
    fitting,
    note_what_is_not_linear,
    prepare,
    refuse_adapter,
    with_origin,
)
from fishkern.files import atomic_write
from fishkern.initialization.targets import linear_weights, targeted
from fishkern.integrations.lora_patterns import axolotl_yaml, peft_patterns, targets
from fishkern.integrations.tasks import TASKS
from fishkern.names import listed
from fishkern.report.tables import ranks_tables

FORMATS = {"peft": "ranks.json", "axolotl": "ranks.yaml"}
RULES = {"inverse": fk.InverseImportance, "proportional": fk.ProportionalImportance}

_FIELDS = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern")
_FIRST_LINE = "# fishkern ranks: "


@with_options
def ranks(
    work: Inputs,
    average: Annotated[str, Option(metavar="R", help="Mean rank, also a fraction such as 33/2.")] = "16",
    rule: Annotated[
        str, Option(metavar="RULE", help="Ranks inverse to the importance of a matrix, or proportional to it.")
    ] = "inverse",
    importance: Annotated[
        str, Option(metavar="WHICH", help="kronecker (as in FARSS), or exact: by the gradient of each example.")
    ] = "kronecker",
    least: Annotated[int, Option(min=1, metavar="R", help="Smallest rank.")] = 1,
    most: Annotated[
        int | None, Option(min=1, metavar="R", help="Largest rank.", show_default="64 for inverse, else none")
    ] = None,
    alpha: Annotated[
        float | None,
        Option(metavar="A", help="lora_alpha at the mean rank; it follows the rank.", show_default="the mean rank"),
    ] = None,
    targets: Targets = (),
    samples: Annotated[int, Option(min=1, metavar="N", help="Number of examples.")] = 128,
    positions: Positions = "attended",
    layers_per_pass: LayersPerPass = None,
    format_: Annotated[str, Option("--format", metavar="FORMAT", help="peft or axolotl.")] = "peft",
    out: Annotated[
        str, Option(metavar="FILE", help="Output file.", show_default="ranks.json, ranks.yaml for axolotl")
    ] = "",
    energies: Annotated[str, Option(metavar="FILE", help="Also save the energies, for fishkern show.")] = "",
    json_: Json = False,
) -> None:
    """Deal out the ranks of a LoRA to the weights of a model, by their importance for data.

    The ranks add up to the mean times the number of matrices, exactly. The file has the fields of PEFT's LoraConfig, or
    lines for axolotl's config, whose patterns each match their own module only.
    """  # noqa: DOC501 - it is the help text
    if importance not in ("kronecker", "exact"):
        raise ValueError(f"--importance is kronecker or exact, got {importance!r}.")
    recipe = _rule(rule, average, least, most)
    scaling = _scaling(alpha, recipe.average, format_)
    estimator = fk.DirectionEnergy(positions=positions, importance=importance, layers_per_pass=layers_per_pass)
    target = _checked_out(out, format_)
    kept = checked_path(energies, fk.Energies, "--energies") if energies else None
    refuse_adapter(work, "ranks are dealt out")
    prepared = prepare(work, samples)
    if not targets:
        note_what_is_not_linear(prepared.model)
    names = _targeted(prepared.model, targets)
    start = time.perf_counter()
    measured, batch_size = _measured(prepared, names, estimator, work.batch_size)
    seconds = time.perf_counter() - start
    importances = _reached({name: measured[name].importance for name in measured})
    sides = {name: min(measured[name].shape) for name in measured}
    by_name = fk.allocate_ranks(importances, recipe, largest=sides)
    inputs = " ".join(f"{work.model}, {work.data}, {recipe}".split())
    _write(target, _text(format_, by_name, scaling, prepared, inputs))
    if kept is not None:
        origin = {**prepared.described, "batch_size": batch_size, "from": work.model}
        kept = with_origin(measured, origin).save(kept)
    result = {
        "file": str(target),
        **({} if kept is None else {"energies": str(kept)}),
        "model": type(prepared.model).__name__,
        "device": str(prepared.device),
        **prepared.described,
        "definition": measured.provenance["definition"],
        "count": measured.count,
        "rule": recipe.settings,
        "scaling": scaling,
        "total": sum(by_name.values()),
        "importances": importances,
        "ranks": by_name,
        "entries": sum(rank * sum(measured[name].shape) for name, rank in by_name.items()),
        "batch_size": batch_size,
        "seconds": round(seconds, 3),
    }
    if json_:
        print(json.dumps(result, indent=2))
    else:
        _show(result, recipe, prepared.model.num_parameters())
        _next(target, format_)


def _measured(
    prepared: Prepared, names: frozenset[str], estimator: fk.Estimator, requested: int | None
) -> tuple[fk.Energies, int]:
    """Estimate the energies, and say with which batch size."""

    def run(size: int) -> tuple[fk.Energies, int]:
        return fk.estimate(
            prepared.model,
            prepared.batches(size),
            estimator,
            parameters=lambda name, parameter: name in names,
            max_examples=len(prepared.examples),  # all of them; so their number is known to the progress
            progress=report,
        ), size

    with progress("estimating", "examples") as report:
        return fitting(run, requested, prepared.device, len(prepared.examples))


def _rule(rule: str, average: str, least: int, most: int | None) -> fk.RankRule:
    if rule not in RULES:
        raise ValueError(f"--rule is one of {', '.join(RULES)}, got {rule!r}.")
    try:
        mean = float(Fraction(average))
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"--average is a number such as 16, or a fraction such as 33/2, got {average!r}.") from None
    return RULES[rule](mean, least, **({} if most is None else {"most": most}))


def _scaling(alpha: float | None, average: float, format_: str) -> float:
    if alpha is None:
        return 1.0
    if not alpha > 0:
        raise ValueError(f"--alpha must be positive, got {alpha:g}.")
    scaling = alpha / average
    if format_ == "axolotl" and scaling % 1:
        raise ValueError(
            f"axolotl takes whole numbers as alpha, and --alpha {alpha:g} at a mean rank of {average:g} gives others: "
            "choose a multiple of --average."
        )
    return scaling


def _checked_out(out: str, format_: str) -> Path:
    if format_ not in FORMATS:
        raise ValueError(f"--format is one of {', '.join(FORMATS)}, got {format_!r}.")
    out = out or FORMATS[format_]
    if format_ == "peft":
        return checked_report(out, "--out", _FIELDS, name=FORMATS[format_], what="ranks of fishkern")
    path = checked_file(out, "--out", FORMATS[format_])
    if path.exists() and path.stat().st_size:
        with path.open("rb") as file:
            if file.read(len(_FIRST_LINE)) != _FIRST_LINE.encode():
                raise FileExistsError(
                    f"{path} was not written by fishkern ranks and is not overwritten: choose another name with --out."
                )
    return path


def _targeted(model: Any, patterns: list[str]) -> frozenset[str]:
    weights = linear_weights(model)
    return frozenset(targeted(weights, patterns) if patterns else weights)


def _reached(importances: dict[str, float]) -> dict[str, float]:
    """Give a matrix that no example reaches the median importance of the others, as FARSS does here."""
    missing = [name for name, value in importances.items() if value == 0]
    if not missing or len(missing) == len(importances):  # all zero is refused by the rule
        return importances
    middle = median(value for value in importances.values() if value)
    note(
        f"no example gives {len(missing)} of {len(importances)} matrices any importance ({listed(missing)}): they get "
        "the median of the others; more examples may reach them"
    )
    return {name: value or middle for name, value in importances.items()}


def _text(format_: str, ranks: dict[str, int], scaling: float, prepared: Prepared, inputs: str) -> str:
    """Write ranks as PEFT's or axolotl's config has them."""
    paths = {name.removesuffix(".weight"): rank for name, rank in ranks.items()}
    if format_ == "axolotl":
        return f"{_FIRST_LINE}{inputs}\n{axolotl_yaml(paths, scaling=scaling)}"
    modules = {path for path, _ in prepared.model.named_modules()}
    fields = {**peft_patterns(paths, scaling=scaling), "target_modules": targets(paths, modules)}
    task = TASKS[prepared.described["task"]].peft_type
    return json.dumps({**fields, **({"task_type": task} if task else {})}, indent=2) + "\n"


def _write(path: Path, text: str) -> None:
    with atomic_write(path, "w") as file:
        file.write(text)


def _show(result: dict[str, Any], rule: fk.RankRule, parameters: int) -> None:
    say = console().print
    for key in ("model", "task", "data"):
        say(f"{key:9} {result[key]}")
    say(f"{'rows':9} {rows_in_words(result['rows'])}")
    how = next(name for name, kind in RULES.items() if isinstance(rule, kind))
    most = "what a matrix has" if rule.most is None else rule.most
    bounds = f"from {rule.least} to {most}, {rule.average:g} in the mean"
    say(f"{'ranks':9} {how} to the {result['definition']['importance']} importance, {bounds}")
    say(f"{'took':9} {result['seconds']:.1f} s on {result['device']}, batch size {result['batch_size']}\n")
    for table in ranks_tables(result["ranks"]):
        say(table)
    ranks = result["ranks"].values()
    total = f"{result['total']:,} = {rule.average:g} x {len(ranks)} matrices, from {min(ranks)} to {max(ranks)}"
    say(f"{'total':9} {total}")
    say(f"{'entries':9} {result['entries']:,} of the LoRA ({result['entries'] / parameters:.2%} of the model)")
    for key in ("file", "energies"):
        if key in result:
            say(f"{'saved':9} {result[key]}, {size_on_disk(Path(result[key]))}")


def _next(path: Path, format_: str) -> None:
    if format_ == "axolotl":
        console().print(f"\nNext:  copy the lines of {path} into the config of axolotl, with adapter: lora")
    else:
        load = f"peft.LoraConfig(**json.load(open({str(path)!r})))"
        console().print(f"\nNext, in Python:  import json, peft; config = {load}")
