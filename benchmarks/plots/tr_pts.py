"""Training a few connections of a vision transformer: accuracy, and what each arm trains, computes and keeps in memory.

The runs that chose a learning rate (seed 1000) are left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.plots.arms import Runs, arms_of, differences, dots, drawn, finals
from benchmarks.rivals.providers import GREY, ORANGE, OURS, VERMILION

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BASE = "per-row"  # one connection of each neuron: what TR-PTS starts from
COLOURS = dict.fromkeys(("head", "full", "lora", "bitfit", "head-tokens"), GREY)
COLOURS |= dict.fromkeys(("contribution", "tr-pts", "tr-pts-0.7"), OURS)
COLOURS |= dict.fromkeys(("per-row", "per-row-2", "gps"), VERMILION)
COLOURS |= dict.fromkeys(("random", "global", "dense", "drawn", "dense-0.7", "drawn-0.7"), ORANGE)


def draw(records: Runs) -> Figure:
    """Draw a row for each setting."""
    return drawn(records, "Connections and tokens of a vision transformer, at equal search", row)


def row(axes: list[Axes], runs: Runs) -> None:
    """Draw one setting."""
    arms = arms_of(runs)
    others = [arm for arm in arms if arm != BASE]
    dots(axes[0], finals(runs, "score"), arms, f"{runs[0]['setting']['task']}: accuracy", COLOURS)
    dots(axes[1], differences(runs, "score", BASE), others, f"accuracy, arm - {BASE}, same seed", COLOURS)
    axes[1].axvline(0, color="0.5", linewidth=0.8)
    trained = {arm: [100 * run["trained"] / run["of"] for run in runs if run["arm"] == arm] for arm in arms}
    dots(axes[2], trained, arms, "entries that train, %", COLOURS)
    axes[2].set_xscale("log")
    flops = {arm: [run["flops"]["step"] / 1e9 for run in runs if run["arm"] == arm] for arm in arms}
    dots(axes[3], flops, arms, "a step for each image, GFLOP", COLOURS)
    peaks = {arm: [run["peak_mib"] for run in runs if run["arm"] == arm] for arm in arms}
    dots(axes[4], peaks, arms, "peak of a step, MiB", COLOURS)
