"""Sparse fine-tuning of a model's own weights: the same number of entries, chosen by what people name for it.

All arms choose on the model before the task, train as many entries of the same pool with ``fk.MaskedAdamW``, and search
the same learning rates; *random* has its own rate by that, too. What is published is simplified in two places, alike
for all: the entries are chosen once, and by one ranking of the whole pool where nothing else is said.

* **lift**: the largest magnitudes of each matrix after its best approximation of an eighth of its rank (LIFT, Liu et
  al., 2025, arXiv:2506.00772, which chooses anew while it trains);
* **wanda**: weight times the norm of its input (Sun et al., 2023, arXiv:2306.11695).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

import fishkern as fk
from benchmarks.engine.records import Record
from benchmarks.studies.cheaper_rivals.arms import ARMS, Trained
from benchmarks.studies.cheaper_rivals.subjects import Loaded
from benchmarks.studies.cheaper_rivals.uses import Search
from benchmarks.studies.comparing.low_rank import low_rank


@dataclass(frozen=True)
class Chooser:
    """One way to choose the entries that train.

    Args:
        says: What it is, in words.
        choose: From a model with its examples to the selection.
    """

    says: str
    choose: Callable[[Trained], fk.Selection]


def _by(arm: str) -> Callable[[Trained], fk.Selection]:
    return lambda trained: fk.select(ARMS[arm].way(trained), fk.GlobalTopK(density=trained.setting.sparse))


def _magnitude(trained: Trained) -> fk.Selection:
    scores = fk.saliency(trained.model, parameters=list(trained.pool))
    return fk.select(scores, fk.GlobalTopK(density=trained.setting.sparse))


def _random(trained: Trained) -> fk.Selection:
    shapes = {name: torch.zeros_like(parameter) for name, parameter in trained.pool.items()}
    return fk.select(shapes, fk.Random(density=trained.setting.sparse, seed=trained.seed))


def _wanda(trained: Trained) -> fk.Selection:
    norms = fk.estimate(trained.model, trained.batches(), fk.InputNorms())
    return fk.select(fk.saliency(trained.model, norms), fk.GlobalTopK(density=trained.setting.sparse))


def _lift(trained: Trained) -> fk.Selection:
    scores = {name: low_rank(parameter).abs() for name, parameter in trained.pool.items()}
    return fk.select(scores, fk.PerTensorTopK(density=trained.setting.sparse))


def _whole(trained: Trained) -> fk.Selection:
    shapes = {name: parameter.shape for name, parameter in trained.pool.items()}
    return fk.Selection(shapes, {}, whole=list(shapes))


CHOOSERS = {
    "exact": Chooser("the exact Fisher", _by("exact")),
    "few": Chooser("the exact Fisher of an eighth of the examples", _by("few")),
    "batch-32": Chooser("squares of the gradients of batches", _by("batch-32")),
    "sketch-1": Chooser("one draw of signs", _by("sketch-1")),
    "lift": Chooser("magnitude after an approximation of low rank", _lift),
    "wanda": Chooser("weight times the norm of its input", _wanda),
    "magnitude": Chooser("magnitude", _magnitude),
    "random": Chooser("at random", _random),
    "whole": Chooser("all entries of the pool, for comparison", _whole),
}


def sparse_run(chooser: str, loaded: Loaded, untrained: Trained) -> Record:
    """Train the chosen entries at every rate, and score the best."""
    selection = CHOOSERS[chooser].choose(untrained)
    setting, task = untrained.setting, loaded.tasks[0]
    search = Search(replace(loaded, tasks=loaded.tasks[:1]))
    for lr in setting.rates:
        model = loaded.fresh()
        optimizer = fk.MaskedAdamW(model, selection, lr=lr, weight_decay=0.0)
        loaded.train(model, [*task.ours, *task.theirs], optimizer, setting, untrained.seed)
        search.offer(model, lr=lr)
    return {"trained": selection.count, "of": selection.total, **search.result()}
