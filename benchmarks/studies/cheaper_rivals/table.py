"""Tables of the comparison of cheaper rivals."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev

from benchmarks.engine.records import Record


def values(records: Sequence[Record], label: str, *path: str) -> list[float]:
    """One figure of an arm or chooser by seed; of a pair of losses its mean."""
    found = []
    for record in sorted((r for r in records if r["label"] == label), key=lambda record: record["seed"]):
        value = record
        for key in path:
            value = value[key]
        found.append(mean(value) if isinstance(value, list) else value)
    return found


def first_of(records: Sequence[Record], label: str, use: str) -> list[float]:
    """The loss on the first of both tasks, by seed."""
    matching = sorted((r for r in records if r["label"] == label), key=lambda record: record["seed"])
    return [(record[use] if use == "free" else record[use]["scored"])[0] for record in matching]


def spread(values: Sequence[float], times: float = 1.0, digits: int = 3) -> str:
    """Mean and standard deviation over seeds."""
    deviation = stdev(values) if len(values) > 1 else 0.0
    return f"{times * mean(values):.{digits}f} ± {times * deviation:.{digits}f}"


def table(records: Sequence[Record]) -> str:
    """Mean and standard deviation over seeds of every judgement, in two tables."""
    uses = [record for record in records if record["quantity"] == "uses"]
    sparse = [record for record in records if record["quantity"] == "sparse"]
    lines = []
    if uses:
        first = uses[0]
        densities, fractions = list(first["overlap"]), list(first["pruned"])
        heads = [f"top {float(d):.1%}" for d in densities] + [f"pruned {float(f):.0%}" for f in fractions]
        heads += ["merged", "consolidated", "the first task"]
        before = spread(values(uses, first["label"], "before"))
        free = spread(first_of(uses, first["label"], "free"))
        lines.append(
            f"{first['about']['model']}: loss of the first task once learnt {before}, after the second {free} without"
            f" a penalty"
        )
        lines.append(f"{'arm':10}{'cost':>6}" + "".join(f"{head:>18}" for head in heads))
        for label in dict.fromkeys(record["label"] for record in uses):
            cells = [spread(values(uses, label, "overlap", d), 100, 1) for d in densities]
            cells += [spread(values(uses, label, "pruned", f)) for f in fractions]
            cells += [spread(values(uses, label, use, "scored")) for use in ("merged", "consolidated")]
            cells.append(spread(first_of(uses, label, "consolidated")))
            cost = mean(values(uses, label, "cost"))
            lines.append(f"{label:10}{cost:6.2f}" + "".join(f"{cell:>18}" for cell in cells))
        lines.append(
            "top: percent of the selection by other examples. pruned: loss of the first task. merged, consolidated:"
            "\nmean loss of both tasks. cost: FLOPs of matrix products, 1 is an ordinary pass over the examples."
        )
    if sparse:
        lines.append(f"\n{'chosen by':10}{'trained':>9}{'loss':>18}")
        for label in dict.fromkeys(record["label"] for record in sparse):
            trained = int(mean(values(sparse, label, "trained")))
            lines.append(f"{label:10}{trained:9,}{spread(values(sparse, label, 'scored')):>18}")
    return "\n".join(lines)
