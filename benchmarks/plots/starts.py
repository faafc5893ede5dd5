"""Starts of adapters: every seed of every arm, the price of learning in forgetting, and what a statistic is worth.

The runs that chose a learning rate (seed 1000) are in the panels of rates alone: there a line has one point for each.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean
from typing import TYPE_CHECKING, Any

from benchmarks.plots import style
from benchmarks.plots.arms import Runs, arms_of, differences, dots, finals, grouped, lines, logarithmic
from benchmarks.rivals.providers import GREY, ORANGE, OURS, VERMILION
from benchmarks.studies.comparing.runs import CHOOSING_SEED, end

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = {
    OURS: ("fishkern", ("farss", "farss-exact", "filet", "filet-exact", "filet-max")),
    GREY: ("PEFT's, MiLoRA", ("lora", "pissa", "eva", "corda", "lora-ga", "milora")),
    ORANGE: ("controls", ("random", "random-filet", "reversed", "permuted", "uniform")),
    VERMILION: ("published formulas", ("farss-published", "filet-published")),
}
COLOURS = {arm: colour for colour, (_, arms) in KINDS.items() for arm in arms}
STRONG = {name: COLOURS[name] for name in ("farss", "lora")}  # in their colours, where there are many lines
FRONTIER = ("lora", "pissa", "farss", "farss-exact", "filet", "corda", "random", "reversed")  # the others only as dots


def draw(records: Runs) -> Figure:
    """Draw a row for each setting, and one for each statistic."""
    runs = [record for record in records if record["quantity"] == "run"]
    runs = style.newest(runs, "setting", "model", "arm", "lr", "seed")
    statistic = [record for record in records if record["quantity"] == "statistic"]
    statistic = style.newest(statistic, "setting", "model", "examples", "pair", "comparison", "fisher")
    counted = [group for group in grouped(runs) if arms_of(group)]  # a setting whose rates alone were tried has no row
    rows = [(runs_row, group) for group in counted] + [(statistic_row, group) for group in grouped(statistic)]
    heights = [1.5 + 0.19 * len(arms_of(group)) if drawn is runs_row else 2.6 for drawn, group in rows]
    figure = style.figure(0.9 + sum(heights), width=13.0, title="Starts of adapters at equal budgets")
    grid = figure.subplots(len(rows), 4, squeeze=False, gridspec_kw={"height_ratios": heights})
    for axes, (drawn, group) in zip(grid, rows, strict=True):
        drawn(list(axes), group)
    return style.finish(figure, [*runs, *statistic])


def runs_row(axes: list[Axes], runs: Runs) -> None:
    """Draw one setting."""
    setting, arms = runs[0]["setting"], arms_of(runs)
    others = [arm for arm in arms if arm != "lora"]
    if setting["stories"]:
        dots(axes[0], finals(runs, "nll"), arms, f"{setting['task']}: loss on sentences, nats", COLOURS)
        dots(axes[1], finals(runs, "kl"), arms, "KL to the untrained model, nats", COLOURS)
        lines(axes[2], frontier(runs, lambda run: end(run)["nll"], lambda run: end(run)["kl"]), STRONG)
        axes[2].set(title="KL over loss, a point a rate", xlabel="loss", ylabel="KL")
    else:
        dots(axes[0], finals(runs, "score"), arms, f"{setting['task']}: score", COLOURS)
        dots(axes[1], differences(runs, "score", "lora"), others, "score, arm - lora, same seed", COLOURS)
        axes[1].axvline(0, color="0.5", linewidth=0.8)
        lines(axes[2], early_losses(runs), STRONG)
        axes[2].set(title="training loss, mean over seeds", xlabel=f"part of {setting['epochs']} epoch(s)")
    lines(axes[3], frontier(runs, lambda run: run["lr"], lambda run: -end(run)["choice"]), STRONG)
    axes[3].set(title="choosing the rate: low is good", xlabel="learning rate")
    logarithmic(axes[3], setting["rates"], "{:.0e}")
    for panel in axes[2:]:
        panel.title.set_fontsize(9)
        style.plain(panel)


def frontier(
    runs: Runs, x: Callable[[dict[str, Any]], float], y: Callable[[dict[str, Any]], float]
) -> dict[str, list[tuple[float, float]]]:
    """By arm, one point for each rate of the runs that chose it."""
    points = {}
    for arm in FRONTIER:
        tried = sorted((r for r in runs if r["arm"] == arm and r["seed"] == CHOOSING_SEED), key=lambda run: run["lr"])
        if tried:
            points[arm] = [(x(run), y(run)) for run in tried]
    return points


def early_losses(runs: Runs) -> dict[str, list[tuple[float, float]]]:
    """By arm, the mean over counted seeds of each window's training loss, by the end of the window."""
    points = {}
    for arm in FRONTIER:
        losses = [run["losses"] for run in runs if run["arm"] == arm and run["seed"] != CHOOSING_SEED]
        losses = [row for row in losses if None not in row]
        if losses:
            means = [mean(values) for values in zip(*losses, strict=True)]
            points[arm] = [((n + 1) / len(means), value) for n, value in enumerate(means)]
    return points


def statistic_row(axes: list[Axes], records: Runs) -> None:
    """Draw the overlaps of one task over the number of examples, a panel for each choice of directions."""
    panels = [*records[0]["overlap"], "ranks"]
    for panel, choice in zip(axes, panels, strict=True):
        points: dict[str, list[tuple[float, float]]] = {}
        for comparison, fisher in dict.fromkeys((r["comparison"], r["fisher"]) for r in records):
            of_line = [r for r in records if (r["comparison"], r["fisher"]) == (comparison, fisher)]
            for size in sorted({r["examples"] for r in of_line}):
                here = [r for r in of_line if r["examples"] == size]
                values = [r["importance_spearman"] if choice == "ranks" else r["overlap"][choice] for r in here]
                name = f"{comparison}, {fisher}" if comparison == "halves" else comparison
                points.setdefault(name, []).append((size, mean(values)))
        lines(panel, points, STRONG)
        panel.set(ylim=(-0.3 if choice == "ranks" else 0, 1.05), xlabel="examples")
        logarithmic(panel, sorted({record["examples"] for record in records}), "{}")
        if choice == "ranks":
            title = "importances: Spearman"
        else:
            panel.axhline(records[0]["chance"], color="0.5", linewidth=0.8, linestyle=":")
            title = f"{records[0]['setting']['task']}, {choice}: overlap"
        panel.set_title(title, fontsize=9, loc="left")
        style.plain(panel)
