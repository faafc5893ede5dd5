"""Ranks by importance: the sum is the budget exactly, within bounds, and the order is that of the importances."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import fishkern as fk

NAMES = [f"layers.{number}.weight" for number in range(40)]
positive = st.floats(1e-12, 1e12)
importances_of_any_kind = st.lists(
    st.one_of(positive, st.just(0.0), st.sampled_from([1.0, 2.0])), min_size=1, max_size=40
)


@st.composite
def problems(draw: st.DrawFn) -> tuple[dict[str, float], fk.RankRule, dict[str, int]]:
    """Importances, a rule with a budget that its bounds allow, and the sizes of some of the matrices."""
    values = draw(importances_of_any_kind)
    assume(any(values))
    importances = dict(zip(NAMES, values, strict=False))
    least = draw(st.integers(1, 4))
    most = draw(st.integers(least, 80))
    largest = {name: draw(st.integers(least, 100)) for name in importances if draw(st.booleans())}
    room = [min(most, largest.get(name, most)) for name in importances]
    total = draw(st.integers(least * len(values), sum(room)))
    kind = draw(st.sampled_from([fk.InverseImportance, fk.ProportionalImportance]))
    return importances, kind(average=total / len(values), least=least, most=most), largest


def shares_by_bisection(importances: dict[str, float], rule: fk.RankRule) -> list[float]:
    """Bisect the level of clip(level * weight, least, most), in float64: an oracle for positive importances."""
    values = np.array(list(importances.values()))
    weights = 1 / values if isinstance(rule, fk.InverseImportance) else values
    weights = weights / weights.max()
    total = rule.average * len(values)
    low, high = -50.0, 100.0  # exponents of 2: importances differ by up to 1e24, times a rank
    for _ in range(200):
        middle = (low + high) / 2
        if np.clip(2**middle * weights, rule.least, rule.most).sum() < total:
            low = middle
        else:
            high = middle
    return np.clip(2**high * weights, rule.least, rule.most).tolist()


@given(problems())
def test_the_sum_is_the_budget_and_the_bounds_hold(problem):
    importances, rule, largest = problem
    ranks = fk.allocate_ranks(importances, rule, largest=largest)
    assert list(ranks) == list(importances)
    assert sum(ranks.values()) == round(rule.average * len(importances))
    assert all(rule.least <= rank <= min(rule.most, largest.get(name, rule.most)) for name, rank in ranks.items())


@given(problems())
def test_ranks_are_in_the_order_of_the_importances(problem):
    importances, rule, largest = problem
    ranks = fk.allocate_ranks(importances, rule, largest=largest)
    sign = -1 if isinstance(rule, fk.InverseImportance) else 1
    for one in importances:
        for other in importances:
            if largest.get(one) != largest.get(other):
                continue
            if sign * importances[one] > sign * importances[other]:
                assert ranks[one] >= ranks[other]
            elif importances[one] == importances[other]:
                assert abs(ranks[one] - ranks[other]) <= 1


@given(problems(), st.randoms())
def test_the_order_of_the_matrices_does_not_matter(problem, random):
    importances, rule, largest = problem
    shuffled = list(importances)
    random.shuffle(shuffled)
    again = fk.allocate_ranks({name: importances[name] for name in shuffled}, rule, largest=largest)
    assert again == fk.allocate_ranks(importances, rule, largest=largest)
    assert list(again) == shuffled


@given(st.lists(positive, min_size=1, max_size=40, unique=True), st.randoms(), st.integers(1, 64))
def test_permuting_the_importances_permutes_the_ranks(values, random, average):
    """Up to the one rank that is dealt out by name among equal remainders."""
    shuffled = random.sample(values, len(values))
    for rule in (fk.InverseImportance(average), fk.ProportionalImportance(average)):
        ranks, permuted = (
            dict(zip(some, fk.allocate_ranks(dict(zip(NAMES, some, strict=False)), rule).values(), strict=True))
            for some in (values, shuffled)
        )
        assert all(abs(ranks[value] - permuted[value]) <= 1 for value in values)


def test_permuting_importances_without_equal_remainders():
    values = np.random.default_rng(0).lognormal(size=40).tolist()
    for rule in (fk.InverseImportance(20), fk.ProportionalImportance(20)):
        ranks = list(fk.allocate_ranks(dict(zip(NAMES, values, strict=True)), rule).values())
        permuted = list(fk.allocate_ranks(dict(zip(NAMES, values[::-1], strict=True)), rule).values())
        assert permuted == ranks[::-1]
        assert len(set(ranks)) > 10


@given(problems(), st.integers(-30, 30))
def test_the_scale_of_the_importances_does_not_matter(problem, exponent):
    importances, rule, largest = problem
    scaled = {name: value * 2.0**exponent for name, value in importances.items()}
    assert fk.allocate_ranks(scaled, rule, largest=largest) == fk.allocate_ranks(importances, rule, largest=largest)


@given(problems())
def test_no_rank_is_a_whole_rank_from_its_share(problem):
    importances, rule, _ = problem
    assume(all(importances.values()))
    assume(rule.average * len(importances) <= rule.most * len(importances))
    ranks = fk.allocate_ranks(importances, rule)
    shares = shares_by_bisection(importances, rule)
    for rank, share in zip(ranks.values(), shares, strict=True):
        assert abs(rank - share) < 1 + 1e-6


def test_shares_worked_out_by_hand():
    importances = {"a": 1.0, "b": 2.0, "c": 4.0}
    # 1/1 : 1/2 : 1/4 of 21 is 12, 6, 3; of 22 it is 12.57, 6.29, 3.14, and the largest remainder is that of a
    assert fk.allocate_ranks(importances, fk.InverseImportance(7)) == {"a": 12, "b": 6, "c": 3}
    assert fk.allocate_ranks(importances, fk.InverseImportance(22 / 3)) == {"a": 13, "b": 6, "c": 3}
    assert fk.allocate_ranks(importances, fk.ProportionalImportance(7)) == {"a": 3, "b": 6, "c": 12}
    # a is bounded by 8, and the other 13 are dealt out as 2 : 1, which is 8.67 and 4.33; then b is bounded as well
    assert fk.allocate_ranks(importances, fk.InverseImportance(7, most=8)) == {"a": 8, "b": 8, "c": 5}
    assert fk.allocate_ranks(importances, fk.InverseImportance(7, least=5)) == {"a": 11, "b": 5, "c": 5}
    assert fk.allocate_ranks(importances, fk.InverseImportance(7), largest={"a": 2}) == {"a": 2, "b": 13, "c": 6}


def test_remainders_that_are_equal_go_to_the_name_that_comes_first():
    equal = {"b": 3.0, "c": 3.0, "a": 3.0}
    for kind in (fk.InverseImportance, fk.ProportionalImportance):
        assert fk.allocate_ranks(equal, kind(4 / 3)) == {"b": 1, "c": 1, "a": 2}


def test_importance_zero():
    importances = {"dead": 0.0, "a": 1.0, "b": 3.0}
    assert fk.allocate_ranks(importances, fk.InverseImportance(6, most=10)) == {"dead": 10, "a": 6, "b": 2}
    assert fk.allocate_ranks(importances, fk.ProportionalImportance(7)) == {"dead": 1, "a": 5, "b": 15}
    # the limits of ever smaller importances, where the bounds leave nothing else
    assert fk.allocate_ranks({"x": 0, "y": 0, "a": 1.0}, fk.InverseImportance(6, most=10)) == {"x": 9, "y": 8, "a": 1}
    assert fk.allocate_ranks(importances, fk.ProportionalImportance(6, most=7)) == {"dead": 4, "a": 7, "b": 7}


def test_importances_whose_inverse_overflows():
    importances = {"a": 1e-310, "b": 2e-310, "c": 4e-310}
    assert fk.allocate_ranks(importances, fk.InverseImportance(7)) == {"a": 12, "b": 6, "c": 3}


def test_the_published_formula_where_no_bound_binds():
    """FARSS: r_i = avg N (1 / a_i) / sum_j (1 / a_j), a_i the share of importance; with another rounding."""
    importances = dict(zip(NAMES, np.random.default_rng(0).lognormal(size=14), strict=False))
    values = np.array(list(importances.values()))
    a = values / values.sum()
    published = 16 * 14 * (1 / a) / (1 / a).sum()
    ranks = np.array(list(fk.allocate_ranks(importances, fk.InverseImportance(16, most=None)).values()))
    assert published.min() > 1
    assert np.abs(ranks - published).max() < 1
    assert ranks.sum() == 16 * 14


def test_uniform_ranks():
    importances = {"a": 1.0, "b": 0.0}
    assert fk.allocate_ranks(importances, fk.UniformRank(8)) == {"a": 8, "b": 8}
    with pytest.raises(ValueError, match=r"rank 8 is more than 1 of 2 matrices can have \(b \(4\)\): take a smaller"):
        fk.allocate_ranks(importances, fk.UniformRank(8), largest={"a": 8, "b": 4})


def test_an_average_may_be_a_fraction():
    importances = dict.fromkeys(NAMES[:3], 1.0)
    assert sum(fk.allocate_ranks(importances, fk.InverseImportance(50 / 3)).values()) == 50
    assert sum(fk.allocate_ranks(dict.fromkeys(NAMES[:10], 1.0), fk.InverseImportance(5.1)).values()) == 51
    message = "average=16.5 of 3 matrices is 49.5 ranks, which is no whole number: take average=49/3 or 50/3"
    with pytest.raises(ValueError, match=message):
        fk.allocate_ranks(importances, fk.InverseImportance(16.5))
    assert sum(fk.allocate_ranks(importances, fk.InverseImportance(49 / 3)).values()) == 49


@pytest.mark.parametrize("rule", [fk.UniformRank(4), fk.InverseImportance(4), fk.ProportionalImportance(4)])
@pytest.mark.parametrize(
    ("importances", "match"),
    [
        ({}, "the mapping is empty"),
        ({"a": 1.0, "b": -1.0}, r"finite and not negative; those of b \(-1\) are not"),
        ({"a": math.nan, "b": math.inf}, r"those of a \(nan\), b \(inf\) are not"),
        ({"a": 0.0, "b": 0.0}, r"all importances are zero \(a, b\)"),
        ({"a": 1.0, "b": None}, r"1 of 2 matrices have no importance \(b\): estimate with DirectionEnergy\(importance"),
    ],
)
def test_importances_that_rank_nothing(rule, importances, match):
    with pytest.raises(ValueError, match=match):
        fk.allocate_ranks(importances, rule)


def test_what_is_no_number_and_no_rule():
    with pytest.raises(TypeError, match="importances are numbers, that of a is 'high'"):
        fk.allocate_ranks({"a": "high"}, fk.UniformRank(4))
    with pytest.raises(TypeError, match="rule must be a rule for ranks such as UniformRank"):
        fk.allocate_ranks({"a": 1.0}, 16)
    with pytest.raises(TypeError, match="importances are a mapping from names to numbers, got list"):
        fk.allocate_ranks([1.0, 2.0], fk.UniformRank(4))
    numbers = {"a": torch.tensor(1.0), "b": np.float32(3)}
    assert fk.allocate_ranks(numbers, fk.InverseImportance(6)) == {"a": 9, "b": 3}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"average": 65}, "average=65 must be between least=1 and most=64"),
        ({"average": 2, "least": 3}, "average=2 must be between least=3 and most=64"),
        ({"average": math.nan}, "average=nan must be between"),
        ({"average": 3, "least": 0}, "least must be at least 1, got 0"),
        ({"average": 3, "least": 5, "most": 4}, "most=4 is below least=5"),
    ],
)
def test_bounds_that_no_ranks_meet(options, match):
    with pytest.raises(ValueError, match=match):
        fk.InverseImportance(**options)


def test_sizes_that_do_not_allow_the_budget():
    importances, sizes = {"a": 1.0, "b": 2.0}, {"a": 4, "b": 8}
    message = (
        "average=10 of 2 matrices is 20 ranks, and they can have 12 together, because of most=64 and of their sizes: "
        "take an average of at most 6"
    )
    with pytest.raises(ValueError, match=message):
        fk.allocate_ranks(importances, fk.InverseImportance(10), largest=sizes)
    assert fk.allocate_ranks(importances, fk.InverseImportance(6), largest=sizes) == sizes
    with pytest.raises(ValueError, match="take an average of at most 13/2"):
        fk.allocate_ranks(importances, fk.InverseImportance(10), largest={"a": 4, "b": 9})
    with pytest.raises(ValueError, match=r"least=5 is more than 1 of 2 matrices can have \(a \(4\)\)"):
        fk.allocate_ranks(importances, fk.InverseImportance(6, least=5), largest=sizes)
    with pytest.raises(ValueError, match="largest= has c, and importances have no such name"):
        fk.allocate_ranks(importances, fk.InverseImportance(6), largest={"c": 3})
    with pytest.raises(ValueError, match=r"largest\['a'\] must be at least 1, got 0"):
        fk.allocate_ranks(importances, fk.InverseImportance(6), largest={"a": 0})


def test_a_rule_of_ones_own():
    class Halves(fk.RankRule):
        def ranks(self, importances, largest):
            order = sorted(importances, key=importances.get)
            return {name: 8 if place < len(order) / 2 else 2 for place, name in enumerate(order)}

    assert fk.allocate_ranks({"a": 3.0, "b": 1.0}, Halves()) == {"a": 2, "b": 8}
    assert Halves().settings == {"name": "Halves"}
    Halves.ranks = lambda self, importances, largest: {"a": 2}
    with pytest.raises(ValueError, match=r"Halves.ranks must give a rank for each matrix: those of b"):
        fk.allocate_ranks({"a": 3.0, "b": 1.0}, Halves())
    Halves.ranks = lambda self, importances, largest: {"a": 2, "b": 0}
    with pytest.raises(ValueError, match="the rank of b must be at least 1, got 0"):
        fk.allocate_ranks({"a": 3.0, "b": 1.0}, Halves())


def test_settings_make_the_rule_again():
    rules = [fk.UniformRank(4), fk.InverseImportance(Fraction(9, 2), least=2), fk.ProportionalImportance(3, most=9)]
    for rule in rules:
        settings = rule.settings
        assert settings.pop("name") == type(rule).__name__
        assert type(rule)(**settings) == rule
        assert all(value is None or type(value) in (int, float) for value in settings.values())
