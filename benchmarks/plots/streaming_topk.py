"""Time of exact top-k: over scores in memory against torch, from a file against one cold read of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.plots import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(records: list[dict[str, Any]]) -> Figure:
    """Draw bars for each number of scores, on a scale of its own."""
    records = style.newest(records, "quantity", "where", "case", "provider")
    times = [record for record in records if record["quantity"] == "time"]
    panels = list({_panel(record): None for record in times})
    figure = style.figure(0.9 + 1.35 * len(panels), title="Exact top-k: where the largest scores are")
    for (axes,), key in zip(figure.subplots(len(panels), 1, squeeze=False), panels, strict=True):
        of_panel = [record for record in records if _panel(record) == key]
        where, n, density, zeros = key
        place = "memory" if where == "memory" else "a file"
        title = f"{100 * density:g} % of {n / 1e6:,.0f} million float32 scores in {place}"
        title += f", {100 * zeros:g} % of them zero" if zeros else ""
        for record in of_panel:
            if record["quantity"] == "memory":
                beside = record["peak_mib"] - record["indices_mib"]
                title += f"; peak memory beside the indices {style.number(beside, 'MiB')}"
        style.bars(axes, style.values(of_panel, "time"), "s", title)
    return style.finish(figure, records)


def _panel(record: dict[str, Any]) -> tuple[str, int, float, float]:
    case = record["case"]
    return record["where"], case["n"], case["density"], case.get("zeros", 0.0)
