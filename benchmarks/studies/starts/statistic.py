"""How much of what a start chooses is the data's: the same statistic on other examples, and other statistics on these.

For sets of 16, 64 and 256 training rows, in disjoint pairs: the overlap of the directions that FARSS and FILet choose
between the two sets of a pair (*halves*), between Kronecker and exact energies of one set (*kinds*), and between
energies with and without the positions of padding (*padding*). Ranks follow importances, so these are compared by
Spearman's correlation over the matrices. An overlap is the mean over matrices of chosen by both / chosen.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import fishkern as fk
from benchmarks.engine.origin import origin
from benchmarks.engine.records import Record, Records
from benchmarks.studies.comparing.limit import Limit, say
from benchmarks.studies.glue.scores import correlation
from benchmarks.studies.glue.scores import ranks as places
from benchmarks.studies.starts.attach import targets_of
from benchmarks.studies.starts.tasks import Task

SIZES = (16, 64, 256)
PAIRS = 3


class Choice(NamedTuple):
    """Which directions of a matrix are chosen: by energies, or by these times squared singular values."""

    weighted: bool
    largest: bool


CHOICES = {
    "farss, deep": Choice(weighted=True, largest=True),
    "farss, shallow": Choice(weighted=True, largest=False),
    "filet": Choice(weighted=False, largest=False),
}


class Estimate(NamedTuple):
    """What is compared of one set of rows, by matrix: energies ``[K]``, singular values ``[K]``, importances."""

    kronecker: dict[str, Tensor]
    joint: dict[str, Tensor]
    sigma: dict[str, Tensor]
    importance: dict[str, dict[str, float]]


def log_of(path: Path, task: Task, model: str, revision: str | None = None) -> Records:
    """The records of one task's statistic; a measurement that is there is not repeated."""
    about = {"study": "starts", "quantity": "statistic", "setting": asdict(task.setting), "model": model}
    return Records(path, origin=partial(origin, revision), **about)


def complete(task: Task, log: Records, limit: Limit, *, pairs: int = PAIRS, sizes: tuple[int, ...] = SIZES) -> None:
    """Measure what is missing, pair by pair, until the time is up."""
    for pair in range(pairs):
        rows = task.drawn(pair, 2 * max(sizes))
        for size in sizes:
            if log.find(pair=pair, examples=size):
                continue
            if not limit.allows():
                return
            say(f"{task.setting.task}: statistics of {size} examples, pair {pair + 1} of {pairs}")
            with limit.timed():
                halves = [rows[:size], rows[max(sizes) : max(sizes) + size]]
                model = task.fresh(pair)
                ours, theirs = (estimated(model, task, half) for half in halves)
                padded = estimated(model, task, halves[0], positions="all")
            about = {"pair": pair, "examples": size, "rank": task.setting.rank}
            log.append(*({**about, **record} for record in compared(ours, theirs, padded, task.setting.rank)))


def estimated(model: nn.Module, task: Task, rows: list, positions: str = "attended") -> Estimate:
    names = [f"{path}.weight" for path in targets_of(model, task)]
    energies = {
        kind: fk.estimate(
            model, task.batches(rows), fk.DirectionEnergy(positions=positions, importance=kind), parameters=names
        )
        for kind in ("kronecker", "exact")
    }
    factored = energies["kronecker"]
    return Estimate(
        {name: factored[name].kronecker for name in names},
        {name: factored[name].joint for name in names},
        {name: factored[name].singular_values for name in names},
        {
            fisher: {name: energies[kind][name].importance for name in names}
            for fisher, kind in (("kronecker", "kronecker"), ("joint", "exact"))
        },
    )


def compared(ours: Estimate, theirs: Estimate, padded: Estimate, count: int) -> list[Record]:
    """The comparisons of one pair of sets.

    Args:
        ours: Of the first set.
        theirs: Of the second one, which shares no row with it.
        padded: Of the first one, with the positions of padding.
        count: Chosen directions of each matrix.
    """
    records = []
    for comparison, fisher, first, second in (
        ("halves", "kronecker", (ours, "kronecker"), (theirs, "kronecker")),
        ("halves", "joint", (ours, "joint"), (theirs, "joint")),
        ("kinds", None, (ours, "kronecker"), (ours, "joint")),
        ("padding", "kronecker", (ours, "kronecker"), (padded, "kronecker")),
    ):
        sides = [_energies(*side) for side in (first, second)]
        importances = [estimate.importance[kind] for estimate, kind in (first, second)]
        overlaps = {name: overlap(*sides, ours.sigma, choice, count) for name, choice in CHOICES.items()}
        chance = statistics.mean(min(count, len(sigma)) / len(sigma) for sigma in ours.sigma.values())
        records.append(
            {
                "comparison": comparison,
                "fisher": fisher,
                "overlap": overlaps,
                "chance": chance,
                "importance_spearman": spearman(*importances),
            }
        )
    return records


def _energies(estimate: Estimate, kind: str) -> dict[str, Tensor]:
    return estimate.kronecker if kind == "kronecker" else estimate.joint


def overlap(
    ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], sigma: Mapping[str, Tensor], choice: Choice, count: int
) -> float:
    """The mean over matrices of chosen by both / chosen."""
    shares = []
    for name in ours:
        weight = sigma[name].square() if choice.weighted else torch.ones_like(sigma[name])
        first, second = (
            set((energies[name] * weight).topk(min(count, len(weight)), largest=choice.largest).indices.tolist())
            for energies in (ours, theirs)
        )
        shares.append(len(first & second) / len(first))
    return statistics.mean(shares)


def spearman(ours: Mapping[str, float], theirs: Mapping[str, float]) -> float:
    first, second = (torch.tensor([side[name] for name in ours], dtype=torch.float64) for side in (ours, theirs))
    return correlation(places(first), places(second))


def table(log: Records) -> str:
    """Means over the pairs."""
    records = log.find()
    lines = [
        f"{'examples':>8} {'comparison':10} {'fisher':10}"
        + "".join(f"{name:>16}" for name in CHOICES)
        + f"{'ranks':>8}"
    ]
    keys = dict.fromkeys((record["examples"], record["comparison"], record["fisher"]) for record in records)
    for key in sorted(keys, key=lambda key: (key[0], *map(str, key[1:]))):
        of_key = [r for r in records if (r["examples"], r["comparison"], r["fisher"]) == key]
        means = "".join(f"{statistics.mean(r['overlap'][name] for r in of_key):16.2f}" for name in CHOICES)
        ranks = statistics.mean(r["importance_spearman"] for r in of_key)
        lines.append(f"{key[0]:8} {key[1]:10} {key[2] or '-':10}{means}{ranks:8.2f}")
    return "\n".join(lines)
