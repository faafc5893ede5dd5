"""``python -m benchmarks plot``: a picture next to each file of records, drawn from nothing else."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from benchmarks.engine.records import read
from benchmarks.plots import PLOTS, WITHOUT, draw
from fishkern.report.plots import save

_OF_A_GPU_SESSION = re.compile(r"\d{8}T\d{6}Z")


def plot(names: list[str], results: Path) -> int:
    """Draw the records of every machine.

    Args:
        names: Of files of records, without ``.jsonl``; all that have a picture where none is named.
        results: Folder of all machines' records.

    Returns:
        Exit status: 0, or 2 where a name is unknown or there is nothing to draw.
    """
    unknown = [name for name in names if name not in PLOTS]
    if unknown:
        why = "; ".join(f"{name} has none: {WITHOUT[name]}" for name in unknown if name in WITHOUT)
        print(why or f"no picture is called {', '.join(unknown)}; there are {', '.join(PLOTS)}.", file=sys.stderr)
        return 2
    drawn = 0
    for path in sorted(results.glob("*/*.jsonl")):
        if path.stem in (names or PLOTS):
            print(save(draw(path.stem, read(path)), path.with_suffix(".png")), flush=True)
            drawn += 1
        elif not names and path.stem not in WITHOUT and not _OF_A_GPU_SESSION.fullmatch(path.stem):
            print(f"{path}: no picture draws these records (benchmarks/plots).", file=sys.stderr)
    if not drawn:
        print(f"no records of {', '.join(names or PLOTS)} below {results}.", file=sys.stderr)
        return 2
    return 0
