"""The arms: from an untrained model to the PEFT model that is trained, in the order of their importance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from benchmarks.studies.starts import controls, informed, peft_starts, published
from benchmarks.studies.starts.attach import attach, layer_of, targets_of
from benchmarks.studies.starts.tasks import Task

PADDED_BATCH = {"farss": 2, "filet": 8}  # rows in a batch of the published code
PUBLISHED_ROWS = {"farss": 16, "filet": 320}

Make = Callable[[nn.Module, Task, int], nn.Module]


@dataclass(frozen=True)
class Arm:
    """One way to start an adapter.

    Args:
        says: What it is, in one line.
        make: From model, task and seed to the PEFT model; its time counts.
        equal: Whether it trains exactly as many parameters as the others.
    """

    says: str
    make: Make
    equal: bool = True


def _farss(**changed) -> Make:
    return lambda model, task, seed: attach(model, informed.farss(model, task, seed, **changed), task)


def _filet(**changed) -> Make:
    return lambda model, task, seed: attach(model, informed.filet(model, task, seed, **changed), task)


def _random(start: Callable) -> Make:
    return lambda model, task, seed: attach(model, controls.randomised(start(model, task, seed), seed), task)


def _milora(model: nn.Module, task: Task, seed: int) -> nn.Module:
    return attach(model, controls.smallest(targets_of(model, task), task.setting.rank), task)


def _published_farss(model: nn.Module, task: Task, seed: int) -> nn.Module:
    setting, modules = task.setting, targets_of(model, task)
    layers = 1 + max(map(layer_of, modules))
    start = published.farss(
        model,
        _padded(task, seed, "farss"),
        modules,
        shallow=lambda path: layer_of(path) <= setting.shallow,
        rank=setting.deep_rank,
        average=setting.shallow_rank(layers),
        seed=seed,
    )
    return attach(model, start, task)


def _published_filet(model: nn.Module, task: Task, seed: int) -> nn.Module:
    start = published.filet(model, _padded(task, seed, "filet"), targets_of(model, task), rank=task.setting.rank)
    return attach(model, start, task)


def _padded(task: Task, seed: int, system: str):
    rows = task.drawn(seed, PUBLISHED_ROWS[system])
    return task.batches(rows, PADDED_BATCH[system], length=task.setting.max_length)


ARMS = {
    "lora": Arm("LoRA: a random A, and B = 0", peft_starts.lora),
    "pissa": Arm("PiSSA: the largest singular values", peft_starts.pissa),
    "farss": Arm("FARSS: the smallest scores in shallow layers, the largest above; ranks by importance", _farss()),
    "farss-exact": Arm("FARSS with exact scores and importances, per example", _farss(fisher="joint")),
    "filet": Arm("FILet: the smallest energies", _filet()),
    "filet-exact": Arm("FILet with exact energies, per example", _filet(fisher="joint")),
    "filet-max": Arm("FILet turned round: the largest energies", _filet(order="largest")),
    "eva": Arm("EVA of PEFT, without redistribution: directions of the inputs, and B = 0", peft_starts.eva),
    "corda": Arm("CorDA of PEFT: knowledge-preserving for a language model, else previewing", peft_starts.corda),
    "lora-ga": Arm("LoRA-GA of PEFT: directions of the gradient", peft_starts.lora_ga),
    "milora": Arm("MiLoRA: the smallest singular values", _milora),
    "random": Arm("control: random orthonormal directions, of the sizes and ranks of farss", _random(informed.farss)),
    "random-filet": Arm("control: random orthonormal directions, of the sizes of filet", _random(informed.filet)),
    "reversed": Arm("control: farss with the two orders exchanged", _farss(exchanged=True)),
    "permuted": Arm("control: farss with the ranks of equal shapes dealt out anew", _farss(ranks="permuted")),
    "uniform": Arm("control: farss with one rank for all", _farss(ranks="uniform")),
    "farss-published": Arm("FARSS's published formulas with their quirks", _published_farss, equal=False),
    "filet-published": Arm("FILet's published formulas with their quirks", _published_filet),
}
LANGUAGE = (
    "lora", "pissa", "farss", "farss-exact", "random", "reversed",
    "corda", "filet", "permuted", "uniform", "milora", "filet-exact", "random-filet", "eva", "lora-ga", "filet-max",
    "farss-published", "filet-published",
)  # fmt: skip
CLASSES = (
    "lora", "farss", "filet", "pissa", "random", "farss-exact",
    "eva", "lora-ga", "filet-exact", "filet-max", "random-filet", "reversed", "uniform", "permuted", "corda", "milora",
    "farss-published", "filet-published",
)  # fmt: skip


def arms_of(task: str) -> tuple[str, ...]:
    """The arms of a task by name, the most important first."""
    return LANGUAGE if task.startswith("stories") else CLASSES
