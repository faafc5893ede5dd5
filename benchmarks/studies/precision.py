"""What statistics promise of their own top, and what further examples say: ``statistics.precision`` and ``until=``.

    python -m benchmarks precision --data FOLDER [--model FOLDER] [--encoder FOLDER]

On two small real models (those of the study of exactness: a LLaMA on CoLA, a BERT on SST-2) the Fisher is estimated
from several disjoint sets of rows. The *measured* overlap is that of the top 0.5 % of such a Fisher with the top of one
of many other rows; the *promised* one is ``precision.overlap(others=...)`` for as many others, which the statistics
tell without having seen them. Last, each set is read with ``until=``: it stops at some number of examples, and the
measured overlaps tell how many it would have needed. The rows come after those on which the formula of the promise was
chosen, so none of them has a part in it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist, mean
from typing import Any

import fishkern as fk
from benchmarks.engine import RESULTS
from benchmarks.engine.origin import machine
from benchmarks.engine.records import Record, Records
from benchmarks.studies.comparing.limit import say
from benchmarks.studies.exactness.subjects import Loaded, subjects

NORMAL = NormalDist()


@dataclass(frozen=True)
class Setting:
    """The setting of all measurements.

    Args:
        first: Number of rows that are left out: those on which the formula was chosen.
        sets: Disjoint sets of rows.
        sizes: Numbers of examples of a set that are estimated, ascending.
        others: Number of rows that the measured overlap is with.
        batch_size: Of all passes.
        density: Of the top.
        goal: Of ``until``.
        seed: Of the rows.
    """

    first: int = 2048
    sets: int = 4
    sizes: tuple[int, ...] = (64, 128, 256, 512)
    others: int = 1024
    batch_size: int = 8
    density: float = 0.005
    goal: float = 0.88
    seed: int = 0

    def rows(self, number: int, count: int) -> range:
        """The first rows of a set."""
        start = self.first + self.others + number * self.sizes[-1]
        return range(start, start + count)

    @property
    def end(self) -> int:
        """Number of rows to load."""
        return self.rows(self.sets, 0).stop


SETTINGS = {"cola": Setting(), "sst2": Setting(first=768, sets=5, sizes=(64, 128), others=384, goal=0.85)}


def main(arguments: list[str] | None = None) -> int:
    """Measure what is missing, and print a table."""
    given = _parser().parse_args(arguments)
    from benchmarks.studies.glue.data import packaged_encoder

    llama = given.model or given.data.parent / "models" / "stories260K"
    every = {one.name: one for one in subjects(given.data, llama, lambda: given.encoder or packaged_encoder())}
    path = given.results / machine()["machine"] / "precision.jsonl"
    for name in given.only:
        setting = SETTINGS[name]
        log = Records(path, study="precision", subject=name, setting=asdict(setting))
        if not log.find():
            loaded = every[name].load(setting.end, setting.seed)
            log.append(*({"about": loaded.about, **measured} for measured in measure(loaded, setting, name)))
        print("\n".join(table(log.find(), setting)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks precision", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="GLUE: holds cola/train.parquet")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="stories260K; by default in ../models of the data")
    parser.add_argument("--encoder", type=Path, metavar="FOLDER", help="a BERT; by default the packaged MiniLM")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="one of %(choices)s")
    return parser


def measure(loaded: Loaded, setting: Setting, name: str) -> Iterator[Record]:
    """Promised and measured overlaps of each set and size, and where ``until=`` stops."""

    def estimated(rows: range, **options: Any) -> fk.Statistics:
        batches = loaded.batches(rows, setting.batch_size)
        return fk.estimate(loaded.model, batches, parameters=loaded.parameters, **options)

    say(f"{name}: {setting.others} other rows")
    rule = fk.GlobalTopK(density=setting.density)
    others = estimated(range(setting.first, setting.first + setting.others))
    top = fk.select(others, rule)
    for number in range(setting.sets):
        for n in setting.sizes:
            say(f"{name}, set {number + 1} of {setting.sets}: {n} rows")
            statistics = estimated(setting.rows(number, n))
            shared = (fk.select(statistics, rule) & top).count
            promised = statistics.precision.overlap(setting.density, others=others.count)
            shares = {"promised": promised, "measured": shared / top.count}
            yield {"quantity": "overlap", "set": number, "examples": n, "pool": statistics.total, **shares}
        rows = setting.rows(number, setting.sizes[-1])
        stopped = estimated(rows, until=(setting.goal, setting.density))
        yield {"quantity": "until", "set": number, "stopped": stopped.count, "of": len(rows)}


def needed(records: list[Record], setting: Setting) -> float:
    """The examples that the measured curve needs for the goal: interpolated, or continued, in the logarithm.

    The measured overlaps are with a limited number of others, whose share of the noise is taken away.
    """
    points = []
    for n in setting.sizes:
        measured = mean(r["measured"] for r in records if r.get("examples") == n)
        noise = -NORMAL.inv_cdf(measured / 2) / math.sqrt(1 / n + 1 / setting.others)
        points.append((math.log(n), math.log(noise / math.sqrt(n))))
    goal = math.log(-NORMAL.inv_cdf(setting.goal / 2))
    after = next((at for at, (_, spread) in enumerate(points) if spread <= goal), len(points) - 1)
    (x, y), (x2, y2) = points[max(after, 1) - 1], points[max(after, 1)]
    return math.exp(x + (goal - y) / (y2 - y) * (x2 - x))


def table(records: list[Record], setting: Setting) -> Iterator[str]:
    """Promised and measured overlaps by number of examples, and where ``until=`` stopped."""
    yield f"{records[0]['subject']}: top {setting.density:.1%}, in percent; differences in points"
    for n in setting.sizes:
        some = [r for r in records if r.get("examples") == n]
        promised, measured = (mean(100 * r[key] for r in some) for key in ("promised", "measured"))
        worst = max(abs(100 * (r["promised"] - r["measured"])) for r in some)
        yield f"{n:5} examples: promised {promised:.1f}, measured {measured:.1f}, largest difference {worst:.1f}"
    stops = [r["stopped"] for r in records if r["quantity"] == "until"]
    yield f"until={setting.goal} stopped at {stops}; the measured curve needs {needed(records, setting):.0f}"
