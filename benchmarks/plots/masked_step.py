"""Time of one masked AdamW step and peak memory of training, over the selected fraction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.plots import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MODELS = {"llama": "all weights of a LLaMA", "lora": "LoRA of rank 16"}


def draw(records: list[dict[str, Any]]) -> Figure:
    """Draw lines over density: a row for each model, time left, memory right."""
    records = style.newest(records, "quantity", "case", "provider")
    models = list(dict.fromkeys(record["case"]["model"] for record in records))
    figure = style.figure(0.8 + 3.1 * len(models), title="AdamW on selected entries")
    for row, model in zip(figure.subplots(len(models), 2, squeeze=False), models, strict=True):
        of_model = [record for record in records if record["case"]["model"] == model]
        name = MODELS.get(model, model)
        _lines(row[0], of_model, "time", "s", f"{name}: time of one step")
        _lines(row[1], of_model, "memory", "MiB", f"{name}: peak memory of training")
    return style.finish(figure, records)


def _lines(axes: Axes, records: list[dict[str, Any]], quantity: str, unit: str, title: str) -> None:
    providers = dict.fromkeys(record["provider"] for record in records)
    lines = {
        name: sorted(
            (r["case"]["density"], value)
            for r in records
            if r["provider"] == name and isinstance(value := style.values([r], quantity).get(name), float)
        )
        for name in providers
    }
    style.lines(axes, {name: line for name, line in lines.items() if line}, unit)
    axes.set_xlabel("selected fraction", fontsize=style.SMALL)
    axes.set_title(title, fontsize=9, loc="left")
