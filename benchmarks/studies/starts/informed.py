"""The starts of the library, ``fk.farss`` and ``fk.filet``, at the budget of all arms.

Deep matrices get ``deep_rank``, and the shallow ones share what is left, by importance, in the proportions of the
published defaults (128 deep, 50 on average and at most 64 shallow). The budget is dealt out among matrices of one
shape, so that every arm trains the same number of parameters, whatever the ranks are.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

import fishkern as fk
from benchmarks.studies.starts import controls
from benchmarks.studies.starts.attach import layer_of, targets_of
from benchmarks.studies.starts.tasks import Task


@dataclass(frozen=True)
class WithinShapes(fk.RankRule):
    """Apply a rule to the matrices of each shape on their own, so that the parameters are those of the average rank.

    Args:
        rule: Of the matrices of one shape.
        shapes: The shape of each matrix by name.
        dealt: A seed, with which the ranks of one shape are then dealt out anew; None to leave them.
    """

    rule: fk.RankRule
    shapes: Mapping[str, Hashable]
    dealt: int | None = None

    @property
    def settings(self) -> dict[str, Any]:
        return {**self.rule.settings, "within": "shapes", "dealt": self.dealt}

    def ranks(self, importances: Mapping[str, float], largest: Mapping[str, int]) -> dict[str, int]:
        ranks: dict[str, int] = {}
        for shape in dict.fromkeys(self.shapes[name] for name in importances):
            group = {name: value for name, value in importances.items() if self.shapes[name] == shape}
            limits = {name: largest[name] for name in group if name in largest}
            ranks |= fk.allocate_ranks(group, self.rule, largest=limits)
        ranks = {name: ranks[name] for name in importances}
        return ranks if self.dealt is None else controls.permuted(ranks, self.shapes, self.dealt)


def farss(
    model: nn.Module,
    task: Task,
    seed: int,
    *,
    fisher: Literal["kronecker", "joint"] = "kronecker",
    ranks: Literal["inverse", "permuted", "uniform"] = "inverse",
    exchanged: bool = False,
) -> fk.AdapterInit:
    """The start of FARSS.

    Args:
        model: Untrained.
        task: Its setting has the budget.
        seed: Of the rows that are looked at, and of permuted ranks.
        fisher: Scores and importances from Kronecker factors, or exact ones.
        ranks: Of the shallow matrices: by importance, the same ones dealt out anew, or one for all.
        exchanged: Whether shallow layers take the largest scores and deep ones the smallest.
    """
    setting, modules = task.setting, targets_of(model, task)
    average = setting.shallow_rank(1 + max(map(layer_of, modules)))
    rule = fk.UniformRank(int(average)) if ranks == "uniform" else fk.InverseImportance(average, most=int(average) + 1)
    shapes = {f"{path}.weight": tuple(module.weight.shape) for path, module in modules.items()}
    start = fk.farss(
        model,
        task.batches(task.drawn(seed)),
        shallow=setting.shallow,
        rank=setting.deep_rank,
        ranks=WithinShapes(rule, shapes, dealt=seed if ranks == "permuted" else None),
        targets=[f"*.{target}" for target in task.targets],
        fisher=fisher,
        max_examples=None,
    )
    return _exchanged(model, task, seed, start) if exchanged else start


def _exchanged(model: nn.Module, task: Task, seed: int, start: fk.AdapterInit) -> fk.AdapterInit:
    """The same ranks, with the largest scores in shallow layers and the smallest in deep ones: a second pass."""
    names = {f"{path}.weight": path for path in start}
    energies = fk.estimate(
        model,
        task.batches(task.drawn(seed)),
        fk.DirectionEnergy(),
        parameters=lambda name, _: name in names,
    )
    shallow = {name: layer_of(path) <= task.setting.shallow for name, path in names.items()}
    rule = fk.DirectionInit(
        ranks={name: start.ranks[path] for name, path in names.items()},
        order={name: "largest" if shallow[name] else "smallest" for name in names},
        score="weighted",
        magnitude="sigma",
    )
    return fk.initialize(model, energies, rule)


def filet(
    model: nn.Module,
    task: Task,
    seed: int,
    *,
    fisher: Literal["kronecker", "joint"] = "kronecker",
    order: Literal["smallest", "largest"] = "smallest",
) -> fk.AdapterInit:
    """The start of FILet, at one rank for all matrices."""
    return fk.filet(
        model,
        task.batches(task.drawn(seed)),
        rank=task.setting.rank,
        targets=[f"*.{target}" for target in task.targets],
        order=order,
        fisher=fisher,
        max_examples=None,
    )
