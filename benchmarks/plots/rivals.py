"""Examples per second and peak memory of everybody's pass over data, for each shape of model."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

from benchmarks.plots import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = {"bert": "BERT", "llama": "LLaMA"}
_REASON = 44  # characters of a reason that fit into an axes
_NEARLY_ALL = 0.99


def draw(records: list[dict[str, Any]]) -> Figure:
    """Draw a row of bars for each case: speed left, memory right; what covers a part of the model says how much."""
    records = style.newest(records, "quantity", "case", "provider")
    timed = [record for record in records if record["quantity"] == "time"]
    cases = sorted(style.cases(timed), key=lambda case: (case["kind"], case["hidden"], case["T"]))
    providers = list(dict.fromkeys(record["provider"] for record in timed))
    height = 0.9 + len(cases) * (0.75 + 0.19 * len(providers))
    figure = style.figure(height, width=11, title="A Fisher pass over data, by all ways to it")
    for row, case in zip(figure.subplots(len(cases), 2, squeeze=False), cases, strict=True):
        of_case = [record for record in records if record["case"] == case]
        parts = {record["provider"]: record["coverage"] for record in of_case if "coverage" in record}
        speeds = {r["provider"]: _value(r, "examples_per_second") for r in of_case if r["quantity"] == "time"}
        peaks = {r["provider"]: _value(r, "peak_mib") for r in of_case if r["quantity"] == "memory"}
        notes = {name: _missing(part) for name, part in parts.items() if part["entries"] < 1}
        for record in of_kind(records, case):
            if record.get("wrong"):
                notes[record["provider"]] = f"{len(record['wrong'])} parameters wrong"
        _bars(row[0], speeds, "examples/s", _words(case), notes)
        _bars(row[1], peaks, "MiB", "peak memory beside the weights", notes)
    return style.finish(figure, records)


def of_kind(records: list[dict[str, Any]], case: dict[str, Any]) -> list[dict[str, Any]]:
    """Records of errors on the small model of the same kind as this case."""
    errors = [record for record in records if record["quantity"] == "error"]
    return [record for record in errors if all(record["case"][key] == case[key] for key in ("kind", "tied"))]


def _value(record: dict[str, Any], field: str) -> float | str:
    if field in record:
        return float(record[field])
    return textwrap.shorten(record.get("left out", "not measured"), _REASON, placeholder=" ...")


def _missing(coverage: dict[str, Any]) -> str:
    """What a library leaves out: a share that shows, or kinds of modules that are small."""
    if coverage["entries"] > _NEARLY_ALL:
        return "without " + ", ".join(coverage["missed"])
    return f"{100 * coverage['entries']:.3g} % of entries"


def _bars(axes: Axes, values: dict[str, float | str], unit: str, title: str, notes: dict[str, str]) -> None:
    style.bars(axes, values, unit, title)
    names = {name: style.name_of(name).replace("_unchecked", " without self-check") for name in values}
    labels = [f"{names[name]} ({notes[name]})" if name in notes else names[name] for name in values]
    axes.set_yticks(range(len(values)), labels)


def _words(case: dict[str, Any]) -> str:
    examples, kind = case["N"] * case["batches"], KINDS[case["kind"]]
    model = f"{kind} of {case['layers']} layers, width {case['hidden']}, {case['dtype']}"
    return f"{model}: {examples} examples of {case['T']} tokens"
