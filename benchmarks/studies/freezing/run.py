"""One run: train a model by one arm, and measure it around each event and at the end."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

import fishkern as fk
from benchmarks.engine.memory import step_peak_mib
from benchmarks.engine.origin import version_of
from benchmarks.engine.records import Record
from benchmarks.studies.comparing.figures import finite, means
from benchmarks.studies.comparing.stopwatch import Stopwatch
from benchmarks.studies.freezing.arms import ARMS, Freezing
from benchmarks.studies.freezing.tasks import Task


def run(
    arm: str, lr: float, seed: int, task: Task, kept: Sequence[int], *, choosing: bool, steps: int | None = None
) -> Record:
    """Train one arm once.

    Args:
        arm: Its name.
        lr: Learning rate of the first step; it falls linearly to 0.
        seed: Of what is drawn, of the probe, and of the order of training.
        task: Model and data.
        kept: Entries that our arm kept after each event, which a control keeps as well.
        choosing: Whether the rows on which rates are chosen are measured, or those that the figures come from.
        steps: Stop after so many.
    """
    training = Training(arm, lr, seed, task, kept)
    training.go(choosing=choosing, steps=steps)
    measured = training.measured(few=False, choosing=choosing)
    return {
        "curve": [{"step": len(training.losses), **measured}],
        "losses": means(training.losses),
        "events": training.events,
        "trained": training.trained,
        "kept": training.optimizer.selection.count,
        "reading": round(training.seconds["freezing"], 2),
        "seconds": round(training.seconds["training"] + training.seconds["freezing"], 2),
        "peft": version_of("peft"),
    }


class Training:
    """A model in training.

    Args:
        arm: Name of the arm.
        lr: Learning rate of the first step.
        seed: Of what is drawn.
        task: Model and data.
        kept: Entries that our arm kept after each event.
    """

    def __init__(self, arm: str, lr: float, seed: int, task: Task, kept: Sequence[int]) -> None:
        self.task, self.seed = task, seed
        self.seconds = Stopwatch(task.device, "training", "freezing", "measuring")
        self.model = task.fresh(seed)
        pool = {name: value.shape for name, value in self.model.named_parameters() if value.requires_grad}
        self.optimizer = fk.MaskedAdamW(self.model, fk.Selection(pool, {}, whole=pool), lr=lr, weight_decay=0.0)
        self.trained = self.optimizer.selection.count
        self.losses: list[float] = []
        self.events: list[Record] = []
        self._times: list[float] = []  # of the steps since the last event
        with self.seconds("freezing"):
            self._freezing: Freezing | None = ARMS[arm].make(self.model, task, self.optimizer, seed, kept)

    def go(self, *, choosing: bool, steps: int | None = None) -> None:
        """Train to the end."""
        rows = self.task.steps(self.seed)[:steps]
        schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 - step / len(rows))
        torch.manual_seed(self.seed)  # the dropout is the same for all arms, whatever they drew before
        after = 0
        for step, batch in enumerate(map(self.task.batch, rows), start=1):
            if step == after:  # rows of this step, and so its size, are the same for all arms
                self.events[-1]["peak_mib"] = round(step_peak_mib(partial(self._step, batch)), 1)
            else:
                self._step(batch)
            schedule.step()
            if self.task.setting.is_event(step):
                self.events.append(self._event(step, shown=not choosing))
                after = step + self.task.setting.after
            with self.seconds("freezing"):
                if self._freezing is not None:
                    self._freezing.step()
            if step == after:  # the published code decides within the step after
                self.events[-1] |= self._state()
                if not choosing:
                    self.events[-1]["after"] = self.measured(few=True)["score"]
            self.optimizer.zero_grad()

    def measured(self, *, few: bool, choosing: bool = False) -> Record:
        """The figures of the model as it is."""
        with self.seconds("measuring"), torch.random.fork_rng():
            measured = self.task.measure(self.model, choosing=choosing, few=few)
        return {name: finite(value) for name, value in measured.items()}

    def _step(self, batch: dict) -> None:
        before = self.seconds["training"]
        with self.seconds("training"):
            loss = self.task.loss(self.model, batch)
            loss.backward()
            self.optimizer.step()
        self._times.append(self.seconds["training"] - before)
        self.losses.append(loss.item())

    def _event(self, step: int, *, shown: bool) -> Record:
        """What is known before an event: the time of a step until then, and how good the model is."""
        times, self._times = self._times, []
        score = {"before": self.measured(few=True)["score"]} if shown else {}
        return {"step": step, "seconds_a_step": round(statistics.median(times), 4), **score}

    def _state(self) -> Record:
        """Entries in training, the size of the optimizer's state, and parameters that need no gradient any more."""
        still = sum(not value.requires_grad for name, value in _named(self.model) if name in self.optimizer.selection)
        return {
            "kept": self.optimizer.selection.count,
            "state_mib": round(self.optimizer.state_bytes / 2**20, 2),
            "still": still,
        }


def _named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(fk.canonical_name(name), value) for name, value in model.named_parameters()]
