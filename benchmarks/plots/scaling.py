"""Time and peak memory as sizes grow, log-log, with the exponent at each line and the point where memory ran out.

The exponent is that of the best straight line through the largest sizes that were measured; small ones are mostly the
cost of a call.
"""

from __future__ import annotations

import math
from itertools import cycle, product
from typing import TYPE_CHECKING, Any

from benchmarks.plots import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FITTED = 4  # of the largest sizes
OPS = {
    "sum_grad_squared": "sum of squared gradients of a layer",
    "streaming_topk": "exact top-k",
    "masked_adamw": "masked AdamW step",
    "whole_pass": "whole Fisher pass",
}
WORDS = {
    "N": "examples N",
    "T": "positions T",
    "width": "width of the layer",
    "n": "scores n",
    "k": "entries selected k",
    "tensors": "tensors",
    "P": "parameters P",
    "layers": "layers",
}
UNITS = {"time": "s", "memory": "MiB"}
Points = list[tuple[float, float]]


def draw(records: list[dict[str, Any]]) -> Figure:
    """Draw a column for each operation: for each quantity that grows the time, and below it the peak memory."""
    records = style.newest(records, "op", "quantity", "grows", "case", "provider")
    sweeps: dict[str, list[str]] = {}
    for op, grows in dict.fromkeys((record["op"], record["grows"]) for record in records):
        sweeps.setdefault(op, []).append(grows)
    rows = max(map(len, sweeps.values()))
    limits = sorted({record["limit_gib"] for record in records})
    title = f"Growth; ^exponents of the {FITTED} largest sizes; x: out of memory above {limits[-1]:g} GiB, really run"
    figure = style.figure(1.4 + 3.4 * rows, width=3.4 * len(sweeps) + 0.6, title=title)
    grid = figure.subplots(2 * rows, len(sweeps), squeeze=False)
    for column, (op, growing) in zip(grid.T, sweeps.items(), strict=True):
        for axes in column[2 * len(growing) :]:
            axes.set_axis_off()
        for axes, (grows, quantity) in zip(column, product(growing, UNITS), strict=False):
            _panel(axes, [r for r in records if (r["op"], r["grows"], r["quantity"]) == (op, grows, quantity)])
        _head(column[0], OPS[op], [record["provider"] for record in records if record["op"] == op])
    for axes, quantity in zip(grid[:, 0], cycle(UNITS), strict=False):
        axes.set_ylabel("time" if quantity == "time" else "peak memory\nbeside the inputs", fontsize=style.SMALL)
    return style.finish(figure, records)


def _panel(axes: Axes, records: list[dict[str, Any]]) -> None:
    if not records:
        return
    grows, quantity = records[0]["grows"], records[0]["quantity"]
    drawn = {name: line for name, line in points_of(records, grows, quantity).items() if line}
    exponents = {name: f"^{exponent(line):.2f}" if len(line) > 1 else "" for name, line in drawn.items()}
    style.lines(axes, drawn, UNITS[quantity], exponents, out_of_memory(records, grows))
    others = (f"{key} = {style.size(value)}" for key, value in records[0]["case"].items() if key != grows)
    axes.set_xlabel(f"{WORDS[grows]}   ({', '.join(others)})", fontsize=style.SMALL)


def _head(axes: Axes, title: str, providers: list[str]) -> None:
    """Above a column: the operation, and which line is whose."""
    from matplotlib.lines import Line2D

    shades = style.colours(dict.fromkeys(providers))
    lines = [Line2D([], [], color=shade, linewidth=3, label=style.name_of(name)) for name, shade in shades.items()]
    axes.legend(
        handles=lines, title=title, title_fontsize=10, fontsize=style.SMALL, frameon=False, alignment="left",
        loc="lower left", bbox_to_anchor=(-0.02, 1.0), borderaxespad=0.2, handlelength=1.2,
    )  # fmt: skip


def points_of(records: list[dict[str, Any]], grows: str, quantity: str) -> dict[str, Points]:
    """Size and median of every provider, as measured; zeros have no place on a logarithmic scale."""
    lines: dict[str, Points] = {record["provider"]: [] for record in records}
    for record in records:
        value = style.values([record], quantity).get(record["provider"])
        if isinstance(value, float) and value > 0:
            lines[record["provider"]].append((record["case"][grows], value))
    return {name: sorted(points) for name, points in lines.items()}


def out_of_memory(records: list[dict[str, Any]], grows: str) -> dict[str, float]:
    """The size at which a provider ran out of memory, not those that were not tried after it."""
    failed = [record for record in records if record.get("left out", "").startswith("out of memory")]
    return {record["provider"]: record["case"][grows] for record in failed}


def exponent(line: Points) -> float:
    """Slope of the least-squares line through the logarithms of the largest sizes."""
    logs = [(math.log(x), math.log(y)) for x, y in line[-FITTED:]]
    mean_x, mean_y = (sum(values) / len(logs) for values in zip(*logs, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)
