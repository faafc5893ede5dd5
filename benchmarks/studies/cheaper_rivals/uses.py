"""What an importance is used for, and what comes of it: selecting, pruning, merging, not forgetting."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from statistics import mean

import torch
from torch import Tensor, nn

import fishkern as fk
from benchmarks.engine.records import Record
from benchmarks.studies.cheaper_rivals.arms import Importance
from benchmarks.studies.cheaper_rivals.setting import Setting
from benchmarks.studies.cheaper_rivals.subjects import Loaded


def with_mean_one(importance: Mapping[str, Tensor]) -> Importance:
    """Scale all values, so that what is searched means the same for every arm."""
    total = sum(score.double().sum().item() for score in importance.values())
    mean = total / sum(score.numel() for score in importance.values())
    return {name: score.float() / mean for name, score in importance.items()}


def top(scores: Mapping[str, Tensor], setting: Setting) -> dict[float, fk.Selection]:
    return {density: fk.select(dict(scores), fk.GlobalTopK(density=density)) for density in setting.densities}


def overlaps(scores: Mapping[str, Tensor], others: Mapping[float, fk.Selection], setting: Setting) -> dict[str, float]:
    """The part of each selection of other examples that the scores select, too."""
    return {
        str(density): (ours & others[density]).count / others[density].count
        for density, ours in top(scores, setting).items()
    }


def pruned(model: nn.Module, importance: Importance, loaded: Loaded, setting: Setting) -> dict[str, float]:
    """The loss after the weights of least ``importance * weight^2`` have become zero, by their fraction."""
    saliency = fk.saliency(model, fk.Statistics(importance, count=1))
    losses = {}
    for density in setting.pruned:
        fewer = copy.deepcopy(model)
        fk.prune_(fewer, fk.select(saliency, fk.GlobalTopK(density=density, order="smallest")))
        losses[str(density)] = loaded.score(fewer, loaded.tasks[0].scored)
    return losses


def merged(
    models: tuple[nn.Module, nn.Module], importances: tuple[Importance, Importance], loaded: Loaded, setting: Setting
) -> Record:
    """The losses on both tasks of the merged model that is best on the rows for choosing."""
    given = dict(zip(models, importances, strict=True))
    search = Search(loaded)
    for share in setting.shares:
        model = loaded.fresh()
        model.load_state_dict(fk.fisher_merge(given, weights=[share, 1 - share]))
        search.offer(model, share=share)
    return search.result()


def consolidated(trained: nn.Module, importance: Importance, loaded: Loaded, setting: Setting, seed: int) -> Record:
    """The losses after the second task has been learnt under a penalty, of the weight that is best for both tasks.

    Args:
        trained: That has learnt the first task. Not changed.
        importance: With mean 1.
        loaded: The tasks.
        setting: The weights that are tried.
        seed: Of the order of rows.
    """
    search = Search(loaded)
    for weight in setting.penalties:
        model = copy.deepcopy(trained)
        learn_second(model, loaded, setting, seed, fk.QuadraticPenalty(importance, model, weight))
        search.offer(model, weight=weight)
    return search.result()


def learn_second(
    model: nn.Module, loaded: Loaded, setting: Setting, seed: int, penalty: Callable[[], Tensor] | None = None
) -> None:
    """Train a model of the first task on the second."""
    task = loaded.tasks[1]
    pool = (p for p in model.parameters() if p.requires_grad)
    optimizer = torch.optim.AdamW(pool, lr=setting.lr, weight_decay=0.0)
    loaded.train(model, [*task.ours, *task.theirs], optimizer, setting, seed, penalty)


class Search:
    """Models with different settings, the best of which is scored: that of least mean loss on the rows for choosing.

    Args:
        loaded: The tasks, which all count alike.
    """

    def __init__(self, loaded: Loaded) -> None:
        self._loaded = loaded
        self._tried: list[Record] = []
        self._best: nn.Module | None = None
        self._least = math.inf

    def offer(self, model: nn.Module, **settings: float) -> None:
        losses = [self._loaded.score(model, task.choosing) for task in self._loaded.tasks]
        self._tried.append({**settings, "choosing": losses})
        if mean(losses) < self._least:
            self._best, self._least, self._chosen = model, mean(losses), settings

    def result(self) -> Record:
        """What was tried, what was chosen, and the losses of all tasks on the rows that are scored."""
        if self._best is None:
            raise ValueError("every loss is infinite or NaN: there is nothing to choose from.")
        scored = [self._loaded.score(self._best, task.scored) for task in self._loaded.tasks]
        return {"tried": self._tried, **self._chosen, "scored": scored}
