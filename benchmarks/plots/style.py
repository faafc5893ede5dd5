"""What all pictures share: size, colours and names of providers, bars, labels at the ends of lines, the origin."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.rivals.providers import BLACK, EVERY, GREEN, GREY, OLIVE, ORANGE, OURS, PINK, SKY, VERMILION

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 9.0  # inches
SMALL = 8  # points: ticks, notes and labels
# Colours of the arms of the study on GLUE, which are no providers. FISH has the colour of fishkern.
ARMS = {"fish": OURS, "original": GREY, "random": ORANGE, "reverse": VERMILION, "magnitude": GREEN}
COLOURS = {**{name: provider.colour for name, provider in EVERY.items()}, **ARMS}
SPARE = (PINK, SKY, BLACK, OLIVE, "#882255", "#44AA99")
MARKERS = "osD^vPX*"
_END = "end of a line"


def figure(height: float, width: float = WIDTH, title: str = "") -> Figure:
    """Make an empty figure, in inches, without pyplot, which keeps every figure and looks for a display."""
    from matplotlib.figure import Figure

    empty = Figure(figsize=(width, height), layout="constrained")
    if title:
        empty.suptitle(title, fontsize=11, x=0.01, ha="left")
    return empty


def colours(providers: Iterable[str]) -> dict[str, str]:
    """Give each provider its colour, and those without one the spare colours in their order."""
    providers = list(providers)
    spare = iter([colour for colour in SPARE if colour not in {COLOURS.get(name) for name in providers}])
    return {name: COLOURS.get(name) or next(spare, GREY) for name in providers}


def name_of(provider: str) -> str:
    """The name of a provider in pictures, from that in the records."""
    return EVERY[provider].label or provider if provider in EVERY else provider


def number(value: float, unit: str = "", digits: int = 3) -> str:
    """Write a number with at least so many figures; seconds (``"s"``) as s, ms or us, MiB from 1024 on as GiB."""
    if unit == "s" and 0 < value < 1:
        value, unit = (1e3 * value, "ms") if value >= 1e-3 else (1e6 * value, "us")
    if unit == "MiB" and value >= 1024:
        value, unit = value / 1024, "GiB"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{min(decimals, 3)}f} {unit}".rstrip()


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
    axes.set_xlabel({"s": "time in s", "MiB": "memory in MiB"}.get(unit, unit), fontsize=SMALL)
    axes.set_title(title, fontsize=9, loc="left")
    plain(axes)


def lines(
    axes: Axes,
    points: Mapping[str, Sequence[tuple[float, float]]],
    unit: str,
    notes: Mapping[str, str] | None = None,
    failed: Mapping[str, float] | None = None,
) -> None:
    """Draw one line for each provider on logarithmic scales, its name or a note at its end.

    Args:
        axes: Where; the label of its x-axis is the caller's.
        points: By provider, from left to right.
        unit: Of the values, such as ``"s"`` or ``"MiB"``.
        notes: By provider, a text in place of its name, which the picture then has elsewhere.
        failed: By provider, the x at which it failed: a cross, as high as its last point.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    shades = colours(points)
    axes.set(xscale="log", yscale="log")
    for (provider, line), marker in zip(points.items(), itertools.cycle(MARKERS), strict=False):
        x, y = zip(*line, strict=True)
        strong = shades[provider] == OURS
        axes.plot(x, y, color=shades[provider], marker=marker, markersize=4, linewidth=2 if strong else 1.2)
        end = (failed or {}).get(provider, x[-1])
        if end != x[-1]:
            axes.plot([x[-1], end], [y[-1]] * 2, color=shades[provider], linestyle=":", linewidth=1)
            axes.plot(end, y[-1], "x", color=shades[provider], markersize=8, markeredgewidth=2, clip_on=False)
        axes.annotate(
            (notes or {}).get(provider, name_of(provider)), (end, y[-1]), (8, 0),
            textcoords="offset points", va="center", fontsize=SMALL - 1, color=shades[provider], gid=_END,
        )  # fmt: skip
    sizes = sorted({x for line in points.values() for x, _ in line} | set((failed or {}).values()))
    axes.set_xticks(sizes, [size(x) for x in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    heights = [y for line in points.values() for _, y in line]
    if heights:
        axes.set_ylim(min(heights) / 1.4, max(heights) * 1.4)
    few = bool(heights) and max(heights) < 30 * min(heights)
    locator = LogLocator(base=2, numticks=6) if unit == "MiB" else LogLocator(subs=(1, 2, 5) if few else (1,))
    axes.yaxis.set_major_locator(locator)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value, unit, digits=1)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(color="0.92", linewidth=0.6)
    axes.set_axisbelow(True)
    plain(axes)


def size(x: float) -> str:
    """Write a size; powers of two that are long as such."""
    power = math.log2(x) if x > 0 else 0.5
    return f"$2^{{{power:.0f}}}$" if power.is_integer() and power > 12 else f"{x:g}"


def plain(axes: Axes) -> None:
    """Take away the frame's upper and right side, and make its numbers small."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=SMALL)


def _spread(figure: Figure, gap: float = 9.5) -> None:
    """Move the labels at the ends of lines up or down until they are so many points apart."""
    figure.draw_without_rendering()  # the layout decides how high the axes are
    for axes in figure.axes:
        labels = [text for text in axes.texts if text.get_gid() == _END]
        places = [axes.transData.transform(label.xy)[1] * 72 / figure.dpi for label in labels]
        order = sorted(range(len(labels)), key=places.__getitem__)
        heights = [places[n] for n in order]
        for _ in range(200):
            for low in range(len(heights) - 1):
                short = gap - (heights[low + 1] - heights[low])
                if short > 0.01:
                    heights[low] -= short / 2
                    heights[low + 1] += short / 2
        for n, height in zip(order, heights, strict=True):
            labels[n].set_position((8, height - places[n]))


def values(records: Iterable[dict[str, Any]], quantity: str) -> dict[str, float | str]:
    """Take from records of a speed case each provider's median seconds or peak MiB, or the reason that it has none."""
    figures: dict[str, float | str] = {}
    for record in records:
        if record["quantity"] == quantity:
            value = record["seconds"]["median"] if "seconds" in record else record.get("peak_mib")
            figures[record["provider"]] = record.get("left out", "not measured") if value is None else float(value)
    return figures


def cases(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The different cases, in the order of their records."""
    return list({json.dumps(record["case"]): record["case"] for record in records}.values())


def newest(records: Iterable[dict[str, Any]], *fields: str) -> list[dict[str, Any]]:
    """Keep the last record of each combination of these fields: later measurements replace earlier ones."""
    return list({json.dumps([record.get(field) for field in fields]): record for record in records}.values())


def finish(figure: Figure, records: Iterable[dict[str, Any]]) -> Figure:
    """Say below where the records come from (machine, versions, commits, last day), and part the labels of lines."""
    records = list(records)

    def all_of(field: str) -> str:
        return ", ".join(dict.fromkeys(str(record[field]) for record in records if record.get(field) is not None))

    commits = dict.fromkeys(r["commit"][:7] + " with changes" * bool(r.get("dirty")) for r in records if "commit" in r)
    day = max((record["time"][:10] for record in records if "time" in record), default="")
    parts = [all_of("machine"), all_of("cpu"), "torch " + all_of("torch"), "fishkern " + ", ".join(commits), day]
    figure.supxlabel(" · ".join(filter(None, parts)), fontsize=SMALL - 1, color=GREY, x=0.01, ha="left")
    _spread(figure)
    return figure
