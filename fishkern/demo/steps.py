"""The six steps of the demo, each announced as it begins."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

import fishkern as fk
from fishkern.commands.output import checked_path, progress
from fishkern.demo.model import BATCH, Report, batches_of, evaluate, fastest_threads, make_model, train
from fishkern.demo.text import read_text
from fishkern.demo.tuning import DENSITY, FISHER, RATES, compare, comparison_table
from fishkern.report import Summary, plots, summarise
from fishkern.report.curves import draw_curves
from fishkern.report.tables import summary_table

COMPARED = 128  # at most so many examples go through the loop

SHOWS = f"""\
In six steps, in about a minute on a CPU:
   1, 2   a small LLaMA is made and trained
   3, 4   its exact Fisher information, in batches, is estimated, and compared with a loop over single examples
   5      it is saved, and read again
   6      {DENSITY:.0%} of the weights, chosen by it, are tuned: a fraction of the state and of the file, to the bit
"""

NEXT = """\
Look at it again:  fishkern show {path}
Your own model:    fishkern estimate ./your-model --data ./your-texts.jsonl --out your-fisher.safetensors"""


def run(
    folder: Path,
    *,
    seconds: float = 25.0,
    examples: int = 256,
    steps: int = 40,
    seed: int = 0,
    device: str | None = None,
) -> Path:
    """Train a model, estimate its Fisher, show it, verify it, save it, and tune a part of the model by it.

    Args:
        folder: Where ``fisher.safetensors``, ``delta.safetensors`` and the pictures go; made if missing.
        seconds: How long to train.
        examples: How many held-out paragraphs to estimate on.
        steps: How long to tune the model, for each of three ways and two learning rates.
        seed: Seed of the weights and of the order of the training data.
        device: Where to run; ``None`` for CUDA where there is one, else the CPU.

    Returns:
        The file.

    Raises:
        FileExistsError: ``folder`` is a file, or the file in it exists and holds something else.
        OSError: ``folder`` is read-only.
        RuntimeError: torch knows no such device, the estimate differs from the loop, or the saved file does not load
            back the same.
    """
    console = Console(highlight=False, soft_wrap=True)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is not a folder: choose another one.")
    folder.mkdir(parents=True, exist_ok=True)
    path = checked_path(folder / "fisher.safetensors")
    console.print(f"fishkern {fk.__version__}, torch {torch.__version__}\n")
    console.print(SHOWS)
    console.print("[bold]1. A small LLaMA[/bold] with random weights; its tokens are bytes")
    model = make_model(seed).to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with fastest_threads(model) as where:
        console.print(f"   {sum(parameter.numel() for parameter in model.parameters()):,} parameters, {where}\n")
        rows = _train(console, model, seconds, examples, seed)
        statistics = _estimate(console, model, rows)
        summary = summarise(statistics)
        console.print(summary_table(summary))
        _verify(console, model, rows[:COMPARED])
        _save(console, statistics, path)
        _draw(console, summary, path.with_suffix(".png"))
        _tune(console, model, steps, seed, folder)
    console.print(NEXT.format(path=escape(str(path))))
    return path


def _train(console: Console, model: nn.Module, seconds: float, examples: int, seed: int) -> list[Tensor]:
    """Train the model, and return held-out examples."""
    console.print(f"[bold]2. Training it for {seconds:g} s[/bold] on the documentation inside every Python")
    text, paragraphs = read_text()
    spread = paragraphs[:: max(1, len(paragraphs) // examples)][:examples]
    rows = [row.to(next(model.parameters()).device) for row in spread]
    before = evaluate(model, batches_of(rows))
    with _seconds_left(console) as report:
        steps = train(model, text, seconds, seed, report)
    after = evaluate(model, batches_of(rows))
    console.print(f"   {steps} steps on {len(text):,} bytes; bits per held-out byte: {before:.2f}, then {after:.2f}\n")
    return rows


def _estimate(console: Console, model: nn.Module, rows: list[Tensor]) -> fk.Statistics:
    lengths = [len(row) for row in rows]
    console.print(f"[bold]3. Estimating its exact diagonal Fisher[/bold] over {len(rows)} held-out paragraphs")
    console.print(f"   of {min(lengths)} to {max(lengths)} bytes, padded to batches of {BATCH}")
    start = time.perf_counter()
    with progress("   estimating", "paragraphs") as report:
        statistics = fk.estimate(
            model, batches_of(rows), fk.DiagonalFisher(), progress=lambda done, _: report(done, len(rows))
        )
    seconds = time.perf_counter() - start
    console.print(f"   {seconds:.1f} s; before the first batch it was checked against ordinary autograd\n")
    return statistics


def _verify(console: Console, model: nn.Module, rows: list[Tensor]) -> None:
    console.print(f"\n[bold]4. Verifying[/bold] on {len(rows)} of them, against a loop that takes one at a time")
    with progress("   looping", "paragraphs") as report:
        verification = fk.verify(model, batches_of(rows), progress=report)
    worst = max(verification.compared, key=lambda one: one.error)
    for failure in verification.failures:
        console.print(f"   [bold]{escape(failure)}[/bold]")
    console.print(f"   largest relative error {worst.error:.1e}, in {worst.name}")
    console.print(f"   the largest {verification.density:.1%} of all entries: {verification.overlap:.2%} the same")
    estimating, looping = verification.estimate_seconds, verification.loop_seconds
    console.print(
        f"   {estimating:.2f} s with its check, the loop {looping:.2f} s: {looping / estimating:.1f} times as fast\n"
    )
    if not verification.ok:
        raise RuntimeError("the estimate does not equal the loop: please report this.")


def _save(console: Console, statistics: fk.Statistics, path: Path) -> None:
    statistics.save(path)
    console.print(f"[bold]5. Saved[/bold] as {escape(str(path))}, {path.stat().st_size / 1e6:.1f} MB")
    loaded = fk.Statistics.load(path)
    if loaded != statistics:
        raise RuntimeError(f"{path} holds other statistics than were saved: please report this.")
    console.print("   it loads back the same, and its header says what it is:")
    for key, value in {**loaded.provenance["definition"], "mean over": f"{loaded.count} examples"}.items():
        console.print(f"      {key:12} {value}")


def _draw(console: Console, summary: Summary, path: Path) -> None:
    if find_spec("matplotlib") is None:
        console.print('   no picture without matplotlib: pip install "fishkern[plot]"\n')
        return
    figure = plots.draw(summary, title="A small LLaMA", quantity="Fisher information", unit="nats² per parameter unit²")
    console.print(f"   Its picture, by layer and module, is {escape(str(plots.save(figure, path)))}\n")


def _tune(console: Console, model: nn.Module, steps: int, seed: int, folder: Path) -> None:
    console.print("[bold]6. Tuning it[/bold] on Python source, which it has not seen: everything, and the entries that")
    console.print(f"   matter most for it; {steps} steps, each at the better of {len(RATES)} learning rates")
    with progress("   tuning", "steps") as report:
        arms = compare(model, steps, seed, report)
    path = fk.delta(arms[FISHER].model, arms[FISHER].selection).save(folder / "delta.safetensors")
    console.print(comparison_table(arms, path.stat().st_size))
    console.print("   state: the optimizer's; before, after: bits per byte of held-out source")
    tuned = copy.deepcopy(model)
    fk.apply_delta(tuned, fk.Delta.load(path))
    if not all(map(torch.equal, tuned.parameters(), arms[FISHER].model.parameters())):
        raise RuntimeError("the delta does not give the trained model: please report this.")
    console.print(f"   {escape(str(path))}, put back into the untouched model, gives the trained one bit for bit.")
    console.print("   One seed on one small model: what it saves is so on any, and how well it learns is not.")
    if find_spec("matplotlib"):
        figure = draw_curves(
            {name: arm.curve for name, arm in arms.items()},
            x="steps",
            y="bits per held-out byte of Python source",
            title=f"A small LLaMA, all of it and {DENSITY:.0%} of it",
        )
        console.print(f"   Its curves are {escape(str(plots.save(figure, folder / 'tuning.png')))}\n")


@contextmanager
def _seconds_left(console: Console) -> Iterator[Report]:
    """Show a bar on a terminal, nothing elsewhere."""
    columns = (TextColumn("  "), BarColumn(30), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda done, text: bar.update(task, completed=done, description=text)
