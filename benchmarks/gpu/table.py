"""Records as a table: times, shares of the machine's own roofs, peaks of memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.engine.records import Record

ROOFS = "roofs"
TESTS = "tests"


def table(records: list[Record]) -> Iterator[str]:
    """Lay out times, rates as shares of the machine's own roofs, and peaks of memory.

    Args:
        records: Of one machine and revision.

    Yields:
        Lines.
    """
    roofs = {r["part"]: r for r in records if r["op"] == ROOFS}
    yield f"{'what':44} {'provider':26} {'ms':>10} {'TFLOP/s':>8} {'TB/s':>6} {'of roof':>8} {'MiB':>8} {'error':>8}"
    for record in (r for r in records if r["part"] != TESTS):
        what = f"{record['op']}/{record['part']}"[:44]
        line = f"{what:44} {record.get('provider', '')[:26]:26} "
        if "failed" in record:
            yield line + f"failed: {record['failed']}"
            continue
        if "ms" not in record:
            words = {"error": "error {}", "busy_us": "busy {} us", "idle_us": "idle {} us"}
            yield line + ", ".join(text.format(record[name]) for name, text in words.items() if name in record)
            continue
        rates = rate(record)
        share = share_of_roof(record, roofs)
        yield (
            f"{line}{record['ms']['median']:10.3f} {_cell(rates.get('tflops'), 8, 1)} {_cell(rates.get('tbps'), 6, 2)} "
            f"{_cell(share, 8, 2)} {_cell(record.get('peak_mib'), 8, 0)} {record.get('error', ''):>8}"
        )
    for record in (r for r in records if r["part"] == TESTS):
        yield f"{record['op'] + '/tests':44} {tests_in_words(record)}"
    if untested := sorted({f"{r['op']}/{r['part']}" for r in records if not r["tested"]}):
        yield f"Recorded without the tests (--tested): {', '.join(untested)}."


def tests_in_words(record: Record) -> str:
    """The outcome of the tests of a case."""
    if "stopped" in record:
        return f"RED: {record['stopped']}"
    counts = ", ".join(f"{record[what]} {what}" for what in ("passed", "failed", "skipped"))
    return f"{'RED: ' if record['red'] else ''}{counts} in {record['seconds']:.0f} s"


def rate(record: Record) -> dict[str, float]:
    """A record's flops and bytes over its median time, in TFLOP/s and TB/s."""
    seconds = record["ms"]["median"] / 1000
    rates = {"tflops": record.get("flops"), "tbps": record.get("bytes")}
    return {name: amount / seconds / 1e12 for name, amount in rates.items() if amount}


def share_of_roof(record: Record, roofs: dict[str, Record]) -> float | None:
    """The time that this machine's measured roofs allow over the time taken; ``None`` where they are not measured."""
    floors = []
    for amount, part in (("flops", f"gemm {record.get('dtype')}"), ("bytes", "copy")):
        if record.get(amount) and part in roofs and record["op"] != ROOFS:
            roof = rate(roofs[part])["tflops" if amount == "flops" else "tbps"]
            floors.append(record[amount] / roof / 1e12)
    return max(floors) / (record["ms"]["median"] / 1000) if floors else None


def _cell(value: Any, width: int, digits: int) -> str:
    return f"{value:{width}.{digits}f}" if value is not None else " " * width
