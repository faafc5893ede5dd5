"""Time and peak memory as sizes grow, log-log, with the exponent at each line and the point where memory ran out.

The exponent is that of the best straight line through the largest sizes that were measured; small ones are mostly the
cost of a call.
"""

from __future__ import annotations

import math
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
    "n": "scores",
    "k": "entries selected k",
    "tensors": "tensors",
    "P": "parameters",
    "layers": "layers",
}
Points = list[tuple[float, float]]


def draw(records: list[dict[str, Any]]) -> Figure:
    """Draw a row for each quantity that grows: time left, memory right."""
    records = style.newest(records, "op", "quantity", "grows", "case", "provider")
    sweeps = list(dict.fromkeys((record["op"], record["grows"]) for record in records))
    limits = sorted({record["limit_gib"] for record in records})
    title = f"Growth; exponents of the {FITTED} largest sizes; x: out of memory above {limits[-1]:g} GiB, really run"
    figure = style.figure(0.8 + 2.5 * len(sweeps), width=10.5, title=title)
    for row, (op, grows) in zip(figure.subplots(len(sweeps), 2, squeeze=False), sweeps, strict=True):
        for axes, quantity, unit in zip(row, ("time", "memory"), ("s", "MiB"), strict=True):
            found = [r for r in records if (r["op"], r["grows"], r["quantity"]) == (op, grows, quantity)]
            what = "time" if quantity == "time" else "peak memory beside the inputs"
            axes.set_title(f"{OPS[op]}: {what}", fontsize=9, loc="left")
            _panel(axes, found, grows, quantity, unit)
    return style.finish(figure, records)


def _panel(axes: Axes, records: list[dict[str, Any]], grows: str, quantity: str, unit: str) -> None:
    lines = points_of(records, grows, quantity)
    drawn = {name: line for name, line in lines.items() if line}
    exponents = {name: f"^{exponent(line):.2f}" for name, line in drawn.items() if len(line) > 1}
    style.lines(axes, drawn, unit, exponents, out_of_memory(records, grows))
    others = {key: value for key, value in records[0]["case"].items() if key != grows} if records else {}
    said = ", ".join(f"{WORDS[key]} = {value:,}" for key, value in others.items())
    axes.set_xlabel(f"{WORDS[grows]}   ({said})", fontsize=style.SMALL)


def points_of(records: list[dict[str, Any]], grows: str, quantity: str) -> dict[str, Points]:
    """Size and median of every provider, as measured; what is zero has no place on a logarithmic scale."""
    found: dict[str, Points] = {record["provider"]: [] for record in records}
    for record in records:
        value = style.values([record], quantity).get(record["provider"])
        if isinstance(value, float) and value > 0:
            found[record["provider"]].append((record["case"][grows], value))
    return {name: sorted(line) for name, line in found.items()}


def out_of_memory(records: list[dict[str, Any]], grows: str) -> dict[str, float]:
    """The size at which a provider ran out of memory, not those that were not tried after it."""
    failed = [record for record in records if record.get("left out", "").startswith("out of memory")]
    return {record["provider"]: record["case"][grows] for record in failed}


def exponent(line: Points) -> float:
    """Slope of the least-squares line through the logarithms of the largest sizes."""
    logs = [(math.log(x), math.log(y)) for x, y in line[-FITTED:]]
    mean_x, mean_y = (sum(values) / len(logs) for values in zip(*logs, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)
