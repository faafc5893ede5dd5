"""Summaries as pictures: a heat map of layers and modules, and the distribution of the scores."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fishkern.files import atomic_write, check_target
from fishkern.report.summary import Part, Parts, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure, FigureBase

_COLOURS = "viridis"  # its lightness rises evenly, so it can be read without colour vision and in grey print


def draw(summary: Summary, *, title: str = "", quantity: str = "score", unit: str = "") -> Figure:
    """Draw a heat map of the mean score by layer and type of module, and the distribution of all scores.

    Both have logarithmic scales. Modules outside the layers are drawn to the right of the map, in the same colours.

    Args:
        summary: From :func:`fishkern.report.summarise`.
        title: Above the picture.
        quantity: Name of the scores, such as ``"Fisher information"``.
        unit: Its unit.

    Returns:
        A matplotlib figure.
    """
    unit = f" [{unit}]" if unit else ""
    map_height, width = _size(summary)
    figure = _figure(width, map_height + 3.4)
    above, below = figure.subfigures(2, 1, height_ratios=[map_height, 3.4])
    above.suptitle("\n".join(filter(None, [title, f"mean {quantity} of a coordinate{unit}"])), fontsize=10)
    _map(above, summary, lambda part: part.mean, "mean")
    _distribution(below.subplots(), summary, f"{quantity} of a coordinate{unit}")
    return figure


def draw_selection(parts: Parts, *, title: str = "") -> Figure:
    """Draw a heat map of the selected fraction by layer and type of module, on a logarithmic scale.

    Args:
        parts: From :func:`fishkern.report.locate`.
        title: Above the picture.

    Returns:
        A matplotlib figure. Cells with no selected entry are hatched.
    """
    map_height, width = _size(parts)
    figure = _figure(width, map_height)
    figure.suptitle("\n".join(filter(None, [title, "selected fraction of the coordinates"])), fontsize=10)
    _map(figure, parts, lambda part: part.density, "selected / coordinates (hatched: none)")
    return figure


def save(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Save a picture, whole or not at all.

    Args:
        figure: From :func:`draw`.
        path: Ends in ``.png``, ``.pdf`` or ``.svg``.

    Returns:
        The path.

    Raises:
        ValueError: The path has another ending.
        OSError: As in :func:`fishkern.files.atomic_write`.
    """
    path = checked_picture(path)
    with atomic_write(path) as file:
        figure.savefig(file, format=path.suffix[1:].lower(), dpi=150)
    return path


def checked_picture(path: str | os.PathLike[str]) -> Path:
    """Check the path of a picture before anything is computed for it.

    Args:
        path: Path of the picture.

    Returns:
        The path.

    Raises:
        ValueError: It does not end in ``.png``, ``.pdf`` or ``.svg``.
        FileNotFoundError: Its folder does not exist.
        OSError: It is a folder itself.
    """
    check_target(path, "picture.png")
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {path.parent} does not exist: create it, or write elsewhere.")
    if path.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise ValueError(f"a picture ends in .png, .pdf or .svg, got {path}.")
    return path


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # without pyplot, which keeps every figure and looks for a display

    return Figure(figsize=(width, height), layout="constrained")


def _size(parts: Parts) -> tuple[float, float]:
    rows = max(len({cell.layer for cell in parts.cells}), sum(cell.layer is None for cell in parts.cells))
    columns = len({cell.module for cell in parts.cells if cell.layer})
    return min(20.0, max(3.0, 0.26 * rows + 1.6)), max(9.0, 4.5 + 0.42 * columns)


def _map(figure: FigureBase, parts: Parts, value: Callable[[Part], float], label: str) -> None:
    """Draw the layers by type of module, the modules outside them to the right, and the colour bar."""
    from matplotlib.colors import LogNorm

    inside = {(cell.layer, cell.module): value(part) for cell, part in parts.cells.items() if cell.layer}
    outside = {(cell.module, "mean"): value(part) for cell, part in parts.cells.items() if cell.layer is None}
    shown = [drawn for drawn in (*inside.values(), *outside.values()) if drawn > 0] or [1.0]
    norm = LogNorm(min(shown), max(max(shown), min(shown) * 1.01))
    grids = [cells for cells in (inside, outside) if cells]
    widths = [max(len({column for _, column in inside}), 4)] * bool(inside) + [1.2] * bool(outside)
    row = figure.subplots(1, len(grids), width_ratios=widths, squeeze=False)[0]
    for axes, cells in zip(row, grids, strict=True):
        image = _heat_map(axes, cells, norm)
        if cells is outside:
            axes.set_title("outside the layers", fontsize=9)
            axes.set_xticks([])
    bar = figure.colorbar(image, ax=list(row))
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=8)


def _heat_map(axes: Axes, cells: Mapping[tuple[str, str], float], norm: LogNorm) -> QuadMesh:
    rows = list(dict.fromkeys(row for row, _ in cells))
    columns = list(dict.fromkeys(column for _, column in cells))
    values = torch.full((len(rows), len(columns)), torch.nan, dtype=torch.float64)
    for (row, column), value in cells.items():
        values[rows.index(row), columns.index(column)] = value if value > 0 else torch.nan
    axes.patch.set(facecolor="white", hatch="////", edgecolor="0.6")  # not grey, which colours are in print
    image = axes.pcolormesh(values.numpy(), norm=norm, cmap=_COLOURS, edgecolors="white", linewidth=0.5)
    every = max(1, len(rows) // 40)
    axes.set_yticks([row + 0.5 for row in range(0, len(rows), every)], rows[::every], fontsize=8)
    axes.set_xticks([column + 0.5 for column in range(len(columns))], columns, fontsize=8, rotation=45, ha="right")
    axes.invert_yaxis()
    return image


def _distribution(axes: Axes, summary: Summary, label: str) -> None:
    edges, counts = summary.edges.tolist(), summary.counts.tolist()
    axes.stairs(counts, edges, fill=True, color="0.75")
    axes.stairs(counts, edges, color="black", linewidth=1)
    if summary.threshold:
        begins = f"the top {summary.density:.2%} begins at {summary.threshold:.1e}"
        axes.axvline(summary.threshold, color="black", linestyle="--", linewidth=1, label=begins)
        axes.legend(fontsize=8, frameon=False)
    if counts:
        axes.set(xscale="log", yscale="log")
        axes.set_ylim(bottom=0.7)
    axes.set_xlabel(label, fontsize=8)
    axes.set_ylabel("coordinates in a bin\n(8 bins to a factor of 10)", fontsize=8)
    axes.tick_params(labelsize=8)
    others = {"zero": summary.zeros, "negative": summary.negative, "infinite": summary.whole.infinite}
    left_out = ", ".join(f"{count:,} {what}" for what, count in others.items() if count)
    title = f"{summary.whole.coordinates:,} coordinates"
    axes.set_title(f"{title}, of them {left_out} and not drawn" if left_out else title, fontsize=9)
