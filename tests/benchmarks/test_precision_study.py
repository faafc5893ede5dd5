"""The study of precision: what it measures on a tiny classifier, and how many examples a curve needs."""

from __future__ import annotations

import math
from statistics import NormalDist
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fishkern as fk
from benchmarks.studies.precision import Setting, measure, needed, table

SETTING = Setting(first=20, sets=2, sizes=(32, 64), others=80, batch_size=4, density=0.2, goal=0.3)


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 60), nn.Tanh(), nn.Linear(60, 3))

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> SimpleNamespace:
        logits = self.layers(inputs)
        return SimpleNamespace(logits=logits, loss=nn.functional.cross_entropy(logits, labels))


def batches(rows: range, size: int):
    generator = torch.Generator().manual_seed(1)
    inputs, labels = torch.randn(300, 6, generator=generator), torch.randint(3, (300,), generator=generator)
    for start in range(rows.start, rows.stop, size):
        part = slice(start, min(start + size, rows.stop))
        yield {"inputs": inputs[part], "labels": labels[part]}


def test_promised_and_measured(monkeypatch):
    torch.manual_seed(0)
    estimate = fk.estimate
    monkeypatch.setattr(fk, "estimate", lambda *given, **options: estimate(*given, likelihood=losses, **options))
    loaded = SimpleNamespace(model=Classifier(), batches=batches, parameters=None)
    read = []
    loaded.batches = lambda rows, size: read.append(rows) or batches(rows, size)
    records = list(measure(loaded, SETTING, "tiny"))
    assert read[:4] == [range(20, 100), range(100, 132), range(100, 164), range(100, 164)]
    assert read[4:] == [range(164, 196), range(164, 228), range(164, 228)]
    assert SETTING.end == 228
    overlaps = [record for record in records if record["quantity"] == "overlap"]
    stops = [record for record in records if record["quantity"] == "until"]
    assert [(record["set"], record["examples"]) for record in overlaps] == [(0, 32), (0, 64), (1, 32), (1, 64)]
    assert all(0 < record["measured"] < 1 and 0 < record["promised"] < 1 for record in overlaps)
    assert len({record["measured"] for record in overlaps}) > 1
    assert all(32 <= record["stopped"] <= record["of"] == 64 for record in stops)
    assert len(list(table([{"subject": "tiny", **record} for record in records], SETTING))) == 4


def losses(model, batch):
    return nn.functional.cross_entropy(model.layers(batch["inputs"]), batch["labels"], reduction="none")


@pytest.mark.parametrize("goal", [0.5, 0.7, 0.9])
def test_the_examples_that_a_curve_needs(goal):
    """Where errors shrink with the square root, the answer is known, between the sizes and beyond them."""
    noise, setting = 4.0, Setting(sizes=(32, 64, 128), others=500, goal=goal)
    normal = NormalDist()
    shares = {n: 2 * normal.cdf(-noise * math.sqrt(1 / n + 1 / 500)) for n in setting.sizes}
    records = [{"examples": n, "measured": share} for n, share in shares.items()]
    assert needed(records, setting) == pytest.approx((noise / normal.inv_cdf(goal / 2)) ** 2)
