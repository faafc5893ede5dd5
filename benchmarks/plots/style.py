"""What all pictures share: size, colours and names of providers, bars, labels at the ends of lines, the origin."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 9.0  # inches
SMALL = 8  # points: ticks, notes and labels
OURS = "#0072B2"
GREY = "#777777"
# Okabe and Ito's colours, which stay apart for every kind of colour vision. A provider has one colour everywhere; those
# that share one stand in no picture together. What FISH trains is ours, too.
COLOURS = {
    "fishkern": OURS,
    "fish": OURS,
    "one_by_one": "#D55E00",
    "loop": "#D55E00",
    "cat_topk": "#D55E00",
    "six_lines": "#D55E00",
    "vmap_grad": "#E69F00",
    "vmap": "#E69F00",
    "kthvalue": "#E69F00",
    "masked_fused": "#E69F00",
    "opacus": "#009E73",
    "sampled_threshold": "#009E73",
    "masked_foreach": "#009E73",
    "backpack": "#CC79A7",
    "nngeometry": "#56B4E9",
    "kronfluence": "#000000",
    "per_layer_bmm": "#999933",
    "forward_backward": GREY,
    "dense_fused": GREY,
    "one_cold_read": GREY,
    "original": GREY,
    "random": "#E69F00",
    "reverse": "#D55E00",
    "magnitude": "#009E73",
}
SPARE = ("#CC79A7", "#56B4E9", "#000000", "#999933", "#882255", "#44AA99")
MARKERS = "osD^vPX*"
NAMES = {
    "one_by_one": "batch-size-1 loop",
    "vmap_grad": "torch.func vmap",
    "vmap": "torch.func vmap",
    "cat_topk": "torch.cat + topk",
    "kthvalue": "torch.kthvalue",
    "sampled_threshold": "sampled threshold",
    "one_cold_read": "one cold read",
    "six_lines": "six lines of torch",
    "masked_fused": "masked gradients, fused AdamW",
    "masked_foreach": "masked gradients, foreach AdamW",
    "dense_fused": "everything, fused AdamW",
    "forward_backward": "forward + backward alone",
    "per_layer_bmm": "bmm for each layer",
    "opacus": "Opacus",
    "backpack": "BackPACK",
}


def figure(height: float, width: float = WIDTH, title: str = "") -> Figure:
    """Make an empty figure, in inches, without pyplot, which keeps every figure and looks for a display."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    if title:
        made.suptitle(title, fontsize=11, x=0.01, ha="left")
    return made


def colours(providers: Iterable[str]) -> dict[str, str]:
    """Give each provider its colour, and those without one the spare colours in their order."""
    providers = list(providers)
    spare = iter([colour for colour in SPARE if colour not in {COLOURS.get(name) for name in providers}])
    return {name: COLOURS.get(name) or next(spare, GREY) for name in providers}


def name_of(provider: str) -> str:
    """Say in words what a provider is called in the records."""
    return NAMES.get(provider, provider)


def number(value: float, unit: str = "") -> str:
    """Write a number with three figures; seconds (``"s"``) as s, ms or us, MiB from 1024 on as GiB."""
    if unit == "s" and value < 1:
        value, unit = (1e3 * value, "ms") if value >= 1e-3 else (1e6 * value, "us")
    if unit == "MiB" and value >= 1024:
        value, unit = value / 1024, "GiB"
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{min(digits, 3)}f} {unit}".rstrip()


def bars(axes: Axes, values: Mapping[str, float | str], unit: str, title: str = "") -> None:
    """Draw one horizontal bar for each provider, its value at its end; a text says why there is none.

    Args:
        axes: Where.
        values: By provider, from top to bottom.
        unit: Of the values, such as ``"s"`` or ``"MiB"``.
        title: Above.
    """
    shades = colours(values)
    largest = max((value for value in values.values() if not isinstance(value, str)), default=1.0)
    for row, (provider, value) in enumerate(values.items()):
        if isinstance(value, str):
            axes.text(0.01 * largest, row, value, va="center", fontsize=SMALL, color=GREY, style="italic")
            continue
        axes.barh(row, value, 0.7, color=shades[provider])
        axes.text(value + 0.01 * largest, row, number(value, unit), va="center", fontsize=SMALL)
    axes.set_yticks(range(len(values)), [name_of(provider) for provider in values], fontsize=SMALL)
    for label, provider in zip(axes.get_yticklabels(), values, strict=True):
        label.set_fontweight("bold" if shades[provider] == OURS else "normal")
    axes.set(xlim=(0, 1.22 * largest), ylim=(len(values) - 0.4, -0.6))
    axes.set_xlabel(unit, fontsize=SMALL)
    axes.set_title(title, fontsize=9, loc="left")
    plain(axes)


def lines(
    axes: Axes, points: Mapping[str, Sequence[tuple[float, float]]], unit: str, notes: Mapping[str, str] | None = None
) -> None:
    """Draw one line for each provider on logarithmic scales, its name at its end.

    Args:
        axes: Where; the label of its x-axis is the caller's.
        points: By provider, from left to right.
        unit: Of the values, such as ``"s"`` or ``"MiB"``.
        notes: By provider, what is said behind its name.
    """
    shades = colours(points)
    ends = []
    axes.set(xscale="log", yscale="log")
    for (provider, line), marker in zip(points.items(), itertools.cycle(MARKERS), strict=False):
        strong = shades[provider] == OURS
        x, y = zip(*line, strict=True)
        axes.plot(x, y, color=shades[provider], marker=marker, markersize=4, linewidth=2 if strong else 1.2)
        note = (notes or {}).get(provider, "")
        ends.append((x[-1], y[-1], f"{name_of(provider)} {note}".rstrip(), shades[provider]))
    axes.set_ylabel(unit, fontsize=SMALL)
    plain(axes)
    axes.grid(color="0.92", linewidth=0.6)
    axes.set_axisbelow(True)
    label_ends(axes, ends)


def plain(axes: Axes) -> None:
    """Take away the frame's upper and right side, and make its numbers small."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=SMALL)


def label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]], gap: float = 10.0) -> None:
    """Write labels to the right of the ends of lines, moved up or down until they are ``gap`` points apart.

    Call it when the limits and scales of the axes stand.

    Args:
        axes: Where.
        ends: For each line x and y of its end, its label and its colour.
        gap: In points.
    """
    places = [axes.transData.transform((x, y))[1] * 72 / axes.figure.dpi for x, y, _, _ in ends]
    order = sorted(range(len(ends)), key=places.__getitem__)
    heights = [places[n] for n in order]
    for _ in range(100):
        for low in range(len(heights) - 1):
            short = gap - (heights[low + 1] - heights[low])
            if short > 0.01:
                heights[low] -= short / 2
                heights[low + 1] += short / 2
    for n, height in zip(order, heights, strict=True):
        x, y, text, colour = ends[n]
        axes.annotate(
            text, (x, y), (6, height - places[n]), textcoords="offset points", va="center", fontsize=SMALL - 1,
            color=colour, annotation_clip=False,
        )  # fmt: skip


def values(records: Iterable[dict[str, Any]], quantity: str) -> dict[str, float | str]:
    """Take from records of a speed case each provider's median seconds or peak MiB, or the reason that it has none."""
    found: dict[str, float | str] = {}
    for record in records:
        if record["quantity"] == quantity:
            value = record["seconds"]["median"] if "seconds" in record else record.get("peak_mib")
            found[record["provider"]] = record.get("left out", "not measured") if value is None else float(value)
    return found


def cases(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The different cases, in the order of their records."""
    return list({json.dumps(record["case"]): record["case"] for record in records}.values())


def newest(records: Iterable[dict[str, Any]], *fields: str) -> list[dict[str, Any]]:
    """Keep the last record of each combination of these fields: what is measured again replaces what was."""
    return list({json.dumps([record.get(field) for field in fields]): record for record in records}.values())


def origin(figure: Figure, records: Iterable[dict[str, Any]]) -> None:
    """Say below the picture where its records come from: machine, versions, commits, days."""
    records = list(records)

    def all_of(*fields: str) -> str:
        found = dict.fromkeys(str(r[field]) for r in records for field in fields if r.get(field) is not None)
        return ", ".join(found)

    commits = dict.fromkeys(r["commit"][:7] + " with changes" * bool(r.get("dirty")) for r in records if "commit" in r)
    days = sorted({r["time"][:10] for r in records if "time" in r})
    parts = [all_of("machine"), all_of("cpu"), "torch " + all_of("torch"), "fishkern " + ", ".join(commits), *days[-1:]]
    figure.supxlabel(" · ".join(filter(None, parts)), fontsize=SMALL - 1, color=GREY, x=0.01, ha="left")
