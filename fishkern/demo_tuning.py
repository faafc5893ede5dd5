"""The end of ``fishkern demo``: an adapter is trained on text of another kind, its entries chosen in four ways."""

from __future__ import annotations

import copy
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import fishkern as fk

if TYPE_CHECKING:
    from rich.table import Table

ARMS = {"Fisher": "largest", "random": "random", "reverse": "smallest"}
PLAIN = "plain LoRA"
RANK = 4  # of the adapter that the arms choose from; plain LoRA has rank 1, and all arms train as many entries
FILES = 40  # of Python source; every 8th is kept from training
WINDOW, WINDOWS = 64, 16  # bytes of a row, and rows of a step
FISHER_EXAMPLES = 128
RATE = 3e-3

Evaluate = Callable[[nn.Module, list[dict[str, Tensor]]], float]
Report = Callable[[int, int], None]


@dataclass
class Run:
    """How one arm did.

    Attributes:
        trained: Number of trained entries.
        selecting: Seconds that the selection took.
        curve: Steps, and bits per byte of the held-out code after them.
    """

    trained: int
    selecting: float
    curve: list[tuple[int, float]] = field(default_factory=list)


def compare(model: nn.Module, evaluate: Evaluate, steps: int, seed: int, report: Report) -> dict[str, Run]:
    """Train the adapter once for each arm, on the same rows of Python source in the same order.

    Args:
        model: A causal language model over bytes; left as it is.
        evaluate: Measures a model on batches, in bits per byte.
        steps: Of training, for each arm.
        seed: Of the adapter, the rows, and the random arm.
        report: Told the steps done, and to be done.

    Returns:
        What came out, by arm; plain LoRA comes last.
    """
    device = next(model.parameters()).device
    text, held_out = read_code()
    rows = held_out[: len(held_out) // WINDOW * WINDOW].view(-1, WINDOW)
    rows = rows[:: max(1, len(rows) // 64)][:64].to(device)
    batches = [_batch(part) for part in rows.split(32)]
    runs = {}
    for number, arm in enumerate([*ARMS, PLAIN]):
        generator = torch.Generator().manual_seed(seed)
        adapted = _adapted(model, 1 if arm == PLAIN else RANK, seed)
        examples = [_batch(part) for part in _windows(text, FISHER_EXAMPLES, generator).to(device).split(32)]
        start = time.perf_counter()
        if arm == PLAIN:
            named = {name: value for name, value in adapted.named_parameters() if value.requires_grad}
            selection = fk.Selection({name: value.shape for name, value in named.items()}, {}, whole=named)
        else:
            selection = fk.fish_tuning(adapted, examples, match=_lora(1), order=ARMS[arm], seed=seed)
        run = Run(selection.count, time.perf_counter() - start)
        optimizer = fk.MaskedAdamW(adapted, selection, lr=RATE, weight_decay=0.0, max_grad_norm=1.0)
        run.curve.append((0, evaluate(adapted, batches)))
        for step in range(1, steps + 1):
            adapted.train()
            batch = _batch(_windows(text, WINDOWS, generator).to(device))
            adapted(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % max(1, steps // 6) == 0 or step == steps:
                run.curve.append((step, evaluate(adapted, batches)))
            report(number * steps + step, (len(ARMS) + 1) * steps)
        runs[arm] = run
    return runs


def table(runs: dict[str, Run]) -> Table:
    """Show how the arms did.

    Args:
        runs: What :func:`compare` returned.

    Returns:
        The table.
    """
    from rich.table import Table

    made = Table()
    made.add_column("chosen by", no_wrap=True)
    for heading in ("trained", "bits per byte before", "after", "seconds to select"):
        made.add_column(heading, justify="right")
    for arm, run in runs.items():
        first, last = run.curve[0][1], run.curve[-1][1]
        selecting = "" if arm == PLAIN else f"{run.selecting:.2f}"
        made.add_row(arm, f"{run.trained:,}", f"{first:.3f}", f"{last:.3f}", selecting)
    return made


def read_code() -> tuple[Tensor, Tensor]:
    """Read source of the standard library, which the documentation that the model knows is not.

    Returns:
        Byte values to train on, and those of other files: ``[S]`` each.
    """
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"), key=lambda path: (len(path.name), path.name))
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for number, path in enumerate(paths[:FILES]):
        parts[number % 8 == 0].append(path.read_bytes())
    kept, others = (torch.frombuffer(bytearray(b"\n".join(part)), dtype=torch.uint8).long() for part in parts)
    return kept, others


def _lora(rank: int) -> Any:
    import peft

    return peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", init_lora_weights="pissa", task_type="CAUSAL_LM"
    )


def _adapted(model: nn.Module, rank: int, seed: int) -> nn.Module:
    import peft

    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(seed)  # that of the CPU: only it is restored
        return peft.get_peft_model(copy.deepcopy(model), _lora(rank))


def _windows(text: Tensor, count: int, generator: torch.Generator) -> Tensor:
    begin = torch.randint(len(text) - WINDOW, (count, 1), generator=generator)
    return text[begin + torch.arange(WINDOW)]


def _batch(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
