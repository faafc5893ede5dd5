"""Summaries as pictures: heat maps of layers and modules, and how scores or energies are distributed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fishkern.files import atomic_write, check_target
from fishkern.report.cells import Cell
from fishkern.report.grouped import Grouped
from fishkern.report.matrices import EnergySummary, StartPart
from fishkern.report.summary import Parts, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.colors import Normalize
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
    _map(above, _values(summary.cells, lambda part: part.mean), "mean")
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
    _map(figure, _values(parts.cells, lambda part: part.density), "selected / coordinates (hatched: none)")
    return figure


def draw_energies(summary: EnergySummary, *, title: str = "") -> Figure:
    """Draw a heat map of the energy of a matrix by layer and type of module, and how many directions hold it.

    The map shows the importance where each matrix has one, else the mean energy of its directions, on a logarithmic
    scale. Below there is a line for each type of module.

    Args:
        summary: From :func:`fishkern.report.summarise_energies`.
        title: Above the picture.

    Returns:
        A matplotlib figure. Matrices without energy are hatched.
    """
    map_height, width = _size(summary)
    figure = _figure(width, map_height + 3.4)
    above, below = figure.subfigures(2, 1, height_ratios=[map_height, 3.4])
    important = summary.whole.mean_importance is not None
    what = "mean importance of a matrix" if important else "mean energy of a direction"
    above.suptitle("\n".join(filter(None, [title, what])), fontsize=10)
    _map(above, _values(summary.cells, lambda part: part.mean_importance if important else part.mean), "mean")
    _curves(below.subplots(), summary)
    return figure


def draw_start(parts: Grouped[StartPart], *, title: str = "") -> Figure:
    """Draw two heat maps of the start of an adapter by layer and type of module: ranks, and sizes.

    Args:
        parts: From :func:`fishkern.report.summarise_start`.
        title: Above the picture.

    Returns:
        A matplotlib figure; the scale of ranks is linear, that of sizes logarithmic.
    """
    map_height, width = _size(parts)
    figure = _figure(width, 2 * map_height)
    figure.suptitle(title, fontsize=10)
    above, below = figure.subfigures(2, 1)
    above.suptitle("rank (mean over the modules of a cell)", fontsize=10)
    _map(above, _values(parts.cells, lambda part: part.mean_rank), "rank", linear=True)
    below.suptitle("norm of the start relative to that of the weight", fontsize=10)
    _map(below, _values(parts.cells, lambda part: part.size), "start / weight")
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


def _size(parts: Grouped[Any]) -> tuple[float, float]:
    rows = max(len({cell.layer for cell in parts.cells}), sum(cell.layer is None for cell in parts.cells))
    columns = len({cell.module for cell in parts.cells if cell.layer})
    return min(20.0, max(3.0, 0.26 * rows + 1.6)), max(9.0, 4.5 + 0.42 * columns)


def _values(cells: Mapping[Cell, Any], value: Callable[[Any], float]) -> dict[Cell, float]:
    return {cell: value(part) for cell, part in cells.items()}


def _map(figure: FigureBase, values: Mapping[Cell, float], label: str, *, linear: bool = False) -> None:
    """Draw the layers by type of module, the modules outside them to the right, and the colour bar."""
    from matplotlib.colors import LogNorm, Normalize

    inside = {(cell.layer, cell.module): value for cell, value in values.items() if cell.layer}
    outside = {(cell.module, "mean"): value for cell, value in values.items() if cell.layer is None}
    shown = [drawn for drawn in (*inside.values(), *outside.values()) if drawn > 0] or [1.0]
    norm = Normalize(0, max(shown)) if linear else LogNorm(min(shown), max(max(shown), min(shown) * 1.01))
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
    bar.ax.tick_params(which="both", labelsize=8)


def _heat_map(axes: Axes, cells: Mapping[tuple[str, str], float], norm: Normalize) -> QuadMesh:
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


def _curves(axes: Axes, summary: EnergySummary) -> None:
    """Draw how much of the energy of a matrix some number of directions holds, for each type of module."""
    from matplotlib import colormaps

    shades = colormaps[_COLOURS]
    for number, (module, shares) in enumerate(summary.shares.items()):
        style = ("-", "--", ":", "-.")[number % 4]  # for readers without colour vision
        shade = shades(0.9 * number / max(len(summary.shares) - 1, 1))
        axes.plot(summary.counts, shares, linestyle=style, color=shade, label=module, linewidth=1.5)
    axes.set_xscale("log", base=2)
    axes.set_xticks(summary.counts, [f"{count:,}" for count in summary.counts])
    axes.minorticks_off()
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("directions, those with the most energy first", fontsize=8)
    axes.set_ylabel("share of the energy of a matrix\n(mean over layers)", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(color="0.9")
    if summary.shares:
        axes.legend(fontsize=8, frameon=False, loc="lower right", ncols=1 + len(summary.shares) // 8)


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
