"""Every figure in the README stands in a committed record."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROVIDERS = ("fishkern", "one_by_one", "vmap_grad")


def records(path: str) -> list[dict]:
    return [json.loads(line) for line in (ROOT / path).read_text(encoding="utf-8").splitlines()]


def rows_of(section: str) -> list[list[str]]:
    """The cells of every table row of a section that begins with a figure."""
    text = re.search(rf"^## {section}$(.*?)(^## |\Z)", README, re.MULTILINE | re.DOTALL)[1]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if re.match(r"\| \d", line)]
    assert rows
    return rows


@pytest.mark.parametrize("row", rows_of("Speed"), ids=lambda row: f"T={row[0]}")
def test_speed_of_the_whole_pass(row):
    found = [r for r in records("benchmarks/results/cpu-2-cores/whole_pass.jsonl") if r["case"]["T"] == int(row[0])]
    seconds = {r["provider"]: r["seconds"]["median"] for r in found if r["quantity"] == "time"}
    peaks = {r["provider"]: r["peak_mib"] for r in found if r["quantity"] == "memory"}
    assert row[1:4] == [f"{seconds[name]:.1f} s" for name in PROVIDERS]
    assert row[4:7] == [f"{peaks[name]:.0f} MiB" for name in PROVIDERS]
    assert all(not r["dirty"] for r in found)
