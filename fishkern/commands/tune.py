"""``fishkern tune``: an adapter or a model, its Fisher, a selection, and training of the selected entries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from fishkern.commands.freezing import FILE, decisions_table
from fishkern.commands.freezing_options import Freezing
from fishkern.commands.options import Json, Workload, with_options
from fishkern.commands.output import console, next_command, rows_in_words
from fishkern.commands.resuming import Checkpoint
from fishkern.commands.tr_pts import in_python, say_trained
from fishkern.commands.tr_pts_options import Connections
from fishkern.commands.tune_options import METHODS, Adapting, Budget, Settings, Training
from fishkern.commands.tuning import Tuning
from fishkern.integrations.tasks import TASKS
from fishkern.report.contributions import contributions_table


@with_options
def tune(
    work: Workload,
    adapting: Adapting,
    budget: Budget,
    freezing: Freezing,
    connections: Connections,
    training: Training,
    method: Annotated[
        str,
        Option(
            metavar="METHOD",
            help="fish: select entries of an adapter once, and train these. fisher-adaptune: train all of it, and stop "
            "what has settled. tr-pts: train few connections of each neuron of a model without adapter, and drop image "
            "tokens.",
        ),
    ] = METHODS[0],
    out: Annotated[Path, Option(metavar="DIR", help="Output folder.")] = Path("tuned"),
    samples: Annotated[int, Option(min=1, metavar="N", help="Number of examples to train on.")] = 10_000,
    save_every: Annotated[
        float, Option(min=0, metavar="SECONDS", help="How much training an interruption may cost.")
    ] = 60,
    restart: Annotated[bool, Option("--restart", help="Discard an unfinished run in the folder.")] = False,
    json_: Json = False,
) -> None:
    """Train the entries of an adapter that carry the most Fisher information, and no others (FISH-Tuning).

    With --method fisher-adaptune the whole adapter and head begin in training, and slices of their matrices stop for
    good as soon as their Fisher information no longer changes (FisherAdapTune).

    With --method tr-pts no adapter is added: of each neuron of the model itself a few connections train, more in layers
    that matter more to the task, and layers that matter less drop the image tokens with the least attention (TR-PTS).

    The folder gets the adapter with its head, the selection, the start that it was made for (the initial values), the
    trained values alone (delta.safetensors), and report.json; with fisher-adaptune also the freezer
    (freezer.safetensors), which fishkern show draws. With tr-pts it gets no adapter and no start, since the delta alone
    makes the tuned model out of MODEL, but the layers that drop tokens (token_reduction.json). After an interruption
    the same command resumes training, with the same result as without.
    """
    settings = Settings(work, adapting, method, budget, freezing, connections, training, samples)
    settings.check(out)
    checkpoint = Checkpoint.open(out, settings.plain(), save_every, restart=restart)
    tuning = Tuning.prepare(out, settings, checkpoint)
    selection = tuning.select() if checkpoint.state is None else tuning.resume(checkpoint.state)
    outcome = tuning.train(selection)
    report, saved = tuning.save(selection, outcome)
    if json_:
        print(json.dumps(report, indent=2))
        return
    _show(report, saved, len(tuning.held_out))
    if settings.freezes:
        next_command("fishkern", "show", out / FILE, "--plot", out / "freezer.png")
    elif not settings.adapts:
        next_command("fishkern", "show", out / "selection.safetensors", "--plot", out / "selection.png")
    else:
        next_command("fishkern", "show", out / "delta.safetensors")
    console().print(f"or in Python:  {_in_python(tuning, saved)}")


def _show(report: dict[str, Any], saved: Path, held_out: int) -> None:
    say = console().print
    for key in ("task", "data"):
        say(f"{key:9} {report[key]}")
    say(f"{'rows':9} {rows_in_words(report['rows'])}")
    share = report["trained"] / report["parameters"]
    frozen, adapter = "events" in report, "adapter" in report
    if not adapter:
        say_trained(report)
    elif frozen:
        say(f"{'trained':9} {report['trained']:,} entries at first, all of {report['adapter']} and head")
        say(f"{'':9} ({share:.4%} of the model)")
        kept = report["left"] / report["trained"]
        say(f"{'left':9} {report['left']:,} of them in training at the end ({kept:.1%})")
    else:
        say(f"{'trained':9} {report['trained']:,} of {report['pool']:,} entries of {report['adapter']} and head")
        say(f"{'':9} ({share:.4%} of the model; {report['order']}, the head whole)")
    say(f"{'loss':9} {', '.join(f'{loss:.4f}' for loss in report['loss'])} by epoch")
    for name, value in report["after"].items():
        before = report["before"][name]
        say(f"{name:9} {before:.4f}, then {value:.4f} on {held_out:,} examples of {report['eval_split']}")
    seconds = report["seconds"]
    measuring = f", {seconds['measuring']:.1f} s to measure" if "measuring" in seconds and held_out else ""
    reading = f" (of these {seconds['reading']:.1f} s to read the Fisher information)" if "reading" in seconds else ""
    selecting = f"{seconds['selecting']:.1f} s to {'begin' if frozen else 'select'}"
    say(f"{'took':9} {selecting}, {seconds['training']:.1f} s to train{reading}{measuring}")
    say(f"{'saved':9} {saved}, along with {_other_files(report)}")
    if frozen:
        say(decisions_table(report["events"]))
    if not adapter:
        say(contributions_table(report["layers"]))


def _other_files(report: dict[str, Any]) -> str:
    if "events" in report:
        return "selection, start, delta, freezer and report"
    if "adapter" in report:
        return "selection, start, delta and report"
    return "selection, token reduction and report" if report["token_layers"] else "selection and report"


def _in_python(tuning: Tuning, saved: Path) -> str:
    """Write the line that makes the tuned model from its base and what was saved."""
    if tuning.relevance is not None:
        return in_python(
            tuning.prepared, tuning.settings, tuning.folder, reduces=tuning.relevance.reduction is not None
        )
    described, config = tuning.prepared.described, tuning.prepared.encoder.config
    labels = f", num_labels={config.num_labels}" if "label" in described["columns"] else ""
    auto = f"transformers.{TASKS[described['task']].auto_class}"
    base = f"{auto}.from_pretrained({config._name_or_path!r}{labels})"
    if tuning.recipe is None:
        return f"import peft, transformers; model = peft.PeftModel.from_pretrained({base}, {str(saved)!r})"
    return f"import fishkern, transformers; model = {base}; fishkern.adapters.load(model, {str(saved)!r})"
