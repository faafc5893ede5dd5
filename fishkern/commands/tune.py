"""``fishkern tune``: an adapter, its Fisher, a selection, and training of what is selected."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from fishkern.commands.options import Json, Workload, with_options
from fishkern.commands.output import Stopwatch, console, next_command, note, progress, rows_in_words, waiting

if TYPE_CHECKING:
    from torch import nn

    from fishkern.commands.workload import Prepared
    from fishkern.selection import Selection

MOST_HELD_OUT = 10_000  # examples that are measured on
FISHER_SAMPLES = 128
OWN = ("bottleneck", "prefix", "unipelt")  # adapters that are one file; PEFT's are folders
BLIND = ("random", "magnitude")  # orders that look at no example

_ADAPTER, _BUDGET, _TRAINING = "Adapter", "Selection", "Training"


@dataclass(frozen=True)
class Adapting:
    """The adapter that a model gets."""

    adapter: Annotated[
        str | None,
        Option(
            metavar="NAME",
            help="lora, dora, ia3, bottleneck, prefix or unipelt; none is added where MODEL is an adapter.",
            rich_help_panel=_ADAPTER,
            show_default="lora",
        ),
    ] = None
    size: Annotated[
        int | None,
        Option(min=1, metavar="N", help="Rank, width or length; by default 8, 48, 30.", rich_help_panel=_ADAPTER),
    ] = None
    layers: Annotated[
        str, Option(metavar="RANGE", help="Which layers: 0-4 or 0,2,5; by default all.", rich_help_panel=_ADAPTER)
    ] = ""


@dataclass(frozen=True)
class Budget:
    """How much of it is trained, and which."""

    density: Annotated[
        float | None,
        Option(metavar="D", help="Train this fraction of the adapter; by default 0.2.", rich_help_panel=_BUDGET),
    ] = None
    k: Annotated[int | None, Option("--k", metavar="N", help="Or so many of its entries.", rich_help_panel=_BUDGET)] = (
        None
    )
    trainable: Annotated[
        int | None, Option(metavar="N", help="Or so many entries, head included.", rich_help_panel=_BUDGET)
    ] = None
    order: Annotated[
        str,
        Option(
            metavar="ORDER",
            help="largest Fisher information; smallest, random and magnitude are controls.",
            rich_help_panel=_BUDGET,
        ),
    ] = "largest"
    allow_zeros: Annotated[
        bool,
        Option(
            "--allow-zeros",
            help="Go on where half of the entries or more have no Fisher information.",
            rich_help_panel=_BUDGET,
        ),
    ] = False
    fisher_samples: Annotated[
        int | None,
        Option(
            min=1,
            metavar="N",
            help="Select by so many examples.",
            rich_help_panel=_BUDGET,
            show_default=str(FISHER_SAMPLES),
        ),
    ] = None


@dataclass(frozen=True)
class Training:
    """How it is trained."""

    epochs: Annotated[
        int, Option(min=1, metavar="N", help="How often each example is seen.", rich_help_panel=_TRAINING)
    ] = 3
    lr: Annotated[float, Option(metavar="LR", help="Learning rate, falling to 0.", rich_help_panel=_TRAINING)] = 5e-4
    weight_decay: Annotated[
        float, Option(metavar="W", help="Decay of the selected entries.", rich_help_panel=_TRAINING)
    ] = 0.0
    max_grad_norm: Annotated[
        float, Option(metavar="G", help="Clip the gradient of what moves to this norm.", rich_help_panel=_TRAINING)
    ] = 1.0
    eval_split: Annotated[
        str,
        Option(metavar="NAME", help="Measure on this part of the data, before and after.", rich_help_panel=_TRAINING),
    ] = ""


@with_options
def tune(
    work: Workload,
    adapting: Adapting,
    budget: Budget,
    training: Training,
    out: Annotated[Path, Option(metavar="DIR", help="Folder for all that is saved.")] = Path("tuned"),
    samples: Annotated[int, Option(min=1, metavar="N", help="Train on so many examples.")] = 10_000,
    save_every: Annotated[
        float, Option(min=0, metavar="SECONDS", help="How much training an interrupt may cost.")
    ] = 60,
    restart: Annotated[bool, Option("--restart", help="Do not go on with an unfinished run in the folder.")] = False,
    json_: Json = False,
) -> None:
    """Train the entries of an adapter that carry the most Fisher information, and no others (FISH-Tuning).

    The folder gets the adapter with its head, the selection, the start that it was made on, the trained values alone
    (delta.safetensors), and report.json. After an interrupt the same command goes on where training stood, and ends as
    it would have ended without.
    """
    import fishkern as fk

    with waiting("loading libraries"):
        from fishkern.commands.resuming import Checkpoint, digest_of
        from fishkern.commands.training import train
        from fishkern.commands.workload import prepare
        from fishkern.integrations import adapting as by_name
    from fishkern.files import atomic_write
    from fishkern.selection import check_start, save_start

    _check_parameters(work)
    _check_budget(budget)
    kind = adapting.adapter or "lora"
    by_name.check(kind, adapting.size)
    _check_leftover(out, kind)
    layers = _layers(adapting.layers)
    _check_folder(out)
    settings = {**vars(work), **vars(adapting), **vars(budget), **vars(training), "samples": samples}
    checkpoint = Checkpoint.open(out, settings, save_every, restart=restart)
    prepared = prepare(work, samples)
    encoder, examples = prepared.encoder, prepared.examples
    data = digest_of(examples)
    checkpoint.demand_same_data(data)
    held_out = _held_out(prepared, work, training.eval_split)
    model, recipe = prepared.model, None
    if hasattr(model, "peft_config"):
        _check_given_adapter(adapting, work)
        note(f"{work.model} is an adapter: no other is added, and it is trained from where it stands")
        kind = "the given adapter"
    else:
        task = prepared.described["task"]
        with waiting(f"adding {kind}"):
            model, recipe = by_name.adapt(model, kind, task=task, layers=layers, size=adapting.size, seed=work.seed)

    batch_size, total = work.batch_size or 16, training.epochs * len(examples)
    stopwatch = Stopwatch()

    def measure(when: str) -> dict[str, float]:
        return _measure(model, prepared, held_out, batch_size, when) if held_out else {}

    if (held := checkpoint.state) is None:
        with stopwatch.adding("selecting"):
            selection = _select(model, prepared, budget, work)
        out.mkdir(exist_ok=True)
        (out / "report.json").unlink(missing_ok=True)  # comes last: a folder without one is not finished
        selection.save(out / "selection.safetensors")
        save_start(model, selection, out / "start.safetensors")
        with stopwatch.adding("measuring"):
            before = measure("before")
        seen = 0
    else:
        with checkpoint.reading():
            stopwatch.ended.update({str(what): float(seconds) for what, seconds in held["seconds"].items()})
            before, seen = {str(what): float(value) for what, value in held["before"].items()}, int(held["seen"])
        note(f"going on with the unfinished run in {out}: {seen:,} of {total:,} examples are seen")
        selection = fk.Selection.load(out / "selection.safetensors")
        check_start(selection, model)
    optimizer = fk.MaskedAdamW(
        model, selection, training.lr, weight_decay=training.weight_decay, max_grad_norm=training.max_grad_norm
    )
    with _interruptible():
        with stopwatch.adding("training"), progress("training", "examples", seen) as report:
            losses = train(
                model, optimizer, encoder, examples,
                epochs=training.epochs, batch_size=batch_size, seed=work.seed, report=report,
                checkpoint=checkpoint,
                described=lambda: {"data": data, "seconds": stopwatch.seconds, "before": before},
            )  # fmt: skip
        with stopwatch.adding("measuring"):
            after = measure("after")
    fk.delta(model, selection).save(out / "delta.safetensors")
    saved = by_name.save_adapter(model, recipe, out)
    found: dict[str, Any] = {
        "folder": str(out),
        "from": work.model,
        **prepared.described,
        "adapter": kind,
        "pool": selection.total,
        "trained": selection.count,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **vars(budget),
        "fisher_samples": None if budget.order in BLIND else budget.fisher_samples or FISHER_SAMPLES,
        **vars(training),
        "loss": losses,
        "before": before,
        "after": after,
        "seconds": {what: round(seconds, 3) for what, seconds in stopwatch.seconds.items()},
    }
    with atomic_write(out / "report.json", "w") as file:
        file.write(json.dumps(found, indent=2) + "\n")
    checkpoint.remove()
    if json_:
        print(json.dumps(found, indent=2))
    else:
        _tell(found, saved, len(held_out))
        next_command("fishkern", "show", out / "delta.safetensors")
        console().print(f"or in Python:  {_in_python(model, recipe, prepared, saved)}")


@contextmanager
def _interruptible() -> Iterator[None]:
    """Say what to do after an interrupt."""
    try:
        yield
    except KeyboardInterrupt:
        note("the same command goes on from there")
        raise


def _measure(
    model: nn.Module, prepared: Prepared, held_out: list[dict[str, Any]], batch_size: int, when: str
) -> dict[str, float]:
    from fishkern.commands.training import evaluate

    with progress(f"measuring {when}", "examples") as report:
        return evaluate(model, prepared.encoder, held_out, batch_size, report)


def _in_python(model: nn.Module, recipe: Any, prepared: Prepared, saved: Path) -> str:
    """Write the line that gives the tuned model, from its base and what was saved."""
    from fishkern.integrations.tasks import TASKS

    config = prepared.encoder.config
    labels = f", num_labels={config.num_labels}" if "label" in prepared.described["columns"] else ""
    base = (
        f"transformers.{TASKS[prepared.described['task']].auto_class}.from_pretrained({config._name_or_path!r}{labels})"
    )
    if recipe is None:
        return f"import peft, transformers; model = peft.PeftModel.from_pretrained({base}, {str(saved)!r})"
    return f"import fishkern, transformers; model = {base}; fishkern.adapters.load(model, {str(saved)!r})"


def _select(model: nn.Module, prepared: Prepared, budget: Budget, work: Workload) -> Selection:
    import fishkern as fk
    from fishkern.commands.workload import fitting

    total = len(prepared.examples)
    count = min(total, budget.fisher_samples or FISHER_SAMPLES)
    few = [prepared.examples[n * total // count] for n in range(count)]  # they are sorted by length: of every length
    unset = (budget.k, budget.density, budget.trainable) == (None, None, None)

    def run(size: int) -> Selection:
        return fk.fish_tuning(
            model,
            [prepared.encoder.collate(few[start : start + size]) for start in range(0, count, size)],
            k=budget.k,
            density=0.2 if unset else budget.density,
            trainable=budget.trainable,
            order=budget.order,
            allow_zeros=budget.allow_zeros,
            max_examples=count,
            seed=work.seed,
            progress=lambda done, _: report(done, count),
        )

    with progress("selecting", "examples") as report:
        return fitting(run, work.batch_size, next(model.parameters()).device, count)


def _held_out(prepared: Prepared, work: Workload, split: str) -> list[dict[str, Any]]:
    from fishkern.integrations import data, hub

    if not split:
        return []
    with waiting(f"reading {split}"), hub.quiet():
        rows = data.read(work.data, name=work.subset or None, split=split, first=True)
        examples = list(prepared.encoder.examples(rows, MOST_HELD_OUT))
    if not examples:
        raise ValueError(f"{work.data} has no row in {split!r} with anything to measure on.")
    return examples


def _tell(found: dict[str, Any], saved: Path, held_out: int) -> None:
    say = console().print
    for key in ("task", "data"):
        say(f"{key:9} {found[key]}")
    say(f"{'rows':9} {rows_in_words(found['rows'])}")
    share = found["trained"] / found["parameters"]
    say(f"{'trained':9} {found['trained']:,} of {found['pool']:,} entries of {found['adapter']} and head")
    say(f"{'':9} ({share:.4%} of the model; {found['order']}, the head whole)")
    say(f"{'loss':9} {', '.join(f'{loss:.4f}' for loss in found['loss'])} by epoch")
    for name, value in found["after"].items():
        say(f"{name:9} {found['before'][name]:.4f}, then {value:.4f} on {held_out:,} examples of {found['eval_split']}")
    seconds = found["seconds"]
    measuring = f", {seconds['measuring']:.1f} s to measure" if "measuring" in seconds and held_out else ""
    say(f"{'took':9} {seconds['selecting']:.1f} s to select, {seconds['training']:.1f} s to train{measuring}")
    say(f"{'saved':9} {saved}, with selection, start, delta and report beside it")


def _layers(text: str) -> list[int] | None:
    """Read ``0-4`` or ``0,2,5``."""
    if not text:
        return None
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"--layers is like 0-4 or 0,2,5, got {text!r}.")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def _check_parameters(work: Workload) -> None:
    if work.parameters:
        raise ValueError("tune trains the adapter and the head: it has no use for --parameters.")


def _check_budget(budget: Budget) -> None:
    from fishkern.methods.fish_tuning import ORDERS

    if budget.order not in ORDERS:
        raise ValueError(f"--order is one of {', '.join(ORDERS)}, got {budget.order!r}.")
    if budget.fisher_samples is not None and budget.order in BLIND:
        raise ValueError(f"--order {budget.order} looks at no example: leave out --fisher-samples.")


def _check_given_adapter(adapting: Adapting, work: Workload) -> None:
    if given := [f"--{name}" for name, value in vars(adapting).items() if value]:
        raise ValueError(f"{work.model} is an adapter, and no other is added: leave out {' and '.join(given)}.")


def _check_leftover(out: Path, kind: str) -> None:
    """Refuse to save beside the adapter of another run, which would be taken for this one's."""
    other = out / ("adapter" if kind in OWN else "adapter.safetensors")
    if other.exists():
        raise FileExistsError(f"{other} is the adapter of another run: choose another --out, or delete it first.")


def _check_folder(out: Path) -> None:
    """Find out before the work whether there can be such a folder."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file: choose another folder with --out.")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"the folder {out.parent} does not exist: create it, or choose another --out.")
    if not os.access(out if out.is_dir() else out.parent, os.W_OK):
        raise PermissionError(f"{out.absolute()} may not be written to: choose another folder with --out.")
