"""One run: choose what trains by one arm, train it, measure it."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from functools import partial

import torch
from torch import nn

import fishkern as fk
import fishkern.tokens
from benchmarks.engine.flops import flops
from benchmarks.engine.memory import MIB, step_peak_mib
from benchmarks.engine.origin import version_of
from benchmarks.engine.records import Record
from benchmarks.studies.comparing.figures import finite, means
from benchmarks.studies.comparing.stopwatch import Stopwatch
from benchmarks.studies.tr_pts.arms import ARMS
from benchmarks.studies.tr_pts.pictures import Batch, Pictures
from fishkern.hosts import is_head


def run(arm: str, lr: float, seed: int, task: Pictures, *, choosing: bool, steps: int | None = None) -> Record:
    """Train one arm once.

    Args:
        arm: Its name.
        lr: Learning rate of the first step; it falls linearly to 0. It is that of what trains beside the classifier,
            which has one of its own, or of the classifier where nothing else does.
        seed: Of the classifier, of what is drawn, and of the order of training.
        task: Model and data.
        choosing: Whether the images on which rates are chosen are measured, or those that the figures come from.
        steps: Stop after so many.
    """
    seconds = Stopwatch(task.device, "ranking", "training", "measuring")
    model = task.fresh(seed)
    size = sum(value.numel() for value in model.parameters())  # without adapters
    torch.manual_seed(seed)
    with seconds("ranking"):
        prepared = ARMS[arm].make(model, task, seed)
    model = prepared.model
    if prepared.reduction is not None:
        fishkern.tokens.attach(model, prepared.reduction)
    for name, value in model.named_parameters():  # a weight of which nothing trains needs no gradient
        value.requires_grad_(prepared.selection.counts.get(fk.canonical_name(name), 0) > 0)
    rows = task.steps(seed)[:steps]
    flops_of = counted(model, task.batch(rows[0]))
    head_lr = lr if ARMS[arm].rates == "head" else task.setting.head_rate
    training = Training(model, prepared.selection, lr, head_lr, seconds)
    training.go(map(task.batch, rows), len(rows))
    with seconds("measuring"):
        measured = task.measure(model, choosing=choosing)
    reduction = prepared.reduction
    return {
        "curve": [{"step": len(rows), **{name: finite(value) for name, value in measured.items()}}],
        "losses": means(training.losses),
        "trained": prepared.selection.count,
        "of": size,
        "reducing": None if reduction is None else {"layers": list(reduction.layers), "keep": reduction.keep},
        "flops": flops_of,
        "seconds_a_step": finite(round(statistics.median(training.seconds_of), 4)),
        "seconds_an_image": round(seconds["measuring"] / task.measured_images(choosing=choosing), 5),
        "ranking": round(seconds["ranking"], 2),
        "seconds": round(seconds["ranking"] + seconds["training"], 2),
        "peak_mib": round(training.peak, 2),
        "state_mib": round(training.optimizer.state_bytes / MIB, 4),
        "peft": version_of("peft"),
    }


class Training:
    """A model in training.

    Args:
        model: It.
        selection: What moves.
        lr: Learning rate of the first step.
        head_lr: That of the classifier.
        seconds: To which the time is added.
    """

    def __init__(
        self, model: nn.Module, selection: fk.Selection, lr: float, head_lr: float, seconds: Stopwatch
    ) -> None:
        self.model = model
        named = list(model.named_parameters())
        groups = [
            {"params": [each for each in named if is_head(each[0])], "lr": head_lr},
            {"params": [each for each in named if not is_head(each[0])], "lr": lr},
        ]
        # what moves whole is stepped by torch's fused update, so that full fine-tuning is as fast as with torch's own
        self.optimizer = fk.MaskedAdamW(groups, selection, lr=lr, weight_decay=0.0, fused=True)
        self.losses: list[float] = []
        self.seconds_of: list[float] = []  # each step
        self.peak = 0.0  # MiB of the second step, above weights and state, which the first one has made
        self._seconds = seconds

    def go(self, batches: Iterable[Batch], steps: int) -> None:
        """Take a step with each batch, of which there are so many."""
        schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 - step / steps)
        for number, batch in enumerate(batches):
            step = partial(self._step, batch)
            if number == 1:  # its rows are the same for all arms
                self.peak = step_peak_mib(step)
            else:
                step()
            schedule.step()

    def _step(self, batch: Batch) -> None:
        before = self._seconds["training"]
        with self._seconds("training"):
            loss = self.model(**batch).loss
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.seconds_of.append(self._seconds["training"] - before)
        self.losses.append(loss.item())


def counted(model: nn.Module, batch: Batch) -> dict[str, int]:
    """FLOPs for one image: matrix products, convolutions and attention, of a forward pass and of a training step."""
    images = len(batch["labels"])
    with torch.no_grad():
        forward = flops(lambda: model(**batch))
    step = flops(lambda: model(**batch).loss.backward())
    model.zero_grad()
    return {"forward": forward // images, "step": step // images}
