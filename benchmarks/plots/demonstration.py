"""The demonstration: time and peak memory of the Fisher of all parameters and of training steps, with rivals."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.plots import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ARMS = {
    "estimate": {
        "fishkern": "fishkern",
        "one_by_one": "one_by_one",
        "opacus": "opacus",
        "opacus_single": "Opacus, one at a time",
    },
    "train": {"fishkern": "fishkern", "dense_adamw": "dense_fused"},
}


def draw(records: list[dict[str, Any]]) -> Figure:
    """Draw the setting that was measured last: the Fisher above, training below; time left, memory right."""
    setting = records[-1]["setting"]
    records = style.newest([r for r in records if r["setting"] == setting], "arm", "stage")
    weights = next((record["weights"] for record in records if "weights" in record), None)
    model = setting["shape"] if weights is None else f"A LLaMA of {weights / 1e6:,.1f} million parameters"
    figure = style.figure(
        4.4,
        title=f"{model}, {setting['dtype']}: their Fisher from examples of {setting['tokens']} tokens, and training "
        f"{setting['density']:.1%} of them",
    )
    (times, peaks), (steps, tops) = figure.subplots(2, 2)
    style.bars(times, _values(records, "estimate", _seconds_each), "s", "the Fisher: time for one example")
    style.bars(peaks, _values(records, "estimate", _peak), "MiB", "the Fisher: peak memory, weights included")
    style.bars(steps, _values(records, "train", lambda r: r["step_seconds"]), "s", "training: time of a step")
    style.bars(tops, _values(records, "train", _peak), "MiB", "training: peak memory, weights included")
    return style.finish(figure, records)


def _values(records: list[dict[str, Any]], stage: str, value: Any) -> dict[str, float | str]:
    values: dict[str, float | str] = {}
    for arm, name in ARMS[stage].items():
        for record in records:
            if record["arm"] != arm:
                continue
            if record["stage"] == stage and "seconds" in record:
                values[name] = value(record)
            elif "left out" in record:
                values[name] = record["left out"][:60]
    return values


def _seconds_each(record: dict[str, Any]) -> float:
    return record["seconds"] / record["examples"]


def _peak(record: dict[str, Any]) -> float:
    return record["peak_mib"]
