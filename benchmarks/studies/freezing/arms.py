"""The arms: what stops training while a model is trained, in the order of their importance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import nn

import fishkern as fk
from benchmarks.studies.freezing import controls
from benchmarks.studies.freezing.tasks import Task
from fishkern.freezing import ReferenceRule

OURS = "probe"  # whose kept entries the controls have
MILD = -1.3  # margin at which others found the published code to keep most of a model


class Freezing(Protocol):
    """What stops training; ``step`` is called after each step of the optimizer."""

    def step(self) -> object: ...


@dataclass(frozen=True)
class Arm:
    """One way to freeze.

    Args:
        says: What it is, in one line.
        make: From model, task, optimizer, seed, and the entries that our arm kept after each event.
        follows: Whether it keeps as many entries as our arm.
    """

    says: str
    make: Callable[[nn.Module, Task, fk.MaskedAdamW, int, Sequence[int]], Freezing | None]
    follows: bool = False


def _adaptune(estimator: fk.Estimator | None = None, **changed) -> Callable:
    def make(model: nn.Module, task: Task, optimizer: fk.MaskedAdamW, seed: int, kept: Sequence[int]) -> Freezing:
        setting = task.setting
        rule = fk.FreezeRule(spare=setting.spare, **changed)
        return fk.fisher_adaptune(
            model, task.probe(seed), optimizer=optimizer, every=setting.every, read_every=setting.read_every,
            estimator=estimator, rule=rule, likelihood=task.likelihood,
        )  # fmt: skip

    return make


def _reference(margin: float) -> Callable:
    def make(model: nn.Module, task: Task, optimizer: fk.MaskedAdamW, seed: int, kept: Sequence[int]) -> Freezing:
        setting = task.setting
        return fk.fisher_adaptune(
            model, None, optimizer=optimizer, every=setting.every, read_every=setting.read_every,
            rule=ReferenceRule(margin), compat="reference",  # which limits nothing
        )  # fmt: skip

    return make


def _control(order: controls.Order) -> Callable:
    def make(model: nn.Module, task: Task, optimizer: fk.MaskedAdamW, seed: int, kept: Sequence[int]) -> Freezing:
        return controls.Control(model, optimizer, task, seed, kept, order)

    return make


ARMS = {
    "none": Arm("nothing stops", lambda *_: None),
    OURS: Arm("FisherAdapTune on a fixed probe, exact diagonal", _adaptune()),
    "reference": Arm("FisherAdapTune as published, margin +1", _reference(1.0)),
    "reference-1.3": Arm("FisherAdapTune as published, margin -1.3", _reference(MILD)),
    "random": Arm("control: slices by chance", _control(controls.drawn), follows=True),
    "bottom": Arm("control: the layers next to the input", _control(controls.bottom), follows=True),
    "smallest-change": Arm("control: the slices that moved least", _control(controls.smallest_change), follows=True),
    "smallest-fisher": Arm("control: the least Fisher information", _control(controls.smallest_fisher), follows=True),
    "largest": Arm("control: the largest tensors", _control(controls.largest), follows=True),
    "factors": Arm("FisherAdapTune on a fixed probe, factored diagonal", _adaptune(fk.DiagonalKronecker())),
}
WITHOUT_FACTORS = ("nuclei",)  # transposed convolutions and positions of images have none


def arms_of(task: str) -> tuple[str, ...]:
    """The arms of a task by name, the most important first."""
    return tuple(name for name in ARMS if not (name == "factors" and task in WITHOUT_FACTORS))
