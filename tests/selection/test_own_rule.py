"""A rule that a user writes outside the package, by the page on it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import pytest
import torch

import fishkern as fk
from fishkern.files import StoredTensor


@dataclass(frozen=True)
class Above(fk.Rule):
    threshold: float = 0.5

    def choose(self, scores, total, backend=None):
        return {name: (score.flatten() > self.threshold).nonzero().flatten() for name, score in scores.items()}


@dataclass(frozen=True)
class OneOfRow(fk.Rule):
    """Asks for dimensions, and looks scores up by name, more than once."""

    def choose(self, scores, total, backend=None):
        return {
            name: scores[name].argmax(1) + torch.arange(len(scores[name])) * scores[name].shape[1]
            for name in scores
            if scores[name].ndim == 2
        }


class Plain(fk.Rule):
    """No dataclass."""

    def __init__(self, most):
        self.most = most
        self._cache = object()

    def choose(self, scores, total, backend=None):
        return {name: torch.arange(min(self.most, score.numel())) for name, score in scores.items()}


OWN = {"above": Above(0.3), "one of a row": OneOfRow(never="*.bias"), "plain": Plain(2)}


def statistics() -> fk.Statistics:
    torch.manual_seed(0)
    return fk.Statistics({"a.weight": torch.rand(6, 5), "a.bias": torch.rand(6), "b.weight": torch.rand(3, 4)}, count=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", OWN.values(), ids=OWN)
def test_on_lazily_loaded_statistics_it_selects_the_same(rule, dtype, tmp_path):
    path = statistics().save(tmp_path / "fisher", dtype=dtype)
    eager, lazy = (fk.Statistics.load(path, lazy=lazy) for lazy in (False, True))
    assert fk.select(lazy, rule) == fk.select(eager, rule)
    assert fk.select(dict(lazy.blocks), rule) == fk.select(eager, rule)


def test_scores_on_disk_are_read_when_they_are_looked_up(tmp_path, monkeypatch):
    read = []
    original = StoredTensor.read
    monkeypatch.setattr(StoredTensor, "read", lambda self, dtype=None: read.append(self.shape) or original(self, dtype))

    class Second(fk.Rule):
        def choose(self, scores, total, backend=None):
            assert len(scores) == 3
            assert "a.bias" in scores
            return {"b.weight": scores["b.weight"].flatten().argmax()[None]}

    lazy = fk.Statistics.load(statistics().save(tmp_path / "fisher"), lazy=True)
    assert fk.select(lazy, Second()).count == 1
    assert read == [(3, 4)]


def test_a_rule_that_streams_gets_what_lies_on_disk(tmp_path):
    class InPieces(fk.Rule):
        streams = True

        def choose(self, scores, total, backend=None):
            assert all(isinstance(score, StoredTensor) for score in scores.values())
            return {}

    lazy = fk.Statistics.load(statistics().save(tmp_path / "fisher"), lazy=True)
    assert fk.select(lazy, InPieces()).count == 0


def test_a_subclass_with_a_choice_of_its_own_does_not_inherit_that_it_streams(tmp_path):
    class Flattened(fk.GlobalTopK):
        def choose(self, scores, total, backend=None):
            return {name: score.flatten().topk(1).indices for name, score in scores.items()}

    class Renamed(fk.GlobalTopK):
        """Changes nothing of the choice."""

    lazy = fk.Statistics.load(statistics().save(tmp_path / "fisher"), lazy=True)
    assert Renamed.streams
    assert fk.select(lazy, Flattened(k=1)).count == 3


def test_the_header_says_what_a_rule_depends_on(tmp_path):
    for rule, settings in ((Above(0.3), {"threshold": 0.3}), (Plain(2), {"most": 2})):
        saved = fk.select(statistics(), rule).save(tmp_path / "selection")
        expected = {"name": type(rule).__name__, "always": [], "never": [], **settings}
        assert fk.Selection.load(saved).provenance["rule"] == expected


def test_what_a_dataclass_remembers_is_not_in_the_header():
    class Counted(Above):
        @cached_property
        def table(self):
            return torch.ones(3)

    decorated = dataclass(frozen=True)(Counted)(0.5)
    assert decorated.table.sum() == 3
    assert decorated.settings == {"name": "Counted", "always": [], "never": [], "threshold": 0.5}


def gives(indices, **patterns):
    class Own(fk.Rule):
        def choose(self, scores, total, backend=None):
            return indices

    return Own(**patterns)


REFUSED = {
    "nothing": (gives(None), TypeError, "Own.choose must give flat indices by name, a dict .*; got NoneType"),
    "pairs": (gives([("a.bias", torch.tensor([1]))]), TypeError, "by name, a dict of tensors .*; got list"),
    "a list": (gives({"a.bias": [0]}), TypeError, r"a tensor \[K\] for each name; for a.bias it gave list"),
    "a mask": (gives({"a.bias": torch.ones(6, 1) > 0}), TypeError, r"for a.bias it gave \(6, 1\)"),
    "a number": (gives({"a.bias": torch.tensor(1)}), TypeError, r"for a.bias it gave \(\)"),
    "what is never": (gives({"a.bias": torch.tensor([1])}, never="*.bias"), ValueError, "selects from a.bias, which"),
    "what is always": (gives({"a.bias": torch.tensor([1])}, always="*.bias"), ValueError, "not among the 2 scores"),
    "a stranger": (gives({"c": torch.tensor([1])}), ValueError, "selects from c, which is not among the 3 scores"),
    "too far": (gives({"a.bias": torch.tensor([6])}), ValueError, "a.bias has 6 coordinates, but an index is 6"),
}


@pytest.mark.parametrize("rule, error, message", REFUSED.values(), ids=REFUSED)
def test_refused_in_one_sentence(rule, error, message):
    with pytest.raises(error, match=message):
        fk.select(statistics(), rule)
