"""Overlap of selections with that of the exact Fisher of the same examples, with the noise floor."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from benchmarks.plots import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKS = (("o", "#0072B2"), ("D", "#D55E00"))  # of the densities, ascending
MODELS = {
    "stories": "LLaMA on its own stories",
    "cola": "LLaMA on CoLA",
    "sst2": "MiniLM on SST-2",
}


def draw(records: list[dict[str, Any]]) -> Figure:
    """Draw a panel for each subject and number of examples: a dot for each pair, a band for the floor."""
    records = style.newest(records, "setting", "subject", "sizes", "label", "examples", "pair")
    subjects = list(dict.fromkeys(record["subject"] for record in records))
    sizes = sorted({record["examples"] for record in records})
    labels = list(dict.fromkeys(record["label"] for record in records if record["quantity"] != "floor"))
    labels.sort(key=lambda label: label.startswith("exact"))  # exact ones below the others
    figure = style.figure(1.0 + 0.21 * len(labels) * len(subjects) + 0.5 * len(subjects), width=11.0)
    grid = figure.subplots(len(subjects), len(sizes), squeeze=False, sharex=True, sharey=True)
    for row, subject in zip(grid, subjects, strict=True):
        for axes, size in zip(row, sizes, strict=True):
            of_panel = [r for r in records if r["subject"] == subject and r["examples"] == size]
            axes.set_title(f"{MODELS.get(subject, subject)}, {size} examples", fontsize=9, loc="left")
            if of_panel:
                _panel(axes, of_panel, labels)
            else:
                axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", fontsize=style.SMALL)
                axes.tick_params(labelsize=style.SMALL)
    for axes in grid[-1]:
        axes.set_xlabel("overlap: selected by both / selected", fontsize=style.SMALL)
    _legend(figure, list(records[0]["top"]))
    return style.finish(figure, records)


def _panel(axes: Axes, records: list[dict[str, Any]], labels: list[str]) -> None:
    for (marker, colour), density in zip(MARKS, records[0]["top"], strict=False):
        noise = [r["top"][density]["overlap"] for r in records if r["quantity"] == "floor"]
        axes.axvspan(min(noise), max(noise), color=colour, alpha=0.25, linewidth=0)
        axes.axvline(statistics.median(noise), color=colour, linewidth=0.8, linestyle="--" if marker == "D" else "-")
        for record in records:
            if record["quantity"] != "floor":
                place = labels.index(record["label"]) + (0.17 if marker == "D" else -0.17)
                axes.plot(record["top"][density]["overlap"], place, marker, color=colour, markersize=3.5)
    axes.set_yticks(range(len(labels)), labels, fontsize=style.SMALL)
    axes.set(xlim=(0, 1.02), ylim=(len(labels) - 0.4, -0.6))
    axes.grid(color="0.92", linewidth=0.6)
    axes.set_axisbelow(True)
    style.plain(axes)


def _legend(figure: Figure, densities: list[str]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    dots = [
        Line2D([], [], linestyle="", marker=marker, color=colour, label=f"top {float(density):.1%}, each pair of sets")
        for (marker, colour), density in zip(MARKS, densities, strict=False)
    ]
    band = Patch(color="0.75", label="noise floor: two exact Fishers of disjoint examples (band: range, line: median)")
    figure.legend(
        handles=[*dots, band], loc="outside upper left", ncols=3, fontsize=style.SMALL, frameon=False,
        title="Entries selected as by the exact Fisher of the same examples", title_fontsize=11, alignment="left",
    )  # fmt: skip
