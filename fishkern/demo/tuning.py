"""The last step of the demo: the model is tuned on text of another kind, all of it, and two percent of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import Tensor, nn

import fishkern as fk
from fishkern.demo.model import WINDOW, WINDOWS, evaluate, windows
from fishkern.demo.text import read_code

ALL, FISHER, RANDOM = "everything, torch's AdamW", "2% by Fisher, MaskedAdamW", "2% by chance, MaskedAdamW"
DENSITY = 0.02
RATES = (1e-3, 4e-3)  # each arm is trained at both, and the better one is shown
FISHER_EXAMPLES = 128
MEASURED = 128  # held-out rows: half of them choose the rate

Batch = dict[str, Tensor]
Report = Callable[[int, int], None]


@dataclass
class Arm:
    """One way to tune the model, and how it did.

    Attributes:
        model: The trained model.
        selection: What was trained; ``None`` for everything.
        state_bytes: Of the optimizer's state.
        curve: Steps, and bits per byte of the held-out source after them.
        choice: Bits per byte of other held-out rows at the end, by which the learning rate is chosen.
    """

    model: nn.Module
    selection: fk.Selection | None
    state_bytes: int
    curve: list[tuple[int, float]]
    choice: float


def compare(model: nn.Module, steps: int, seed: int, report: Report) -> dict[str, Arm]:
    """Tune copies of a model on the same rows of Python source in the same order, once for each arm and learning rate.

    Args:
        model: A causal language model over bytes; left as it is.
        steps: Of training, for each arm and learning rate.
        seed: Of the rows, and of what is chosen by chance.
        report: Called with the steps done so far, and all steps.

    Returns:
        The arms by name, each at the better of its learning rates.
    """
    task = _Task(model, *_source(model), steps, seed)
    selections = {
        ALL: None,
        FISHER: fk.select(fk.estimate(model, task.examples()), fk.GlobalTopK(density=DENSITY)),
        RANDOM: fk.select(dict(model.named_parameters()), fk.Random(density=DENSITY, seed=seed)),
    }
    runs = [(name, rate) for name in selections for rate in RATES]
    arms: dict[str, Arm] = {}
    for n, (name, rate) in enumerate(runs):

        def report_step(step: int, before: int = n * steps) -> None:
            report(before + step, len(runs) * steps)

        arm = task.trained(selections[name], rate, report_step)
        arms[name] = min(arms.get(name, arm), arm, key=lambda one: one.choice)
    return arms


def comparison_table(arms: dict[str, Arm], delta_bytes: int) -> Table:
    """Show what the arms took, and how they did.

    Args:
        arms: What :func:`compare` returned.
        delta_bytes: Size of the file with the trained values of an arm that trains some entries.

    Returns:
        The table.
    """
    table = Table()
    table.add_column("trained", no_wrap=True)
    for heading in ("entries", "state", "file", "before", "after"):  # all of it within 80 columns
        table.add_column(heading, justify="right")
    for name, arm in arms.items():
        parameters = list(arm.model.parameters())
        trained = sum(one.numel() for one in parameters) if arm.selection is None else arm.selection.count
        kept = sum(one.nbytes for one in parameters) if arm.selection is None else delta_bytes
        sizes = [f"{size / 1e6:.2f} MB" for size in (arm.state_bytes, kept)]
        table.add_row(name, f"{trained:,}", *sizes, f"{arm.curve[0][1]:.3f}", f"{arm.curve[-1][1]:.3f}")
    return table


@dataclass(frozen=True)
class _Task:
    """What all arms share: the model that they begin with, the rows, and the number of steps."""

    model: nn.Module
    text: Tensor
    held_out: list[Batch]
    steps: int
    seed: int

    def examples(self) -> list[Batch]:
        """Rows to estimate on, in batches of 32."""
        return [_batch(rows) for rows in self._drawn(FISHER_EXAMPLES, self.seed).split(32)]

    def trained(self, selection: fk.Selection | None, rate: float, report: Callable[[int], None]) -> Arm:
        """Train a copy of the model: all of it, or what is selected."""
        model = copy.deepcopy(self.model)
        if selection is None:
            optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
        else:
            optimizer = fk.MaskedAdamW(model, selection, lr=rate, weight_decay=0.0)
        curve = [(0, evaluate(model, self.held_out[::2]))]
        rows = self._drawn(self.steps * WINDOWS, self.seed + 1).split(WINDOWS)
        for step, row in enumerate(rows, 1):
            model.train()
            model(**_batch(row)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % max(1, self.steps // 6) == 0 or step == self.steps:
                curve.append((step, evaluate(model, self.held_out[::2])))
            report(step)
        return Arm(model, selection, _state_bytes(optimizer), curve, evaluate(model, self.held_out[1::2]))

    def _drawn(self, count: int, seed: int) -> Tensor:
        rows = windows(self.text, count, torch.Generator().manual_seed(seed))
        return rows.to(next(self.model.parameters()).device)


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    if isinstance(optimizer, fk.MaskedAdamW):
        return optimizer.state_bytes
    return sum(value.nbytes for state in optimizer.state.values() for value in state.values())


def _source(model: nn.Module) -> tuple[Tensor, list[Batch]]:
    """Python source to train on, and batches of other files."""
    text, others = read_code()
    rows = others[: len(others) // WINDOW * WINDOW].view(-1, WINDOW)
    spread = rows[:: max(1, len(rows) // MEASURED)][:MEASURED].to(next(model.parameters()).device)
    return text, [_batch(part) for part in spread.split(max(1, len(spread) // 8))]


def _batch(ids: Tensor) -> Batch:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
