"""The last step of the demo: an adapter is trained on text of another kind, its entries chosen in four ways."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

import fishkern as fk
from fishkern.demo.model import WINDOW, WINDOWS, evaluate, windows
from fishkern.demo.text import read_code

ORDERS = {"Fisher": "largest", "random": "random", "reverse": "smallest"}
PLAIN = "plain LoRA"
RANK = 4  # of the adapter that entries are chosen from; plain LoRA has rank 1, and every arm trains as many entries
FISHER_EXAMPLES = 128
MEASURED = 64  # held-out rows
LEARNING_RATE = 3e-3

Batch = dict[str, Tensor]
Report = Callable[[int, int], None]


@dataclass
class Arm:
    """One way to choose the entries, and how it did.

    Attributes:
        trained: Number of trained entries.
        selecting: Seconds that the selection took.
        curve: Steps, and bits per byte of the held-out source after them.
    """

    trained: int
    selecting: float
    curve: list[tuple[int, float]] = field(default_factory=list)


def compare(model: nn.Module, steps: int, seed: int, report: Report) -> dict[str, Arm]:
    """Train the adapter once for each arm, on the same rows of Python source in the same order.

    Args:
        model: A causal language model over bytes; left as it is.
        steps: Of training, for each arm.
        seed: Of the adapter, the rows, and the random arm.
        report: Called with the steps done so far, and the steps of all arms.

    Returns:
        The arms by name; plain LoRA comes last.
    """
    text, others = read_code()
    held_out = _held_out_batches(others, next(model.parameters()).device)
    names = [*ORDERS, PLAIN]
    total = steps * len(names)
    arms: dict[str, Arm] = {}

    def report_step(step: int) -> None:
        report(steps * len(arms) + step, total)

    for name in names:
        arms[name] = _train_arm(name, model, text, held_out, steps=steps, seed=seed, report=report_step)
    return arms


def comparison_table(arms: dict[str, Arm]) -> Table:
    """Show how the arms did.

    Args:
        arms: What :func:`compare` returned.

    Returns:
        The table.
    """
    table = Table()
    table.add_column("chosen by", no_wrap=True)
    for heading in ("trained", "bits per byte before", "after", "seconds to select"):
        table.add_column(heading, justify="right")
    for name, arm in arms.items():
        first, last = arm.curve[0][1], arm.curve[-1][1]
        selecting = "" if name == PLAIN else f"{arm.selecting:.2f}"
        table.add_row(name, f"{arm.trained:,}", f"{first:.3f}", f"{last:.3f}", selecting)
    return table


def _train_arm(
    name: str,
    model: nn.Module,
    text: Tensor,
    held_out: list[Batch],
    *,
    steps: int,
    seed: int,
    report: Callable[[int], None],
) -> Arm:
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    adapted = _adapted(model, 1 if name == PLAIN else RANK, seed)
    # Plain LoRA draws them as well, so that every arm trains on the same rows.
    examples = [_batch(rows) for rows in windows(text, FISHER_EXAMPLES, generator).to(device).split(32)]
    start = time.perf_counter()
    selection = _select(name, adapted, examples, seed)
    arm = Arm(selection.count, time.perf_counter() - start)
    optimizer = fk.MaskedAdamW(adapted, selection, lr=LEARNING_RATE, weight_decay=0.0, max_grad_norm=1.0)
    arm.curve.append((0, evaluate(adapted, held_out)))
    for step in range(1, steps + 1):
        adapted.train()
        batch = _batch(windows(text, WINDOWS, generator).to(device))
        adapted(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % max(1, steps // 6) == 0 or step == steps:
            arm.curve.append((step, evaluate(adapted, held_out)))
        report(step)
    return arm


def _select(name: str, adapted: nn.Module, examples: list[Batch], seed: int) -> fk.Selection:
    if name == PLAIN:
        trainable = {key: value for key, value in adapted.named_parameters() if value.requires_grad}
        return fk.Selection({key: value.shape for key, value in trainable.items()}, {}, whole=trainable)
    return fk.fish_tuning(adapted, examples, match=_lora(1), order=ORDERS[name], seed=seed)


def _held_out_batches(source: Tensor, device: torch.device) -> list[Batch]:
    rows = source[: len(source) // WINDOW * WINDOW].view(-1, WINDOW)
    spread = rows[:: max(1, len(rows) // MEASURED)][:MEASURED].to(device)
    return [_batch(part) for part in spread.split(32)]


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


def _batch(ids: Tensor) -> Batch:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
