"""Tables of the study of exactness, and how each estimator compares with the noise floor."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

FLOOR = "exact, other examples"


def grouped(records: list[dict[str, Any]], examples: int) -> dict[str, list[dict[str, Any]]]:
    """The records of one number of examples by label, the floor first."""
    groups: dict[str, list[dict[str, Any]]] = {FLOOR: []}
    for record in records:
        if record["examples"] == examples:
            groups.setdefault(record["label"], []).append(record)
    return groups


def overlaps(records: list[dict[str, Any]], density: str) -> list[float]:
    return [record["top"][density]["overlap"] for record in records]


def standing(values: list[float], floor: list[float]) -> str:
    """Whether every overlap is below, or above, every one of the floor, or neither."""
    if max(values) < min(floor):
        return "beyond"
    return "closer" if min(values) > max(floor) else "within"


def table(records: list[dict[str, Any]]) -> str:
    """Every estimator and the noise floor by number of examples, medians and ranges over the pairs."""
    first = records[0]
    about, densities = first["about"], list(first["top"])
    lines = [f"{first['subject']}: {about['model']}; {about['text']}; pool of {first['pool']:,} entries"]
    tops = "".join(f"{f'top {float(d):.1%}':>23}" for d in densities)
    for examples in sorted({record["examples"] for record in records}):
        lines.append(f"\n{f'{examples} examples':28}{'rel. L2':>8}{'scale':>8}{'scaled':>8}{tops}{'others':>8}")
        groups = grouped(records, examples)
        for label, group in groups.items():
            middle = {key: _median(group, key) for key in ("relative_l2", "scale", "relative_l2_scaled")}
            line = f"{label:28}{middle['relative_l2']:8.3f}{middle['scale']:8.2g}{middle['relative_l2_scaled']:8.3f}"
            for density in densities:
                values = overlaps(group, density)
                place = "floor" if label == FLOOR else standing(values, overlaps(groups[FLOOR], density))
                spread = f"{100 * statistics.median(values):.1f} ({100 * min(values):.0f}-{100 * max(values):.0f})"
                line += f"{spread:>16}{place:>7}"
            unseen = [record["others"]["top"][densities[0]]["overlap"] for record in group]
            lines.append(f"{line}{100 * statistics.median(unseen):8.1f}")
    pairs, most = len({record["pair"] for record in records}), max(record["examples"] for record in records)
    lines.append(
        f"\nOverlaps in percent: median (range) of {pairs} pairs. scaled: rel. L2 after the best scale. others: of\n"
        f"the top {float(densities[0]):.1%} by the exact Fisher of {most} examples not seen, the part that it selects."
    )
    return "\n".join(lines)


def _median(records: list[dict[str, Any]], key: str) -> float:
    return statistics.median(record[key] for record in records)


def verdicts(records: list[dict[str, Any]]) -> Iterator[str]:
    """Say for each number of examples which estimators differ from the exact Fisher by more than other examples do."""
    words = {
        "beyond": "differ by more than other examples do (below the floor)",
        "within": "cannot be told from other examples (within the floor)",
        "closer": "differ by less than other examples do (above the floor)",
    }
    for examples in sorted({record["examples"] for record in records}):
        groups = grouped(records, examples)
        floor = groups.pop(FLOOR)
        for density in floor[0]["top"]:
            head = f"{floor[0]['subject']}, {examples} examples, top {float(density):.1%}"
            noise = overlaps(floor, density)
            yield f"{head}: two exact Fishers share {_range(noise)}"
            places = {label: standing(overlaps(group, density), noise) for label, group in groups.items()}
            yield from _listed(words, places)
            unseen = {label: _unseen(group, density) for label, group in groups.items()}
            exact = _unseen(floor, density)
            yield f"{head}, of the selection by unseen examples: the exact Fisher finds {_range(list(exact.values()))}"
            signs = {label: _sign([shares[pair] - exact[pair] for pair in shares]) for label, shares in unseen.items()}
            yield from _listed({"fewer": "fewer than it, in every pair", "more": "more than it, in every pair"}, signs)


def _unseen(records: list[dict[str, Any]], density: str) -> dict[int, float]:
    return {record["pair"]: record["others"]["top"][density]["overlap"] for record in records}


def _sign(gains: list[float]) -> str:
    if max(gains) < 0:
        return "fewer"
    return "more" if min(gains) > 0 else "neither"


def _range(values: list[float]) -> str:
    return f"{min(values):.1%} to {max(values):.1%}"


def _listed(words: dict[Any, str], places: dict[str, Any]) -> Iterator[str]:
    for place, meaning in words.items():
        if labels := [label for label, where in places.items() if where == place]:
            yield f"    {meaning}: {'; '.join(labels)}"
