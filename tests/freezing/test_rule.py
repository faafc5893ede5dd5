"""What stops: strictly below the threshold, within the limits, whatever the order."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fishkern.freezing import FreezeRule
from fishkern.freezing.rule import type_of

FREE = dict(most=None, least=0)


def keyed(scores: list[float]) -> dict[tuple[str, int], float]:
    """Scores of slices of different parameters, each of a type of its own."""
    return {(f"{chr(ord('a') + number)}.weight", 0): score for number, score in enumerate(scores)}


def chosen(rule: FreezeRule, scores: dict, sizes: dict | None = None, total: int | None = None) -> list[str]:
    sizes = sizes or dict.fromkeys(scores, 10)
    stopped = rule.choose(scores, sizes, sum(sizes.values()) if total is None else total)
    return sorted(name[0] if number == 0 else f"{name[0]}{number}" for name, number in stopped)


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=26), st.floats(-2, 2))
def test_threshold(values, margin):
    """As mean + margin * population standard deviation in high precision, away from ties with it."""
    scores = keyed(values)
    limit = statistics.fmean(values) + margin * statistics.pstdev(values)
    expected = {name[0] for (name, _), score in scores.items() if score < limit}
    close = {name[0] for (name, _), score in scores.items() if math.isclose(score, limit, rel_tol=1e-9, abs_tol=1e-30)}
    assert set(chosen(FreezeRule(margin, **FREE), scores)) - close == expected - close


def test_strictly_below():
    """Of two scores the larger one is exactly mean + deviation, which rounding must not put above it."""
    for pair in ([0.0, 1.0], [0.1, 0.3], [0.1, 0.7], [1e-9, 3e-9]):
        assert chosen(FreezeRule(1.0, **FREE), keyed(pair)) == ["a"]
    assert chosen(FreezeRule(0.0, **FREE), keyed([1.0, 2.0, 3.0])) == ["a"]  # 2 is the mean
    assert chosen(FreezeRule(-1.0, **FREE), keyed([0.0, 1.0])) == []


@given(st.floats(0, 1), st.integers(1, 26), st.floats(-3, 3))
def test_equal_scores_stop_nothing(score, count, margin):
    assert chosen(FreezeRule(margin, **FREE), keyed([score] * count)) == []


def test_nothing_to_choose_from():
    assert FreezeRule().choose({}, {}, 10) == frozenset()


def test_most_takes_the_lowest_first():
    scores = keyed([0.3, 0.1, 0.2, 9.0])
    rule = FreezeRule(0.0, most=0.5, least=0, size_aware=False)
    assert chosen(rule, scores) == ["b", "c"]
    assert chosen(rule, scores, total=80) == ["a", "b", "c"]  # of the whole pool, what stopped before included
    assert chosen(FreezeRule(0.0, most=0.49, least=0), scores) == ["b"]


def test_the_next_that_would_exceed_most_ends_it():
    """c would fit beside b, and waits for a, whose score is lower."""
    scores = keyed([0.2, 0.1, 0.3, 9.0])
    sizes = dict(zip(scores, [30, 30, 10, 30], strict=True))
    assert chosen(FreezeRule(0.0, most=0.5, least=0, size_aware=False), scores, sizes) == ["b"]


def test_what_is_larger_than_most_holds_nothing_up():
    scores = keyed([0.1, 0.2, 0.3, 9.0])
    sizes = dict(zip(scores, [60, 10, 10, 20], strict=True))
    assert chosen(FreezeRule(0.0, most=0.25, least=0), scores, sizes) == ["b", "c"]


def test_most_is_read_as_a_decimal():
    """0.29 of 100 entries is 29, which 0.29 * 100 falls short of."""
    scores = keyed([0.1, 9.0])
    sizes = dict(zip(scores, [29, 71], strict=True))
    assert chosen(FreezeRule(0.0, most=0.29, least=0), scores, sizes) == ["a"]


@given(st.randoms(use_true_random=False), st.sampled_from([0.1, 0.25, 0.5, 1.0]), st.booleans())
def test_most_is_kept(generator, most, size_aware):
    scores = keyed([generator.random() for _ in range(20)])
    sizes = {key: generator.randint(1, 50) for key in scores}
    stopped = FreezeRule(1.0, most=most, size_aware=size_aware).choose(scores, sizes, sum(sizes.values()))
    assert sum(sizes[key] for key in stopped) <= most * sum(sizes.values())


LAYERED = {(f"layers.{layer}.mlp.weight", n): 0.1 * layer + 0.01 * n for layer in range(3) for n in range(2)}
LAYERED |= {("head.weight", 0): 0.05, ("head.weight", 1): 99.0}


@pytest.mark.parametrize("least", [0, 1, 2, 4, 6, 9])
def test_least_of_each_type(least):
    """Every layer's MLP is one type: those of the highest scores train on."""
    stopped = FreezeRule(0.0, most=None, least=least).choose(LAYERED, dict.fromkeys(LAYERED, 1), 8)
    of_type = sorted((key for key in LAYERED if "mlp" in key[0]), key=LAYERED.get)
    assert {key for key in stopped if "mlp" in key[0]} == set(of_type[: max(0, len(of_type) - least)])
    assert (("head.weight", 0) in stopped) == (least < 2)


def test_types():
    assert type_of("model.layers.13.mlp.0.weight") == type_of("model.layers.2.mlp.1.weight")
    assert type_of("0.weight") == type_of("12.weight") == "*.weight"
    assert type_of("layer1.conv2.weight") != type_of("layer2.conv2.weight")  # numbers inside a word are part of it


def test_spare_never_stops_and_counts():
    """The spared score of 9 is what puts the others below the mean."""
    scores = keyed([0.1, 0.2, 9.0, 0.0])
    assert chosen(FreezeRule(0.0, spare="d.*", **FREE), scores) == ["a", "b"]
    assert chosen(FreezeRule(0.0, spare=("a.*", "b.*"), **FREE), scores) == ["d"]
    with pytest.raises(ValueError, match=r"spare='head.\*' matches no name"):
        chosen(FreezeRule(spare="head.*"), scores)


def test_size_only_decides_who_goes_first():
    """Equal noise gives a slice of 100 times the size a tenth of the score."""
    scores = keyed([0.011, 0.1, 9.0])
    sizes = dict(zip(scores, [1000, 10, 1000], strict=True))
    for size_aware in (True, False):
        rule = FreezeRule(0.0, size_aware=size_aware, **FREE)
        assert chosen(rule, scores, sizes) == ["a", "b"]
    half = dict(margin=0.0, most=0.4976, least=0)  # 1000 of 2010 entries
    assert chosen(FreezeRule(**half), scores, sizes) == ["b"]
    assert chosen(FreezeRule(**half, size_aware=False), scores, sizes) == ["a"]


@pytest.mark.parametrize("size_aware", [True, False])
def test_order_of_the_keys_makes_no_difference(size_aware):
    generator = random.Random(0)
    for _ in range(50):
        scores = {(f"layers.{n % 4}.{n % 3}", n): generator.choice([0.1, 0.2, 0.7, 0.9]) for n in range(12)}
        sizes = {key: generator.randint(1, 9) for key in scores}
        rule = FreezeRule(0.5, most=0.4, least=1, size_aware=size_aware)
        expected = rule.choose(scores, sizes, sum(sizes.values()))
        shuffled = dict(generator.sample(sorted(scores.items()), len(scores)))
        assert rule.choose(shuffled, sizes, sum(sizes.values())) == expected


def test_settings_are_plain():
    rule = FreezeRule(spare=("*.bias", "head.*"))
    plain = {"margin": 1.0, "most": 0.25, "least": 1, "spare": ["*.bias", "head.*"], "size_aware": True}
    assert rule.settings == plain
    assert FreezeRule(**rule.settings) == rule


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(margin=math.inf), "margin must be finite"),
        (dict(most=0), r"most must be above 0 and at most 1, got 0.0"),
        (dict(most=25), "most must be above 0"),
        (dict(least=-1), "least must be at least 0"),
        (dict(spare=[3]), "spare takes patterns of names"),
    ],
)
def test_refused_options(options, message):
    with pytest.raises(ValueError, match=message):
        FreezeRule(**options)


def test_refused_scores():
    key = ("a.weight", 0)
    with pytest.raises(ValueError, match=r"scores must be finite; those of a.weight\[0\] \(nan\)"):
        FreezeRule().choose({key: math.nan}, {key: 1}, 1)
    with pytest.raises(ValueError, match=r"1 of 1 slices have no size \(a.weight\[0\]\)"):
        FreezeRule().choose({key: 1.0}, {}, 1)
    with pytest.raises(ValueError, match="total must be the entries of the whole pool, got 1, and the slices have 2"):
        FreezeRule().choose({key: 1.0}, {key: 2}, 1)
