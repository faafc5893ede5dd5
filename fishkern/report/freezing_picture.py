"""A freezer as a picture: the score of every slice by reading, and the entries that stay in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import TYPE_CHECKING

import torch

from fishkern.freezing import Key
from fishkern.report.cells import Cell, cells_of
from fishkern.report.freezing import FreezerSummary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.figure import Figure

_COLOURS = "viridis"  # as in the other pictures
_ROW, _MOST = 0.04, 20.0  # inches: of a slice where there are many, and of the whole map
_SMALLEST_LABEL = 0.1  # inches that a line of the smallest print takes


@dataclass(frozen=True)
class _Span:
    """Neighbouring rows of the map that share a label."""

    label: str
    start: int
    stop: int

    @property
    def middle(self) -> float:
        return (self.start + self.stop) / 2


def draw_freezer(summary: FreezerSummary, *, title: str = "", score: str = "score") -> Figure:
    """Draw the score of every slice by reading, a row for each slice, and below the entries in training over the steps.

    Rows are grouped by layer and by module, in the model's order. A cell spans the steps since the reading before; the
    first reading, at which every score is 0, has none; the last column shows how things stand after the last reading. A
    slice that has stopped is hatched from then on. White is a slice that was zero everywhere so far.

    Args:
        summary: From :func:`fishkern.report.summarise_freezer`.
        title: Above the picture.
        score: Name of the scores, with their unit.

    Returns:
        A matplotlib figure; :func:`fishkern.report.plots.save` saves it.

    Raises:
        ValueError: There are fewer than two readings, so that nothing has a score.
    """
    from matplotlib.figure import Figure

    if len(summary.steps) < 2 or not summary.scores:
        raise ValueError("a freezer is drawn from its second reading on, and this one has not got so far.")
    rows = len(summary.scores)
    height = min(_MOST, max(2.5, rows * max(_ROW, min(0.2, 4 / rows))))
    figure = Figure(figsize=(9.5, height + 3.2), layout="constrained")
    figure.suptitle(title, fontsize=10)
    (above, bar), (below, nothing) = figure.subplots(
        2, 2, height_ratios=[height, 2.2], width_ratios=[1, 0.02], sharex="col"
    )
    nothing.remove()
    figure.colorbar(_scores(above, summary, height / rows), cax=bar)
    bar.set_ylabel(f"{score} (square-root scale)", fontsize=8)
    bar.tick_params(labelsize=8)
    _kept(below, summary)
    for event in summary.events:
        below.axvline(event.step, color="black", linestyle=":", linewidth=0.8)
    return figure


def _scores(axes: Axes, summary: FreezerSummary, height: float) -> QuadMesh:
    """Draw the map, its rows of some height in inches, and their labels."""
    from matplotlib.colors import PowerNorm

    keys = list(summary.scores)
    rows = [[torch.nan if value is None else value for value in (*all[1:], all[-1])] for all in summary.scores.values()]
    values = torch.tensor(rows, dtype=torch.float64)
    edges, stopped = _edges(summary), summary.stopped
    norm = PowerNorm(0.5, 0, values.nan_to_num(0).max().item() or 1.0)  # scores grow, and early ones are small
    image = axes.pcolormesh(edges, range(len(keys) + 1), values.numpy(), cmap=_COLOURS, norm=norm)
    places = [(row + 0.5, stopped[key]) for row, key in enumerate(keys) if key in stopped]
    axes.barh(
        [y for y, _ in places], [edges[-1] - step for _, step in places], left=[step for _, step in places], height=1,
        facecolor="0.95", edgecolor="0.6", hatch="////", linewidth=0,
    )  # fmt: skip
    _label_rows(axes, keys, height)
    axes.invert_yaxis()
    axes.tick_params(axis="x", labelbottom=False)
    axes.set_title("hatched: stopped; white: zero everywhere so far", fontsize=8, loc="right")
    return image


def _kept(axes: Axes, summary: FreezerSummary) -> None:
    first = summary.whole.entries
    shares = [100 * left / first for left in summary.kept]
    last = _edges(summary)[-1]
    axes.step([*summary.steps, last], [*shares, shares[-1]], where="post", color="black", linewidth=1.5)
    axes.set_ylim(0, 105)
    axes.set_xlim(summary.steps[0], last)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("entries in training\n[% of those at first]", fontsize=8)
    axes.set_xlabel("steps of the optimizer (dotted: something stopped)", fontsize=8)
    axes.set_title(f"{summary.kept[-1]:,} of {first:,} entries stay in training", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(color="0.9")


def _edges(summary: FreezerSummary) -> list[int]:
    """Give the bounds of the columns: the readings, and one column after the last."""
    *_, before, last = summary.steps
    return [*summary.steps, last + max(summary.end - last, last - before, 1)]


def _label_rows(axes: Axes, keys: Sequence[Key], height: float) -> None:
    """Label the layers, with lines between them, and the parameters where there is space."""
    cells = cells_of(dict.fromkeys(name for name, _ in keys))
    layers = _spans([cells[name].layer or "outside" for name, _ in keys])
    parameters = _spans([(name, _parameter(name, cells[name])) for name, _ in keys])
    apart = (after.middle - before.middle for before, after in pairwise(parameters))
    fits = min(apart, default=1) * height >= _SMALLEST_LABEL
    if fits:
        axes.set_yticks([span.middle for span in parameters], [span.label for span in parameters], fontsize=6)
        right = axes.secondary_yaxis("right")
        right.set_yticks([span.middle for span in layers], [span.label for span in layers], fontsize=8)
        axes.tick_params(axis="y", length=2)
        right.tick_params(axis="y", length=0)
        for span in parameters[1:]:
            axes.axhline(span.start, color="white", linewidth=0.5)
    else:
        axes.set_yticks([span.middle for span in layers], [span.label for span in layers], fontsize=8)
        axes.tick_params(axis="y", length=0)
    for span in layers[1:]:
        axes.axhline(span.start, color="black", linewidth=0.8)


def _parameter(name: str, cell: Cell) -> str:
    own = name.rpartition(".")[2]
    return cell.module if own in ("weight", "default") or cell.module.endswith(own) else f"{cell.module} {own}"


def _spans(labels: Sequence[str | tuple[str, str]]) -> list[_Span]:
    """Join neighbours of one label; of a pair the second part is shown."""
    spans, start = [], 0
    for label, rows in groupby(labels):
        stop = start + len(list(rows))
        spans.append(_Span(label if isinstance(label, str) else label[1], start, stop))
        start = stop
    return spans
