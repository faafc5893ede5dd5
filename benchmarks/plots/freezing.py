"""What freezing does to a training: scores, what is left in training, the shock of each event, and memory.

The runs that chose a learning rate (seed 1000) are left out.
"""

from __future__ import annotations

from statistics import mean
from typing import TYPE_CHECKING

from benchmarks.plots import style
from benchmarks.plots.arms import Runs, arms_of, differences, dots, drawn, finals, lines
from benchmarks.rivals.providers import GREY, ORANGE, OURS, VERMILION

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NONE, CONTROL = "none", "random"  # nothing stops; as many entries stop as in our arm
COLOURS = {NONE: GREY} | dict.fromkeys(("probe", "factors"), OURS)
COLOURS |= dict.fromkeys(("reference", "reference-1.3"), VERMILION)
COLOURS |= dict.fromkeys(("random", "bottom", "largest", "smallest-change", "smallest-fisher"), ORANGE)
SHIFTS = ("inverted", "blurred", "noisy")


def draw(records: Runs) -> Figure:
    """Draw a row for each task."""
    return drawn(records, "Freezing at equal times, controls at equal kept entries", row)


def row(axes: list[Axes], runs: Runs) -> None:
    """Draw one task."""
    task, arms = runs[0]["setting"]["task"], arms_of(runs)
    others = [arm for arm in arms if arm != NONE]
    dots(axes[0], finals(runs, "score"), arms, f"{task}: score", COLOURS)
    dots(axes[1], differences(runs, "score", NONE), others, "score, arm - none, same seed", COLOURS)
    axes[1].axvline(0, color="0.5", linewidth=0.8)
    own = {arm: points for arm, points in in_training(runs).items() if COLOURS[arm] != COLOURS[CONTROL]}
    lines(axes[2], own, {})
    axes[2].set(title="entries in training; controls as probe", xlabel="step", ylim=(0, 1.05))
    axes[2].title.set_fontsize(9)
    style.plain(axes[2])
    if SHIFTS[0] in runs[0]["curve"][-1]:
        dots(axes[3], shifted(runs), arms, "score of shifted images, mean of three", COLOURS)
    else:
        dots(axes[3], around_events(runs), arms, "score after - before an event, each", COLOURS)
        axes[3].axvline(0, color="0.5", linewidth=0.8)
    dots(axes[4], peaks(runs), arms, "peak of a step at the end, MiB", COLOURS)


def in_training(runs: Runs) -> dict[str, list[tuple[float, float]]]:
    """By arm, the part of all entries that is in training from the start and after each event."""
    points = {}
    for arm in arms_of(runs):
        own = [run for run in runs if run["arm"] == arm]
        kept = [[1.0, *(event["kept"] / run["trained"] for event in run["events"])] for run in own]
        steps = [0, *(event["step"] for event in own[0]["events"])]
        points[arm] = [(step, mean(values)) for step, values in zip(steps, zip(*kept, strict=True), strict=True)]
    return points


def around_events(runs: Runs) -> dict[str, list[float]]:
    """By arm, what each event of each seed has changed of the score."""
    return {
        arm: [
            event["after"] - event["before"]
            for run in runs
            if run["arm"] == arm
            for event in run["events"]
            if None not in (event["after"], event["before"])
        ]
        for arm in arms_of(runs)
    }


def shifted(runs: Runs) -> dict[str, list[float]]:
    """By arm, the mean score of images that were changed, at the end."""
    of = {shift: finals(runs, shift) for shift in SHIFTS}
    return {
        arm: [mean(values) for values in zip(*(of[shift][arm] for shift in SHIFTS), strict=True)]
        for arm in of[SHIFTS[0]]
    }


def peaks(runs: Runs) -> dict[str, list[float]]:
    """By arm, what a step takes at most after the last event of each seed, in MiB."""
    return {arm: [run["events"][-1]["peak_mib"] for run in runs if run["arm"] == arm] for arm in arms_of(runs)}
