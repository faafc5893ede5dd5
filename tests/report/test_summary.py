"""Summaries count what is there: against the same sums over all entries at once."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fishkern as fk
from fishkern.report import locate, summarise
from fishkern.report.tables import comparison_table, selection_table, summary_table


@pytest.fixture
def scores() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    names = ["embed.weight", *(f"layers.{n}.{m}.weight" for n in range(3) for m in ("up", "down")), "head.weight"]
    return {name: 10 ** torch.empty(5, 7).uniform_(-9, 3, generator=generator) for name in names}


def test_sums_and_top(scores):
    summary = summarise(scores, density=0.1)
    everything = torch.cat([value.flatten() for value in scores.values()]).double()
    top = everything.sort(descending=True).values[: len(everything) // 10]
    assert summary.whole.coordinates == len(everything)
    assert summary.whole.sum == pytest.approx(everything.sum().item())
    assert summary.whole.selected == len(top)
    assert summary.threshold == pytest.approx(top[-1].item())
    assert list(summary.layers) == ["embed", "layer 0", "layer 1", "layer 2", "head"]
    assert list(summary.modules) == ["embed", "up", "down", "head"]
    up = torch.stack([scores[f"layers.{n}.up.weight"] for n in range(3)])
    assert summary.modules["up"].sum == pytest.approx(up.sum().item())
    assert summary.modules["up"].selected == int((up >= top[-1].float()).sum())
    assert sum(part.sum for part in summary.layers.values()) == pytest.approx(summary.whole.sum)


@given(st.lists(st.just(0.0) | st.floats(2.0**-120, 2.0**100, width=32), min_size=1, max_size=50))
def test_every_entry_is_in_its_bin_or_zero(values):
    summary = summarise({"a.weight": torch.tensor(values)}, density=1.0)
    positive = torch.tensor([value for value in values if value > 0], dtype=torch.float64)
    assert summary.zeros == len(values) - len(positive)
    assert int(summary.counts.sum()) == len(positive)
    if len(positive):
        # a bin begins where the upper half of a float32 does, at most 1 % from its edge
        assert summary.edges[0] <= positive.min() * 1.01
        assert summary.edges[-1] >= positive.max() * 0.99
        assert summary.counts[0] > 0
        assert summary.counts[-1] > 0


def test_infinite_and_negative_entries_are_counted_beside_the_rest(scores):
    plain = summarise(scores, density=0.1)
    assert (plain.whole.infinite, plain.negative) == (0, 0)
    bad = {name: value.clone() for name, value in scores.items()}
    bad["layers.1.up.weight"] = torch.tensor([torch.inf, 2.0, -torch.inf, torch.inf, -3.0, 0.0])
    bad["layers.2.up.weight"] = torch.tensor([1e300, 1.0], dtype=torch.float64)  # no float32
    summary = summarise(bad, density=0.01)
    assert {name: part.infinite for name, part in summary.layers.items() if part.infinite} == {
        "layer 1": 3,
        "layer 2": 1,
    }
    assert summary.modules["up"].infinite == summary.whole.infinite == 4
    assert (summary.negative, summary.zeros) == (1, 1)
    assert summary.whole.coordinates == 6 + 2 + 6 * 35 == int(summary.counts.sum()) + 4 + 1 + 1
    up = scores["layers.0.up.weight"].double().sum().item() + 2.0 - 3.0 + 1.0
    assert summary.modules["up"].sum == pytest.approx(up)
    assert summary.modules["up"].mean == pytest.approx(up / (35 + 3 + 1))
    assert summary.threshold is None  # it lies among those that are infinite
    json.dumps(summary.to_dict(), allow_nan=False)
    headings = [str(column.header) for column in summary_table(summary).columns]
    assert headings[-1] == "infinite"
    assert "infinite" not in [str(column.header) for column in summary_table(plain).columns]


def test_a_file_is_the_same_as_memory(scores, tmp_path):
    statistics = fk.Statistics(scores, count=3)
    lazy = fk.Statistics.load(statistics.save(tmp_path / "fisher"), lazy=True)
    told = []
    assert summarise(lazy, 0.1, lambda *done: told.append(done)).to_dict() == summarise(scores, 0.1).to_dict()
    assert told[-1] == (280, 280)


def test_what_cannot_be_summarised_is_refused(scores):
    with pytest.raises(ValueError, match="density"):
        summarise(scores, density=0.0)
    with pytest.raises(ValueError, match="nothing to summarise"):
        summarise({"a.weight": torch.empty(0)})
    with pytest.raises(ValueError, match=r"layers.0.up.weight holds NaN at flat index 1, which has no rank"):
        summarise({"a.weight": torch.ones(2), "layers.0.up.weight": torch.tensor([1.0, torch.nan])})


def test_a_selection_is_located(scores):
    selection = fk.select(scores, fk.GlobalTopK(k=28))
    parts, summary = locate(selection), summarise(scores, density=0.1)
    assert {name: part.selected for name, part in parts.layers.items()} == {
        name: part.selected for name, part in summary.layers.items()
    }
    assert parts.whole.density == selection.density
    json.dumps(parts.to_dict())


def test_tables_have_a_row_for_each_part(scores):
    summary = summarise(scores)
    one, other = (fk.select(scores, rule) for rule in (fk.GlobalTopK(k=28), fk.Random(k=28)))
    parts = [locate(selection) for selection in (one, other, one & other)]
    for table in (summary_table(summary), selection_table(parts[0]), comparison_table(*parts)):
        assert list(table.columns[0].cells) == [*summary.layers, *summary.modules]
    assert sum(int(count) for count in list(comparison_table(*parts).columns[1].cells)[:5]) == 28
