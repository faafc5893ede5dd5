"""What pictures of comparisons of arms share: their runs in groups, dots by arm, and lines."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from statistics import mean
from typing import TYPE_CHECKING, Any

from benchmarks.plots import style
from benchmarks.rivals.providers import BLACK
from benchmarks.studies.comparing.runs import CHOOSING_SEED, end

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Runs = list[dict[str, Any]]


def grouped(records: Runs) -> list[Runs]:
    """The records of each setting and model."""
    groups: dict[str, Runs] = {}
    for record in records:
        groups.setdefault(json.dumps([record["setting"], record["model"]]), []).append(record)
    return list(groups.values())


def arms_of(runs: Runs) -> list[str]:
    """The arms with counted runs, in the order of their first one."""
    return list(dict.fromkeys(run["arm"] for run in runs if run["seed"] != CHOOSING_SEED))


def drawn(records: Runs, title: str, row: Callable[[list[Axes], Runs], None]) -> Figure:
    """Draw the counted runs: for each setting a row of five panels, which ``row`` fills.

    Args:
        records: All of a file; the runs that chose a learning rate are left out.
        title: Above the picture.
        row: Takes the panels and the runs of one setting.

    Returns:
        The picture.
    """
    runs = [record for record in records if record["quantity"] == "run" and record["seed"] != CHOOSING_SEED]
    groups = grouped(style.newest(runs, "setting", "model", "arm", "lr", "seed"))
    heights = [1.5 + 0.22 * len(arms_of(group)) for group in groups]
    figure = style.figure(0.9 + sum(heights), width=16.0, title=title)
    grid = figure.subplots(len(groups), 5, squeeze=False, gridspec_kw={"height_ratios": heights})
    for axes, group in zip(grid, groups, strict=True):
        row(list(axes), group)
    return style.finish(figure, runs)


def finals(runs: Runs, figure: str) -> dict[str, list[float]]:
    """A figure at the end of training by arm, of the counted seeds in their order."""
    counted = sorted((run for run in runs if run["seed"] != CHOOSING_SEED), key=lambda run: run["seed"])
    return {arm: [end(run)[figure] for run in counted if run["arm"] == arm] for arm in arms_of(runs)}


def differences(runs: Runs, figure: str, to: str) -> dict[str, list[float]]:
    """By arm, its figure minus that of another one, for each seed that both have."""
    by_seed: dict[str, dict[int, float]] = {}
    for run in sorted(runs, key=lambda run: run["seed"]):
        if run["seed"] != CHOOSING_SEED:
            by_seed.setdefault(run["arm"], {})[run["seed"]] = end(run)[figure]
    other = by_seed.get(to, {})
    return {arm: [own[n] - other[n] for n in own if n in other] for arm, own in by_seed.items() if arm != to}


def dots(
    axes: Axes, values: Mapping[str, Sequence[float]], arms: Sequence[str], title: str, colours: Mapping[str, str]
) -> None:
    """Draw one row for each arm: a dot for each seed, and a bar at their mean."""
    for row, arm in enumerate(arms):
        points = values.get(arm, [])
        if not points:
            continue
        colour = colours.get(arm, BLACK)
        axes.plot(points, [row] * len(points), "o", color=colour, alpha=0.5, markersize=4.5, markeredgewidth=0)
        axes.plot([mean(points)] * 2, [row - 0.3, row + 0.3], color=colour, linewidth=2.2)
    axes.set_yticks(range(len(arms)), arms, fontsize=style.SMALL)
    for label, arm in zip(axes.get_yticklabels(), arms, strict=True):
        label.set_color(colours.get(arm, BLACK))
    axes.set_ylim(len(arms) - 0.4, -0.6)
    axes.margins(x=0.08)
    axes.grid(axis="x", color="0.92", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("dot: a seed; bar: their mean", fontsize=style.SMALL)
    axes.set_title(title, fontsize=9, loc="left")
    style.plain(axes)


def logarithmic(axes: Axes, values: list[float], form: str) -> None:
    """Scale the x-axis logarithmically, with a tick at each value."""
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log")
    axes.set_xticks(values, [form.format(value) for value in values])
    axes.xaxis.set_minor_locator(NullLocator())


def lines(axes: Axes, points: Mapping[str, Sequence[tuple[float, float]]], colours: Mapping[str, str]) -> None:
    """Draw a line for each name, with a legend.

    Args:
        axes: Where.
        points: By name, from left to right.
        colours: Of some of the names; the others have the spare ones.
    """
    shades = style.colours(points) | {name: colour for name, colour in colours.items() if name in points}
    for (name, line), marker in zip(points.items(), style.MARKERS, strict=False):
        axes.plot(
            *zip(*line, strict=True), marker=marker, markersize=3.5, linewidth=1.1, color=shades[name], label=name
        )
    if points:
        axes.legend(fontsize=style.SMALL - 2, frameon=False)
    axes.grid(color="0.92", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.xaxis.label.set_fontsize(style.SMALL)
    axes.yaxis.label.set_fontsize(style.SMALL)
