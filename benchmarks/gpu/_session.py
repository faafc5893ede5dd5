"""One call of ``python -m benchmarks gpu``: tests first, then the parts that are not recorded yet, a table last."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks.gpu import Part, Record
from benchmarks.provenance import gpu_state, machine, software

ROOT = Path(__file__).resolve().parents[2]
# The machine comes first, since records tell shares of its roofs, and what takes longest comes last.
FIRST, LAST = "roofs", "whole_pass"
WORKERS = 8


class RefusedError(ValueError):
    """What was asked for cannot be measured or recorded."""


def discover() -> dict[str, ModuleType]:
    """Find every file of measurements, in the order in which they run."""
    names = {path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("_")}
    order = sorted(names, key=lambda name: (name != FIRST, name == LAST, name))
    return {name: import_module(f"benchmarks.gpu.{name}") for name in order}


def tests_of(modules: dict[str, ModuleType]) -> list[str]:
    """The test files that must pass before anything is recorded."""
    found: dict[str, None] = {}
    for name, module in modules.items():
        own = [f"tests/ops/test_{name}.py", f"tests/kernels/test_{name}.py"]
        for path in getattr(module, "TESTS", [path for path in own if (ROOT / path).exists()]):
            found[path] = None
    return list(found)


def pass_on_device(tests: list[str]) -> bool:
    """Run tests on the device; those that need much of its memory too."""
    if not tests:
        return True
    options = ["-q", "-x", "-p", "no:cacheprovider", "-m", "gpu or not slow"]
    if torch.cuda.is_available() and find_spec("xdist"):
        options += ["-n", str(min(WORKERS, os.cpu_count() or 1))]  # most of the time goes into compiling, one each
    return subprocess.run([sys.executable, "-m", "pytest", *options, *tests], cwd=ROOT).returncode == 0


def recorded(folder: Path) -> list[Record]:
    """All records of parts in a folder; those of pytest's benchmarks have none."""
    lines = [line for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]
    return [record for record in map(json.loads, lines) if "part" in record]


def run(
    modules: dict[str, ModuleType],
    device: torch.device,
    results: Path,
    revision: str | None,
    only: Iterable[str] = (),
    seconds: float = 420,
    skip_tests: bool = False,
) -> int:
    """Measure what is asked for and not recorded yet.

    Args:
        modules: By name, as :func:`discover` gives them.
        device: What to measure on.
        results: Folder of all machines' records.
        revision: What the sources are, where git does not say it.
        only: Files, or parts as ``file/part``; all where none is named.
        seconds: No part is begun after so long, tests included; a later call takes it up.
        skip_tests: Whether the tests passed on this device just before; the records say that they were skipped.

    Returns:
        Exit status: 0 when all that was asked for is recorded, 1 when a test or a part failed, 3 when parts are left.

    Raises:
        RefusedError: ``only`` names what there is not, or the revision is unknown.
    """
    start = time.monotonic()
    origin = {**machine(), **software(revision), **gpu_state(), "tested": not skip_tests}
    if not origin["commit"]:
        raise RefusedError("there is no git here: name the revision with --revision TEXT.")
    print(f"{origin['machine']}: " + ", ".join(f"{key} {value}" for key, value in origin.items() if key != "machine"))
    wanted = dict(_chosen(modules, device, set(only)))
    chosen = {name: module for name, module in modules.items() if any(key[0] == name for key in wanted)}
    folder = results / origin["machine"]
    known = [r for r in recorded(folder) if r["commit"] == origin["commit"]] if not origin["dirty"] else []
    left = {key: part for key, part in wanted.items() if not any((r["op"], r["part"]) == key for r in known)}
    if left and not skip_tests and not pass_on_device(tests_of(chosen)):
        print("Nothing is recorded: tests fail on this device.", file=sys.stderr)
        return 1

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}.jsonl"
    new: list[Record] = []
    failed = []
    for key, part in left.items():
        if time.monotonic() - start > seconds:
            break
        try:
            found = [{"op": key[0], "part": key[1], **record, **origin} for record in part.run()]
        except Exception:  # the others need not wait for its repair
            traceback.print_exc()
            failed.append(key)
            continue
        stamp = datetime.now(UTC).isoformat(timespec="seconds")
        with path.open("a") as file:  # a part at once, so that an interrupted one is measured again
            file.writelines(json.dumps({**record, "time": stamp}) + "\n" for record in found)
        new += found
        print(f"  {'/'.join(key)}: {len(found)} records", flush=True)
    missing = [key for key in left if not any((r["op"], r["part"]) == key for r in new)]
    records = [r for r in known + new if (r["op"], r["part"]) in wanted]
    print("\n".join(table(records)))
    if missing:
        print(f"Left for the next call: {', '.join('/'.join(key) for key in missing)}.")
    if failed:
        print(f"Failed, see above: {', '.join('/'.join(key) for key in failed)}.", file=sys.stderr)
        return 1
    return 3 if missing else 0


def _chosen(
    modules: dict[str, ModuleType], device: torch.device, only: set[str]
) -> Iterator[tuple[tuple[str, str], Part]]:
    every = {(name, part.name): part for name, module in modules.items() for part in module.parts(device)}
    unknown = only - {"/".join(key) for key in every} - modules.keys()
    if unknown:
        raise RefusedError(f"there is nothing called {', '.join(sorted(unknown))}; there are {', '.join(modules)}.")
    for key, part in every.items():
        if not only or key[0] in only or "/".join(key) in only:
            yield key, part


def table(records: list[Record]) -> Iterator[str]:
    """Lay out times, rates as shares of the machine's own roofs, and peaks of memory.

    Args:
        records: Of one machine and revision.

    Yields:
        Lines.
    """
    roofs = {r["part"]: r for r in records if r["op"] == FIRST}
    yield f"{'what':44} {'provider':26} {'ms':>10} {'TFLOP/s':>8} {'TB/s':>6} {'of roof':>8} {'MiB':>8} {'error':>8}"
    for record in records:
        what = f"{record['op']}/{record['part']}"[:44]
        line = f"{what:44} {record.get('provider', '')[:26]:26} "
        if "ms" not in record:
            yield line + f"{'failed: ' + record['failed'] if 'failed' in record else 'not measured'}"
            continue
        rates = rate(record)
        share = share_of_roof(record, roofs)
        yield (
            f"{line}{record['ms']['median']:10.3f} {_cell(rates.get('tflops'), 8, 1)} {_cell(rates.get('tbps'), 6, 2)} "
            f"{_cell(share, 8, 2)} {_cell(record.get('peak_mib'), 8, 0)} {record.get('error', ''):>8}"
        )
    if untested := sorted({f"{r['op']}/{r['part']}" for r in records if not r["tested"]}):
        yield f"Recorded without the tests (--tested): {', '.join(untested)}."


def rate(record: Record) -> dict[str, float]:
    """What a record's flops and bytes over its median come to, TFLOP/s and TB/s."""
    seconds = record["ms"]["median"] / 1000
    rates = {"tflops": record.get("flops"), "tbps": record.get("bytes")}
    return {name: amount / seconds / 1e12 for name, amount in rates.items() if amount}


def share_of_roof(record: Record, roofs: dict[str, Record]) -> float | None:
    """The time that this machine's measured roofs allow over the time taken; ``None`` where they are not measured."""
    floors = []
    for amount, part in (("flops", f"gemm {record.get('dtype')}"), ("bytes", "copy")):
        if record.get(amount) and part in roofs and record["op"] != FIRST:
            roof = rate(roofs[part])["tflops" if amount == "flops" else "tbps"]
            floors.append(record[amount] / roof / 1e12)
    return max(floors) / (record["ms"]["median"] / 1000) if floors else None


def _cell(value: Any, width: int, digits: int) -> str:
    return f"{value:{width}.{digits}f}" if value is not None else " " * width
