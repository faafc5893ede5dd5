"""Curves of several runs in one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Curves differ in line and marker as well as in colour, and the colours in lightness.
_LINES, _MARKERS = ("-", "--", "-.", ":"), ("o", "s", "^", "D", "v", "P")


def draw_curves(curves: Mapping[str, Sequence[tuple[float, float]]], *, x: str, y: str, title: str = "") -> Figure:
    """Draw one line for each run.

    Args:
        curves: Points ``(x, y)`` by the name of the run.
        x: Label of the horizontal axis, with its unit.
        y: Label of the vertical axis, with its unit.
        title: Above the picture.

    Returns:
        A matplotlib figure; :func:`fishkern.report.plots.save` saves it.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    axes = figure.subplots()
    colours = colormaps["viridis"]
    for number, (name, points) in enumerate(curves.items()):
        axes.plot(
            *zip(*points, strict=True),
            label=name,
            color=colours(0.9 * number / max(1, len(curves) - 1)),
            linestyle=_LINES[number % len(_LINES)],
            marker=_MARKERS[number % len(_MARKERS)],
            markersize=4,
        )
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure
