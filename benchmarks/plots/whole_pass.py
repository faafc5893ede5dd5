"""Time and peak memory of a pass over data, for each number of tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.plots import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(records: list[dict[str, Any]]) -> Figure:
    """Draw a row of bars for each case: time left, memory right."""
    records = style.newest(records, "quantity", "case", "provider")
    cases = style.cases(records)
    providers = list(dict.fromkeys(record["provider"] for record in records))
    figure = style.figure(0.9 + len(cases) * (0.75 + 0.19 * len(providers)), title="A Fisher pass over data")
    for row, case in zip(figure.subplots(len(cases), 2, squeeze=False), cases, strict=True):
        of_case = [record for record in records if record["case"] == case]
        style.bars(row[0], style.values(of_case, "time"), "s", _words(case))
        style.bars(row[1], style.values(of_case, "memory"), "MiB", "peak memory beside the weights")
    return style.finish(figure, records)


def _words(case: dict[str, Any]) -> str:
    examples = case["N"] * case["batches"]
    return f"{examples} examples of {case['T']} tokens: {case['layers']} layers, hidden size {case['hidden']}"
