"""Every figure in the README stands in a committed record."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROVIDERS = ("fishkern", "one_by_one", "vmap_grad")


def records(name: str) -> list[dict]:
    path = ROOT / "benchmarks" / "results" / "cpu-2-cores" / f"{name}.jsonl"
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert all(record["dirty"] is False for record in found)
    return found


def rows_of(section: str) -> list[list[str]]:
    """The cells of every table row of a subsection that begins with a figure."""
    text = re.search(rf"^### {section}$(.*?)(^##|\Z)", README, re.MULTILINE | re.DOTALL)[1]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if re.match(r"\| \d", line)]
    assert rows
    return rows


@pytest.mark.parametrize("row", rows_of("Whole pass"), ids=lambda row: f"T={row[0]}")
def test_speed_of_the_whole_pass(row):
    found = [r for r in records("whole_pass") if r["case"]["T"] == int(row[0])]
    seconds = {r["provider"]: r["seconds"]["median"] for r in found if r["quantity"] == "time"}
    peaks = {r["provider"]: r["peak_mib"] for r in found if r["quantity"] == "memory"}
    assert row[1:4] == [f"{seconds[name]:.1f} s" for name in PROVIDERS]
    assert row[4:7] == [f"{peaks[name]:.0f} MiB" for name in PROVIDERS]


@pytest.mark.parametrize("row", rows_of("Exact top-k"), ids=lambda row: row[0])
def test_exact_topk(row):
    n, _, *_, where = row[0].split()
    found = [r for r in records("streaming_topk") if (r["case"]["n"], r["where"]) == (float(n), where)]
    assert all(r["case"]["density"] == 0.005 and 20 <= r["case"]["blocks"] <= 200 for r in found)
    seconds = {r["provider"]: r["seconds"]["median"] for r in found if "seconds" in r}
    if where == "memory":
        providers = ("fishkern", "sampled_threshold", "kthvalue", "cat_topk")
        left_out = {r["provider"]: " ".join(r["left out"].split()[:3]) for r in found if "left out" in r}
        expected = [left_out.get(name) or f"{seconds[name]:.2f} s" for name in providers]
    else:
        (memory,) = (r for r in found if r["quantity"] == "memory")
        expected = [f"{seconds[name]:.1f} s" for name in ("fishkern", "one_cold_read")]
        expected += [f"{memory['peak_mib'] - memory['indices_mib']:.0f} MiB"]
    assert row[1:] == expected


@pytest.mark.parametrize("row", rows_of("Masked steps"), ids=lambda row: row[0])
def test_masked_steps(row):
    case = {"model": "llama", "density": round(float(row[0].rstrip("%")) / 100, 6)}
    found = [r for r in records("masked_step") if r["case"] == case]
    times = {r["provider"]: 1000 * r["seconds"]["median"] for r in found if r["quantity"] == "time"}
    peaks = {r["provider"]: r["peak_mib"] for r in found if r["quantity"] == "memory"}
    providers = ("fishkern", "six_lines", "masked_fused")
    assert row[1:] == [f"{times[p]:.1f} ms" for p in providers] + [f"{peaks[p]:.0f} MiB" for p in providers]


def test_selection_of_fish_tuning():
    (record,) = records("fish_tuning")
    ours, loop = record["seconds"].values()
    said = f"takes {ours:.1f} s against the loop's {loop:.1f} s, and selects the same entries"
    assert said in " ".join(README.split())
    assert record["overlap"] == 1.0
