"""Summaries as pictures: a heat map of layers and modules, and the distribution of the scores."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fishkern.files import atomic_write
from fishkern.report.summary import Part, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

_COLOURS = "viridis"  # its lightness rises evenly: it can be told apart without colour, and in grey print


def draw(summary: Summary, *, title: str = "", quantity: str = "score", unit: str = "") -> Figure:
    """Draw a heat map of the mean score by layer and type of module, and the distribution of all scores.

    Both are on logarithmic scales. A part outside the layers has a row of its own beside the map, in the same colours.

    Args:
        summary: What :func:`fishkern.report.summarise` found.
        title: Above the picture.
        quantity: What a score is, such as ``"Fisher information"``.
        unit: Its unit.

    Returns:
        A matplotlib figure.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    layers = list(dict.fromkeys(place.layer for place in summary.cells if place.layer))
    modules = list(dict.fromkeys(place.module for place in summary.cells if place.layer))
    outside = {place.module: part for place, part in summary.cells.items() if place.layer is None}
    inside = {(place.layer, place.module): part for place, part in summary.cells.items() if place.layer}
    means = [part.mean for part in summary.cells.values() if part.mean > 0] or [1.0]
    norm = LogNorm(min(means), max(max(means), min(means) * 1.01))

    height = min(20.0, max(3.0, 0.26 * max(len(layers), len(outside)) + 1.6))
    figure = Figure(figsize=(max(9.0, 4.5 + 0.42 * len(modules)), height + 3.4), layout="constrained")
    unit = f" [{unit}]" if unit else ""
    above, below = figure.subfigures(2, 1, height_ratios=[height, 3.4])
    widths = [max(len(modules), 4)] * bool(layers) + [1.2] * bool(outside)
    above.suptitle("\n".join(filter(None, [title, f"mean {quantity} of a coordinate{unit}"])), fontsize=10)
    axes = list(above.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0])
    used = list(axes)
    if layers:
        image = _heat_map(axes.pop(0), layers, modules, inside, norm)
    if outside:
        column = {(name, "mean"): part for name, part in outside.items()}
        image = _heat_map(axes.pop(0), list(outside), ["mean"], column, norm)
        used[-1].set_title("outside the layers", fontsize=9)
        used[-1].set_xticks([])
    bar = above.colorbar(image, ax=used)
    bar.set_label(f"mean{unit}", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    _distribution(below.subplots(), summary, f"{quantity} of a coordinate{unit}")
    return figure


def save(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Save a picture, whole or not at all.

    Args:
        figure: What :func:`draw` returns.
        path: Ends in ``.png``, ``.pdf`` or ``.svg``.

    Returns:
        The path.

    Raises:
        ValueError: The path has another ending.
        OSError: As in :func:`fishkern.files.atomic_write`.
    """  # noqa: DOC502
    path = checked_picture(path)
    with atomic_write(path) as file:
        figure.savefig(file, format=path.suffix[1:].lower(), dpi=150)
    return path


def checked_picture(path: str | os.PathLike[str]) -> Path:
    """Refuse a picture of a kind that is not drawn, before anything is computed for it.

    Args:
        path: Where it shall go.

    Returns:
        The path.

    Raises:
        ValueError: It ends in something else than ``.png``, ``.pdf`` or ``.svg``.
    """
    path = Path(path)
    if path.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise ValueError(f"a picture ends in .png, .pdf or .svg, got {path}.")
    return path


def _heat_map(
    axes: Axes, rows: list[str], columns: list[str], parts: dict[tuple[str, str], Part], norm: LogNorm
) -> QuadMesh:
    values = torch.full((len(rows), len(columns)), torch.nan, dtype=torch.float64)
    for (row, column), part in parts.items():
        values[rows.index(row), columns.index(column)] = part.mean if part.mean > 0 else torch.nan
    axes.set_facecolor("0.85")
    image = axes.pcolormesh(values.numpy(), norm=norm, cmap=_COLOURS, edgecolors="white", linewidth=0.5)
    every = max(1, len(rows) // 40)
    axes.set_yticks([place + 0.5 for place in range(0, len(rows), every)], rows[::every], fontsize=8)
    axes.set_xticks([place + 0.5 for place in range(len(columns))], columns, fontsize=8, rotation=45, ha="right")
    axes.invert_yaxis()
    return image


def _distribution(axes: Axes, summary: Summary, label: str) -> None:
    edges, counts = summary.edges.tolist(), summary.counts.tolist()
    axes.stairs(counts, edges, fill=True, color="0.75")
    axes.stairs(counts, edges, color="black", linewidth=1)
    if summary.threshold > 0:
        begins = f"the top {summary.density:.2%} begins at {summary.threshold:.1e}"
        axes.axvline(summary.threshold, color="black", linestyle="--", linewidth=1, label=begins)
        axes.legend(fontsize=8, frameon=False)
    axes.set(xscale="log", yscale="log")
    axes.set_ylim(bottom=0.7)
    axes.set_xlabel(label, fontsize=8)
    axes.set_ylabel("coordinates in a bin\n(8 bins to a factor of 10)", fontsize=8)
    axes.tick_params(labelsize=8)
    zeros = f", {summary.zeros:,} of them zero and not drawn" if summary.zeros else ""
    axes.set_title(f"{summary.whole.coordinates:,} coordinates{zeros}", fontsize=9)
