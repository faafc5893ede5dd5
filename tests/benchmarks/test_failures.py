"""The table of failures: results are judged wrong, incomplete or right; rows that need no library are run."""

from __future__ import annotations

import json
import re

import pytest
import torch

pytest.importorskip("transformers")
from benchmarks.rivals import one_by_one
from benchmarks.studies import failures
from benchmarks.subjects.failing import TOKENS, llama


def without(name: str):
    def rival(model, batches):
        return {key: values for key, values in one_by_one(model, batches).items() if key != name}

    return rival


def doubled(model, batches):
    return {name: 2 * values for name, values in one_by_one(model, batches).items()}


def refuses(model, batches):
    raise NotImplementedError("no such layer\nand more")


@pytest.mark.parametrize(
    ("rival", "outcome", "came"),
    [
        (one_by_one, "right", "largest error"),
        (without("lm_head.weight"), "incomplete", r"1 of 21 parameters missing \(Linear\), \d+% of entries there"),
        (doubled, "wrong", "is 100% off"),
        (refuses, "raises", "^NotImplementedError: no such layer$"),
    ],
    ids=["right", "incomplete", "wrong", "raises"],
)
def test_outcomes(rival, outcome, came):
    row = failures.against(rival, llama, TOKENS)
    assert row["outcome"] == outcome
    assert re.search(came, row["came"])
    assert row["fishkern outcome"] == "right"
    assert row["fishkern error"] < 1e-5


# Practices that need only torch, with their outcomes; fishkern must be right on the same.
OUTCOMES = {
    "square of the batch's gradient": "wrong",
    "square of each position, keys": "wrong",
    "sums of squares in bfloat16": "wrong",
    "squares in float16": "wrong",
    "scores >= threshold, with ties": "wrong",
    "masked gradients under AdamW with weight decay": "wrong",
}


@pytest.mark.parametrize("what", OUTCOMES)
def test_practices_fail_and_fishkern_does_not(what):
    (failure,) = (failure for failure in failures.FAILURES if failure.what == what)
    record = failure.record()
    assert record["outcome"] == OUTCOMES[what]
    assert record["fishkern outcome"] == "right"
    assert record["version"] == torch.__version__


def test_rows_are_told_apart_and_need_their_library(monkeypatch):
    rows = [(failure.rival, failure.what) for failure in failures.FAILURES]
    assert len(set(rows)) == len(rows)
    monkeypatch.setattr(type(failures.PASSES["opacus"]), "version", property(lambda rival: None))
    record = next(failure for failure in failures.FAILURES if failure.rival == "opacus").record()
    assert record["outcome"] == "left out"
    assert record["left out"] == "opacus is not installed"


def test_one_line_for_each_and_a_table(tmp_path, capsys):
    assert failures.main(["--results", str(tmp_path), "--only", "ties"]) == 0
    out = capsys.readouterr().out.splitlines()
    (path,) = tmp_path.glob("*/failures.jsonl")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["what"] for record in records] == ["scores >= threshold, with ties", "ties"]
    assert len(out) == 2 + len(records)
    assert "1000 entries for k = 100 | right: 100 entries |" in out[2]
    assert all({"machine", "torch", "commit", "time"} <= record.keys() for record in records)
    with pytest.raises(SystemExit):
        failures.main(["--only", "no such row"])
