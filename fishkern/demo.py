"""What ``fishkern demo`` shows: a real model, its exact Fisher, the loop that it equals, and the files that stay."""

from __future__ import annotations

import ast
import math
import re
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

import fishkern as fk
from fishkern import demo_tuning
from fishkern.commands.output import checked_path, progress
from fishkern.report import Summary, plots, summarise
from fishkern.report.curves import draw_curves
from fishkern.report.tables import summary_table

MODEL = dict(
    vocab_size=256,  # a token is a byte
    hidden_size=128,
    intermediate_size=344,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    tie_word_embeddings=False,
)
WINDOW, WINDOWS = 64, 16  # bytes of a training row, and rows of a step
HELD_OUT = 8  # every 8th paragraph is kept from training
SHORTEST, LONGEST = 16, 64  # bytes of such a paragraph; longer ones are cut
BATCH = 32
COMPARED = 128  # at most so many examples go through the loop

NEXT = """\
Look at it again:  fishkern show {path}
Your own model:    fishkern estimate ./your-model --data ./your-texts.jsonl --out your-fisher.safetensors"""

Report = Callable[[float, str], None]


def run(
    folder: Path,
    *,
    seconds: float = 25.0,
    examples: int = 256,
    steps: int = 60,
    seed: int = 0,
    device: str | None = None,
) -> Path:
    """Train, estimate, show, verify, save, tune, and say each while it happens.

    Args:
        folder: Where ``fisher.safetensors`` and the pictures go; made if missing.
        seconds: How long to train.
        examples: How many held-out paragraphs to estimate on.
        steps: How long to tune the adapter, for each way to choose its entries.
        seed: Seed of the weights and of the order of the training data.
        device: Where to run; ``None`` for CUDA where there is one, else the CPU.

    Returns:
        The file.

    Raises:
        FileExistsError: ``folder`` is a file, or the file in it exists and holds something else.
        OSError: ``folder`` is read-only.
        RuntimeError: torch knows no such device, the estimate is not the loop's, or what was saved loads back as
            something else.
    """
    console = Console(highlight=False, soft_wrap=True)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is not a folder: choose another one.")
    folder.mkdir(parents=True, exist_ok=True)
    path = checked_path(folder / "fisher.safetensors")
    console.print(f"fishkern {fk.__version__}, torch {torch.__version__}\n")
    console.print("[bold]1. A small LLaMA[/bold] with random weights; its tokens are bytes")
    model = make_model(seed).to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with _fastest_threads(model) as where:
        console.print(f"   {sum(parameter.numel() for parameter in model.parameters()):,} parameters, {where}\n")
        rows = _train(console, model, seconds, examples, seed)
        statistics = _estimate(console, model, rows)
        summary = summarise(statistics)
        console.print(summary_table(summary))
        _verify(console, model, rows[:COMPARED])
        _save(console, statistics, path)
        _draw(console, summary, path.with_suffix(".png"))
        _tune(console, model, steps, seed, folder / "tuning.png")
    console.print(NEXT.format(path=escape(str(path))))
    return path


def _train(console: Console, model: nn.Module, seconds: float, examples: int, seed: int) -> list[Tensor]:
    """Train the model; return held-out examples."""
    console.print(f"[bold]2. Training it for {seconds:g} s[/bold] on the documentation inside every Python")
    text, held_out = read_text()
    chosen = held_out[:: max(1, len(held_out) // examples)][:examples]
    rows = [row.to(next(model.parameters()).device) for row in chosen]
    before = evaluate(model, _batches(rows))
    with _seconds_left(console) as report:
        steps = train(model, text, seconds, seed, report)
    after = evaluate(model, _batches(rows))
    console.print(f"   {steps} steps on {len(text):,} bytes; bits per held-out byte: {before:.2f}, then {after:.2f}\n")
    return rows


def _estimate(console: Console, model: nn.Module, rows: list[Tensor]) -> fk.Statistics:
    lengths = [len(row) for row in rows]
    console.print(f"[bold]3. Estimating its exact diagonal Fisher[/bold] over {len(rows)} held-out paragraphs")
    console.print(f"   of {min(lengths)} to {max(lengths)} bytes, padded to batches of {BATCH}")
    start = time.perf_counter()
    with progress("   estimating", "paragraphs") as report:
        statistics = fk.estimate(
            model, _batches(rows), fk.DiagonalFisher(), progress=lambda done, _: report(done, len(rows))
        )
    taken = time.perf_counter() - start
    console.print(f"   {taken:.1f} s; before the first batch it was checked against ordinary autograd\n")
    return statistics


def _verify(console: Console, model: nn.Module, rows: list[Tensor]) -> None:
    console.print(f"\n[bold]4. Verifying[/bold] on {len(rows)} of them, against a loop that takes one at a time")
    with progress("   looping", "paragraphs") as report:
        found = fk.verify(model, _batches(rows), progress=report)
    worst = max(found.compared, key=lambda one: one.error)
    for failure in found.failures:
        console.print(f"   [bold]{escape(failure)}[/bold]")
    console.print(f"   largest relative error {worst.error:.1e}, in {worst.name}")
    console.print(f"   the largest {found.density:.1%} of all entries: {found.overlap:.2%} the same")
    console.print(
        f"   {found.estimate_seconds:.2f} s with its check, the loop {found.loop_seconds:.2f} s: "
        f"{found.loop_seconds / found.estimate_seconds:.1f} times as fast\n"
    )
    if not found.ok:
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


def _tune(console: Console, model: nn.Module, steps: int, seed: int, path: Path) -> None:
    console.print("[bold]6. Tuning an adapter[/bold] on Python source, which it has not seen: LoRA of rank 4, of which")
    console.print(f"   as many entries are trained as plain LoRA of rank 1 has, for {steps} steps each")
    with progress("   tuning", "steps") as report:
        runs = demo_tuning.compare(model, evaluate, steps, seed, report)
    console.print(demo_tuning.table(runs))
    console.print("   One seed on one small model: it shows how it is done, not which is better.")
    if find_spec("matplotlib"):
        figure = draw_curves(
            {arm: run.curve for arm, run in runs.items()},
            x="steps",
            y="bits per held-out byte of Python source",
            title="The same number of trained entries, chosen in four ways",
        )
        console.print(f"   Its curves are {escape(str(plots.save(figure, path)))}\n")


def read_text() -> tuple[bytes, list[Tensor]]:
    """Read the help topics of ``pydoc`` and the docstrings of the standard library.

    Returns:
        The text to train on, and the held-out paragraphs: byte values ``[T]``, ``SHORTEST <= T <= LONGEST``.
    """
    paragraphs = dict.fromkeys(
        paragraph.strip().encode() for text in _texts() for paragraph in re.split(r"\n\s*\n", text)
    )  # each once: the topics repeat one another
    kept = [paragraph for n, paragraph in enumerate(paragraphs) if n % HELD_OUT]
    others = [paragraph[:LONGEST] for paragraph in islice(paragraphs, 0, None, HELD_OUT) if len(paragraph) >= SHORTEST]
    return b"\n\n".join(kept), [torch.tensor(list(paragraph)) for paragraph in others]


def _texts() -> Iterator[str]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name]
    documented = ast.Module | ast.ClassDef | ast.FunctionDef
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):  # parsed, not imported; none in some builds
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, documented) and (text := ast.get_docstring(node)):
                yield text


def make_model(seed: int) -> nn.Module:
    """Make the LLaMA with random weights.

    Args:
        seed: Seed of the weights.

    Returns:
        A ``LlamaForCausalLM``.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**MODEL))


def collate(rows: list[Tensor]) -> dict[str, Tensor]:
    """Pad rows of unequal length on the right, as a collator does.

    Args:
        rows: ``N`` tensors ``[T_n]``.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels`` (-100 at padding), each ``[N, T]``.
    """
    pad = nn.utils.rnn.pad_sequence
    mask = pad([torch.ones_like(row) for row in rows], batch_first=True)
    labels = pad(rows, batch_first=True, padding_value=-100)
    return {"input_ids": pad(rows, batch_first=True), "attention_mask": mask, "labels": labels}


def train(model: nn.Module, text: bytes, seconds: float, seed: int, report: Report) -> int:
    """Train on random windows of the text until the time is up.

    Args:
        model: Changed in place.
        text: What to train on.
        seconds: How long.
        seed: Seed of the windows.
        report: Told how far it is, and the loss.

    Returns:
        The number of steps.
    """
    device = next(model.parameters()).device
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.01)
    model.train()
    steps, start = 0, time.perf_counter()
    while (done := (time.perf_counter() - start) / seconds) < 1:
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1.0, (steps + 1) / 20) * (1 - done)
        begin = torch.randint(len(data) - WINDOW, (WINDOWS, 1), generator=generator)
        ids = data[begin + torch.arange(WINDOW)].long().to(device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
        report(done, f"step {steps}, loss {loss.item():.2f}")
    return steps


@torch.no_grad()
def evaluate(model: nn.Module, batches: list[dict[str, Tensor]]) -> float:
    """Measure how well the model predicts.

    Args:
        model: Left in evaluation mode.
        batches: Padded batches.

    Returns:
        Bits per byte.
    """
    model.eval()
    counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
    nats = sum(count * model(**batch).loss.item() for count, batch in zip(counts, batches, strict=True))
    return nats / sum(counts) / math.log(2)


def _batches(rows: list[Tensor]) -> list[dict[str, Tensor]]:
    return [collate(rows[start : start + BATCH]) for start in range(0, len(rows), BATCH)]


@contextmanager
def _fastest_threads(model: nn.Module) -> Iterator[str]:
    """Run on as many threads as are fastest; all of them are not for a small model, least of all on a busy machine."""
    device = next(model.parameters()).device
    if device.type != "cpu":
        yield f"on {torch.cuda.get_device_name(device) if device.type == 'cuda' else device}"
        return
    found = torch.get_num_threads()
    ids = torch.zeros(WINDOWS, WINDOW, dtype=torch.long)

    def seconds(threads: int) -> float:
        torch.set_num_threads(threads)
        times = [time.perf_counter()]
        for _ in range(4):
            model(input_ids=ids, labels=ids).loss.backward()
            times.append(time.perf_counter())
        model.zero_grad()
        return times[-1] - times[1]  # without the first step, which gets warm

    try:
        fastest = min([*(count for count in (1, 2, 4, 8) if count < found), found], key=seconds)
        torch.set_num_threads(fastest)
        yield f"on the CPU, with the fastest number of threads: {fastest} of {found}"
    finally:
        torch.set_num_threads(found)


@contextmanager
def _seconds_left(console: Console) -> Iterator[Report]:
    """Show a bar on a terminal, nothing elsewhere."""
    columns = (TextColumn("  "), BarColumn(30), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda done, text: bar.update(task, completed=done, description=text)
