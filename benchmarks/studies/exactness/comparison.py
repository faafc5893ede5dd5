"""Two estimates side by side: distance, scale, and common entries of their selections."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch

import fishkern as fk
from benchmarks.studies.exactness.estimators import Arm, Setting
from benchmarks.studies.exactness.subjects import Loaded


class Measured:
    """A statistic and its selections, each made once."""

    def __init__(self, statistic: fk.Statistics, densities: tuple[float, ...]) -> None:
        self.statistic = statistic
        self.total = statistic.total
        self.selections = {d: fk.select(statistic, fk.GlobalTopK(density=d)) for d in densities}


def estimates(loaded: Loaded, arm: Arm, rows: range, setting: Setting) -> Iterator[tuple[int, Measured, float]]:
    """Estimate on the first ``n`` of the rows for each size of the arm; with the seconds of the passes so far."""
    done, whole, seconds = 0, None, 0.0
    for n in arm.sizes:
        added = rows[done:n]
        start = time.perf_counter()
        statistics = fk.estimate(
            loaded.model,
            loaded.batches(added, arm.batch_size),
            arm.estimator(setting.seed * 1_000_000 + added.start),  # each part of each set has a seed of its own
            likelihood=arm.likelihood,
            parameters=loaded.parameters,
            check=arm.label == "exact",
        )
        whole = statistics if whole is None else fk.merge(whole, statistics)
        seconds += time.perf_counter() - start
        done = n
        yield n, Measured(whole, setting.densities), seconds


def compared(one: Measured, reference: Measured) -> dict[str, Any]:
    """Distance and overlap; ``scale`` is the factor that brings ``one`` nearest to the reference."""
    sums = torch.zeros(4, dtype=torch.float64)
    for name in reference.statistic:
        a, b = one.statistic[name].double(), reference.statistic[name].double()
        sums += torch.stack([(a - b).square().sum(), a.square().sum(), (a * b).sum(), b.square().sum()])
    difference, own, product, size = sums.tolist()
    scale = product / own
    rest = sum(
        (scale * one.statistic[name].double() - reference.statistic[name].double()).square().sum().item()
        for name in reference.statistic
    )
    top = {}
    for density, selection in reference.selections.items():
        ours = one.selections[density]
        if ours.names != selection.names or ours.count != selection.count:
            raise ValueError("selections of different pools, or of different sizes, cannot be compared.")
        shared = (ours & selection).count
        top[str(density)] = {
            "k": selection.count,
            "overlap": shared / selection.count,
            "jaccard": ours.overlap(selection),
        }
    return {
        "relative_l2": (difference / size) ** 0.5,
        "scale": scale,
        "relative_l2_scaled": (rest / size) ** 0.5,
        "top": top,
    }
