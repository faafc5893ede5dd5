"""Cheaper rivals of the exact Fisher: what people use instead, and whether it does as well.

    python -m benchmarks cheaper-rivals --data FOLDER [--model llama vit] [--seeds N]

On two small models every arm gives an importance to each entry, from the same 256 examples of a task that the model has
learnt. Each is judged by (a) the **overlap** of what it selects with what the exact Fisher of 256 other examples
selects, and by three uses: (b) **pruning**, the loss after the weights of least importance times weight^2 have become
zero; (c) **merging**, the losses on both tasks of two models that have learnt one each; (d) **consolidation**, the loss
on the first task after the second has been learnt under a quadratic penalty. Importances are scaled to a mean of 1, and
every arm searches the same grids: shares in merging, penalties in consolidation, by the mean loss of both
tasks on rows that nothing else uses. *ones* is magnitude, the plain mean and plain decay to the start.

What an arm costs is counted, not timed: the FLOPs of its matrix products, where those of an ordinary forward and
backward pass over the examples are 1. An eigendecomposition is not counted. Adam's second moment is a by-product of
training.

Last, **sparse fine-tuning** of 0.5 % of the weights from the start, chosen by these and by what else people name for
it; every chooser searches the same learning rates (``sparse.py``).

A line in the results is an arm with a seed; what is there is skipped. Arms that need a package which is missing are
named, and left out. The models are small, and their tasks short: the figures rank the arms here, and no more.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

import fishkern as fk
from benchmarks.engine import RESULTS
from benchmarks.engine.flops import flops
from benchmarks.engine.origin import machine
from benchmarks.engine.records import Record, Records
from benchmarks.studies.cheaper_rivals.arms import ARMS, Importance, Trained
from benchmarks.studies.cheaper_rivals.setting import SETTINGS, Setting, for_sparse
from benchmarks.studies.cheaper_rivals.sparse import CHOOSERS, sparse_run
from benchmarks.studies.cheaper_rivals.subjects import Loaded, llama, vit
from benchmarks.studies.cheaper_rivals.table import table
from benchmarks.studies.cheaper_rivals.uses import (
    consolidated,
    learn_second,
    merged,
    overlaps,
    pruned,
    top,
    with_mean_one,
)
from benchmarks.studies.comparing.limit import Limit, say

LEFT = 3  # exit status where runs are left


def main(arguments: list[str] | None = None) -> int:
    """Make the runs that are missing, and print a table for each model."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.list:
        for name, arm in (*ARMS.items(), *CHOOSERS.items()):
            print(f"{name:10} {arm.says}")
        return 0
    if given.data is None:
        parser.error("--data is needed: the folder that holds glue and models")
    path = given.results / machine()["machine"] / "cheaper_rivals.jsonl"
    limit = Limit(given.seconds)
    loaders = {"llama": partial(llama, given.data), "vit": vit}
    for seed in range(given.seeds):
        for name in given.model:
            measure(loaders[name], seed, SETTINGS[name], path, limit)
    for name in given.model:
        print(f"{table(found(path, SETTINGS[name]))}\n")
    return LEFT if limit.reached else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks cheaper-rivals",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="holds glue and models")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument(
        "--model", nargs="+", choices=list(SETTINGS), default=list(SETTINGS), metavar="MODEL", help="of %(choices)s"
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--seconds", type=float, metavar="N", help=f"begin no run that may end later; status {LEFT} if some are left"
    )
    parser.add_argument("--list", action="store_true", help="say what each arm is, and end")
    return parser


def log_of(path: Path, setting: Setting) -> Records:
    """The records of this setting; a run that is there is not repeated."""
    return Records(path, study="cheaper-rivals", setting=asdict(setting))


def found(path: Path, setting: Setting) -> list[Record]:
    """All records of a setting, and of its sparse fine-tuning."""
    uses, sparse = log_of(path, setting), log_of(path, for_sparse(setting))
    return [*uses.find(quantity="uses"), *sparse.find(quantity="sparse")]


def measure(load: Callable[[int, Setting], Loaded], seed: int, setting: Setting, path: Path, limit: Limit) -> None:
    """Make the runs of one model and seed that are missing.

    Args:
        load: From a seed and the setting to the model and its tasks.
        seed: Of rows, training and draws.
        setting: Sizes and grids.
        path: Of the records.
        limit: When to stop.
    """
    log, sparse_log = log_of(path, setting), log_of(path, for_sparse(setting))
    arms = [arm for arm in ARMS if not log.find(seed=seed, quantity="uses", label=arm)]
    for arm in arms:
        if reason := ARMS[arm].missing:
            print(f"{arm} is left out: {reason}", file=sys.stderr)
    arms = [arm for arm in arms if not ARMS[arm].missing]
    choosers = [chooser for chooser in CHOOSERS if not sparse_log.find(seed=seed, quantity="sparse", label=chooser)]
    if not (arms or choosers) or not limit.allows():
        return
    say(f"{setting.model}, seed {seed}: the models")
    loaded = load(seed, setting)
    about = {"seed": seed, "about": loaded.about}
    if arms:
        bench = Bench(loaded, setting, seed)
        for arm in arms:
            if not limit.allows():
                return
            say(f"{setting.model}, seed {seed}: {arm}")
            with limit.timed():
                log.append({**about, "quantity": "uses", "label": arm, **bench.judged(arm)})
    untrained = Trained(loaded.fresh(), None, loaded.tasks[0].ours, loaded, for_sparse(setting), seed)
    for chooser in choosers:
        if not limit.allows():
            return
        say(f"{setting.model}, seed {seed}: sparse fine-tuning, {chooser}")
        with limit.timed():
            sparse_log.append(
                {**about, "quantity": "sparse", "label": chooser, **sparse_run(chooser, loaded, untrained)}
            )


def learn(loaded: Loaded, number: int, setting: Setting, seed: int) -> Trained:
    """Train a model on one of the tasks."""
    task, model = loaded.tasks[number], loaded.fresh()
    pool = (p for p in model.parameters() if p.requires_grad)
    optimizer = torch.optim.AdamW(pool, lr=setting.lr, weight_decay=0.0)
    loaded.train(model, [*task.ours, *task.theirs], optimizer, setting, seed)
    return Trained(model, optimizer, task.ours, loaded, setting, seed)


class Bench:
    """Two models that have learnt one task each, and what arms are compared with.

    Args:
        loaded: The model before, and the tasks.
        setting: Sizes and grids.
        seed: Of training and draws.
    """

    def __init__(self, loaded: Loaded, setting: Setting, seed: int) -> None:
        self._loaded, self._setting, self._seed = loaded, setting, seed
        self.first, self.second = (learn(loaded, number, setting, seed) for number in range(2))
        theirs = list(loaded.batches(loaded.tasks[0].theirs, setting.passes))
        self._others = top(fk.estimate(self.first.model, theirs), setting)
        forgetful = copy.deepcopy(self.first.model)
        learn_second(forgetful, loaded, setting, seed)
        self._free = [loaded.score(forgetful, task.scored) for task in loaded.tasks]
        self._pass = flops(self._ordinary_pass)
        self._before = loaded.score(self.first.model, loaded.tasks[0].scored)

    def _ordinary_pass(self) -> None:
        for batch in self.first.batches():
            self._loaded.losses(self.first.model, batch).sum().backward()
        self.first.model.zero_grad()

    def importance(self, arm: str) -> tuple[Importance, float]:
        """Of the first model, and what it costs, in ordinary passes over the examples."""
        found: Importance = {}
        counted = flops(lambda: found.update(ARMS[arm].way(self.first)))
        return found, counted / self._pass

    def judged(self, arm: str) -> Record:
        """All uses of one arm."""
        importance, cost = self.importance(arm)
        first, second = with_mean_one(importance), with_mean_one(ARMS[arm].way(self.second))
        model, loaded, setting = self.first.model, self._loaded, self._setting
        scores = {name: p.detach().abs() for name, p in self.first.pool.items()} if arm == "ones" else first
        return {
            "cost": 0.0 if arm in ("adam", "ones", "random") else cost,
            "before": self._before,
            "free": self._free,
            "overlap": overlaps(scores, self._others, setting),
            "pruned": pruned(model, first, loaded, setting),
            "merged": merged((model, self.second.model), (first, second), loaded, setting),
            "consolidated": consolidated(model, first, loaded, setting, self._seed),
        }
