"""One run: start an adapter by one arm, train it, measure it."""

from __future__ import annotations

import torch

from benchmarks.engine.origin import version_of
from benchmarks.engine.records import Record
from benchmarks.studies.comparing.figures import finite, means
from benchmarks.studies.comparing.stopwatch import Stopwatch
from benchmarks.studies.starts.arms import ARMS
from benchmarks.studies.starts.tasks import Task


def run(arm: str, lr: float, seed: int, task: Task, *, choosing: bool, steps: int | None = None) -> Record:
    """Train one arm once.

    Args:
        arm: Its name.
        lr: Learning rate of the first step; it falls linearly to 0.
        seed: Of the examples that the start looks at, of what is drawn, and of the order of training.
        task: Model and data.
        choosing: Whether the rows on which rates are chosen are measured, or those that the figures come from.
        steps: Stop after so many.
    """
    seconds = Stopwatch(task.device, "starting", "training", "measuring")
    model = task.fresh(seed)
    probe = task.probe()
    with torch.no_grad():
        before = model(**probe).logits
    torch.manual_seed(seed)
    with seconds("starting"):
        model = ARMS[arm].make(model, task, seed)
    model.eval()
    with torch.no_grad():
        error = (model(**probe).logits - before).abs().max().item()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rows = task.steps(seed)[:steps]
    ends = {round(len(rows) * (n + 1) / task.setting.measured) for n in range(task.setting.measured)}
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(rows))
    losses: list[float] = []
    curve: list[Record] = []
    torch.manual_seed(seed)  # the dropout is the same for all arms, whatever a start drew
    model.train()
    for step, batch in enumerate(map(task.batch, rows), start=1):
        with seconds("training"):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if step in ends:
            with seconds("measuring"), torch.random.fork_rng():
                measured = task.measure(model, choosing=choosing)
            curve.append({"step": step, **{name: finite(value) for name, value in measured.items()}})
            model.train()
    return {
        "curve": curve,
        "losses": means(losses),
        "base": task.base,
        "trained": sum(parameter.numel() for parameter in trained),
        "step_0_error": error,
        "logits": before.abs().max().item(),
        "starting": round(seconds["starting"], 3),
        "seconds": round(seconds["starting"] + seconds["training"], 2),
        "measuring": round(seconds["measuring"], 2),
        "peft": version_of("peft"),
    }
