"""FISH-Tuning on GLUE: the score of each seed and their mean, and what fish is better by, seed by seed.

The runs that chose a learning rate (seed 1000) are not among the scores, and have a panel of their own.
"""

from __future__ import annotations

import json
from statistics import mean
from typing import TYPE_CHECKING, Any

from benchmarks.plots import style
from benchmarks.studies.glue.log import CHOOSING_SEED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Runs = list[dict[str, Any]]


def draw(records: Runs) -> Figure:
    """Draw a row for each setting: scores, paired differences to fish, and the runs that chose the learning rate."""
    records = style.newest(records, "setting", "encoder", "arm", "lr", "seed")
    groups: dict[str, Runs] = {}
    for record in records:
        groups.setdefault(json.dumps([record["setting"], record["encoder"]]), []).append(record)
    figure = style.figure(0.8 + 2.6 * len(groups), width=11.0, title="FISH-Tuning and its controls, equal budgets")
    for row, runs in zip(figure.subplots(len(groups), 3, squeeze=False), groups.values(), strict=True):
        arms = list(dict.fromkeys(run["arm"] for run in runs))
        setting = runs[0]["setting"]
        trained = next((run["trained"] for run in runs if "trained" in run), 0)
        title = f"{setting['task']} ({runs[0]['encoder']}), {trained:,} trained"
        _dots(row[0], scores(runs), arms, f"{title}: score x 100")
        _dots(row[1], differences(runs), [arm for arm in arms if arm != "fish"], "fish - arm, same seed, x 100")
        row[1].axvline(0, color="0.5", linewidth=0.8)
        _rates(row[2], runs, arms)
    return style.finish(figure, records)


def scores(runs: Runs) -> dict[str, list[float]]:
    """The scores of each arm, of the seeds that count, in their order."""
    counted = sorted((run for run in runs if run["seed"] != CHOOSING_SEED), key=lambda run: run["seed"])
    return {arm: [run["score"] for run in counted if run["arm"] == arm] for arm in {run["arm"] for run in runs}}


def differences(runs: Runs) -> dict[str, list[float]]:
    """By arm, the score of fish minus its own, for each seed that both have."""
    by_seed: dict[str, dict[int, float]] = {}
    for run in sorted(runs, key=lambda run: run["seed"]):
        if run["seed"] != CHOOSING_SEED:
            by_seed.setdefault(run["arm"], {})[run["seed"]] = run["score"]
    fish = by_seed.pop("fish", {})
    return {arm: [fish[seed] - own[seed] for seed in own if seed in fish] for arm, own in by_seed.items()}


def _dots(axes: Axes, values: dict[str, list[float]], arms: list[str], title: str) -> None:
    shades = style.colours(arms)
    for row, arm in enumerate(arms):
        points = [100 * value for value in values.get(arm, [])]
        if not points:
            continue
        axes.plot(points, [row] * len(points), "o", color=shades[arm], alpha=0.55, markersize=5, markeredgewidth=0)
        axes.plot([mean(points)] * 2, [row - 0.25, row + 0.25], color=shades[arm], linewidth=2.5)
        axes.annotate(
            f"{mean(points):.2f}", (mean(points), row - 0.28), ha="center", va="bottom", fontsize=style.SMALL - 1
        )
    axes.set_yticks(range(len(arms)), arms, fontsize=style.SMALL)
    axes.set_ylim(len(arms) - 0.4, -0.8)
    axes.margins(x=0.12)
    axes.set_xlabel("dot: a seed; bar: their mean", fontsize=style.SMALL)
    axes.set_title(title, fontsize=9, loc="left")
    style.plain(axes)


def _rates(axes: Axes, runs: Runs, arms: list[str]) -> None:
    """Draw the score over the learning rate of the runs that chose it."""
    lines = {}
    choosing = [run for run in runs if run["seed"] == CHOOSING_SEED]
    for arm in arms:
        line = sorted((run["lr"], 100 * run["score"]) for run in choosing if run["arm"] == arm)
        if line:
            lines[arm] = line
    style.lines(axes, lines, "")
    axes.set(yscale="linear")
    axes.margins(y=0.1)
    axes.autoscale(axis="y")
    axes.set_xlabel("learning rate (a seed of its own)", fontsize=style.SMALL)
    axes.set_title("choosing the rate: score x 100", fontsize=9, loc="left")
