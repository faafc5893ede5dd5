"""The distance, and what is made of it from reading to reading."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fishkern as fk
from fishkern.freezing import Factors, JensenShannon
from fishkern.freezing.histograms import bins_of, divergence_root
from tests.freezing import oracle
from tests.freezing.oracle import log_normal

distance = JensenShannon.distance
REFERENCES = ["values", "factors", "histogram"]


def followed(drift: JensenShannon, readings) -> fk.freezing.Track:
    track = None
    for reading in readings:
        track = drift.follow(track, reading)
    return track


def factors(rows: int = 12, columns: int = 30, seed: int = 0) -> Factors:
    return Factors(log_normal(rows, seed=seed, center=-2.0), log_normal(columns, seed=seed + 1, center=-2.0))


# Below 2^16 values together they are sorted, above they are counted by digits.
@pytest.mark.parametrize("entries", [16, 17, 100, 1023, 1024, 5000, 70_000])
@pytest.mark.parametrize("scale", ["log", "raw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equals_the_definition(entries, scale, dtype):
    reference, current = log_normal(entries).to(dtype), (-log_normal(entries, seed=1) * 1.3).to(dtype)
    current[::7] = 0
    expected = oracle.distance(reference.double(), current.double(), bins=bins_of(entries, 64), scale=scale)
    assert distance(reference, current, scale=scale) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    "counts, others, expected",
    [
        ([1, 2, 3, 4], [4, 3, 2, 1], 0.32625164411253454),
        ([10, 0, 0, 5], [0, 7, 1, 5], 0.6672643006706253),
        ([5, 0], [0, 9], 0.8325546111548531),
        ([1000, 1, 1, 1], [1000, 1, 1, 2], 0.009194229832381455),
    ],
)
def test_equals_what_scipy_gave(counts, others, expected):
    """scipy 1.17.1: jensenshannon(counts + 1e-12, others + 1e-12)."""
    assert divergence_root(torch.tensor(counts), torch.tensor(others)) == pytest.approx(expected, rel=1e-12)


def test_options():
    reference, current = log_normal(4000), log_normal(4000, seed=1) * 1.3
    expected = oracle.distance(reference, current, bins=20, within=(10, 80))
    assert distance(reference, current, bins=20, range=(0.1, 0.8)) == pytest.approx(expected, rel=1e-9)


def test_any_shapes():
    """Also of other sizes: both histograms are normalised, and the smaller one says how many bins."""
    reference, current = log_normal(600), log_normal(300, seed=1)
    expected = oracle.distance(reference, current, bins=300 // 16)
    assert distance(reference.view(2, 3, 100), current.view(100, 3).mT) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("entries, bins", [(1, 4), (16, 4), (64, 4), (80, 5), (1023, 63), (1024, 64), (10**6, 64)])
def test_bins(entries, bins):
    assert bins_of(entries, 64) == bins


@given(st.lists(st.floats(0, 2.0**100, width=32), min_size=1, max_size=40), st.sampled_from(["log", "raw"]))
def test_nothing_moved(values, scale):
    """Exactly 0, whatever the values: none, equal ones, ties, zeros."""
    assert distance(torch.tensor(values), torch.tensor(values), scale=scale) == 0.0


def test_largest():
    assert distance(torch.full((50,), 1e-6), torch.full((50,), 2e-6)) == pytest.approx(math.sqrt(math.log(2)))
    assert distance(torch.tensor(1e-6), torch.tensor(1.1e-6)) == pytest.approx(math.sqrt(math.log(2)))


def test_a_common_factor_changes_nothing():
    reference, current = (log_normal(20_000, seed=seed, center=-3.0, spread=0.5) for seed in (0, 1))
    for factor in (1e-2, 7.0, 1e6):
        scaled = distance(reference.double() * factor, current.double() * factor)
        assert scaled == pytest.approx(distance(reference.double(), current.double()), rel=1e-3)


def test_a_factor_of_one_changes_much():
    """Ten times as large, of magnitudes whose natural logarithms have a deviation of 2."""
    reference = log_normal(65_536, spread=2 / math.log(10))
    assert distance(reference, reference * 10) == pytest.approx(0.37, abs=0.01)


def test_permuting_both_alike_changes_nothing():
    order = torch.randperm(5000, generator=torch.Generator().manual_seed(0))
    readings = [log_normal(5000) * 1.05**step for step in range(4)]
    drift = JensenShannon()
    shuffled = followed(drift, [reading[order] for reading in readings])
    assert drift.score_of(shuffled) == drift.score_of(followed(drift, readings)) > 0


@pytest.mark.parametrize("score", ["total-variation", "mean"])
def test_scores_equal_the_definition(score):
    readings = [log_normal(3000, seed=7) * (1 + 0.1 * step * log_normal(3000, seed=step)) for step in range(8)]
    variation, mean = oracle.total_variation([reading.double().numpy() for reading in readings])
    drift = JensenShannon(score=score)
    track = followed(drift, [reading.double() for reading in readings])
    assert drift.score_of(track) == pytest.approx(variation if score == "total-variation" else mean, rel=1e-6)
    assert track.readings == 8


def test_total_variation_counts_falls_too():
    """With the last reading as reference, only the first step is a distance: J is .1, .09 and .081 of it."""
    first, second = log_normal(3000), log_normal(3000) * 1.5
    track = followed(JensenShannon(decay=0.0), [first, second, second, second])
    moved = distance(first, second)
    assert track.smoothed == pytest.approx(0.081 * moved)
    assert track.variation == pytest.approx((0.1 + 0.01 + 0.009) * moved)
    assert track.total == pytest.approx((0.1 + 0.09 + 0.081) * moved)
    assert JensenShannon(score="mean").score_of(track) == track.total / 4


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("score", ["total-variation", "mean"])
@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9, 1 / 3])
def test_still_is_exactly_zero(reference, score, decay):
    """For values that the mean of equal values would round away from them, too."""
    drift = JensenShannon(reference=reference, score=score, decay=decay, smoothing=0.7)
    for reading in (*(log_normal(entries) for entries in (1, 2, 16, 100, 3000)), torch.zeros(50), factors()):
        assert drift.score_of(followed(drift, [reading] * 6)) == 0.0


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("entries", [1, 16, 17, 64, 100, 768, 4096, 65_536, 2**20])
def test_drifting_is_above_still_at_any_size(reference, entries):
    """3 % of the spread of its logarithm for each reading: above all that is still, and found from the second one."""
    drift, first = JensenShannon(reference=reference), log_normal(entries)
    readings = 3 if entries > 10**5 else 10
    track = followed(drift, [first * 10 ** (0.03 * step) for step in range(readings)])
    assert drift.score_of(track) > (0.0005 if readings == 3 else 0.01)
    assert drift.score_of(followed(drift, [first] * 2)) == 0.0


def test_one_entry_of_many_that_moves_is_found():
    first = log_normal(2000)
    second = first.clone()
    second[1000] = first.median() * 3
    assert distance(first, second) > 0


@settings(max_examples=20)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 5))
def test_factors_are_followed_as_their_products_where_one_does_not_move(rows, columns, seed):
    """The mean of products with a common factor is the product of the means."""
    readings = [factors(rows, columns, seed)]
    readings += [readings[0]._replace(columns=log_normal(columns, seed=seed + 2 + step)) for step in range(3)]
    readings = [Factors(*(part.double() for part in reading)) for reading in readings]
    by_factors, by_values = JensenShannon(reference="factors"), JensenShannon()
    values = [torch.outer(*reading).view(-1) for reading in readings]
    track = followed(by_factors, readings)
    assert [part.numel() for part in track.reference] == [rows, columns]
    assert by_factors.score_of(track) == pytest.approx(by_values.score_of(followed(by_values, values)), rel=1e-6)


def test_values_of_factors():
    """Without a factored reference, products are formed in float32."""
    drift, readings = JensenShannon(), [factors(seed=0), factors(seed=5)]
    expected = followed(drift, [torch.outer(*(part.double() for part in one)).float().view(-1) for one in readings])
    track = followed(drift, readings)
    assert torch.equal(track.reference[0], expected.reference[0])
    assert drift.score_of(track) == drift.score_of(expected) > 0


def test_a_histogram_gets_coarser_where_values_move_away():
    """Its counts are those of all values, on as many bins, and what is far away is as far as can be."""
    drift, first = JensenShannon(reference="histogram", decay=0.0), log_normal(2000)
    track = followed(drift, [first])
    for step in (1, 2, 3, -6):
        before, track = track, drift.follow(track, first * 100.0**step)
        counts, edges = track.reference
        assert (len(counts), len(edges)) == (64, 65)
        assert edges.diff().gt(0).all()
        torch.testing.assert_close(edges.diff(), edges.diff().mean().expand(64), rtol=1e-9, atol=0)
        logs = (first.double() * 100.0**step + 1e-12).log10()
        assert counts.sum() >= 0.97 * 2000
        assert edges[0] <= logs.quantile(0.01)
        assert edges[-1] >= logs.quantile(0.99)
        assert track.smoothed > before.smoothed * 0.9 + 0.05
    still = drift.follow(track, first * 100.0**-6)
    assert still.smoothed == pytest.approx(0.9 * track.smoothed)


def test_halved_bins_keep_their_counts():
    drift, first = JensenShannon(reference="histogram"), log_normal(2000)
    counts, edges = drift.follow(None, first).reference
    for factor, free in ((10.0, slice(32, 64)), (0.1, slice(0, 32))):
        coarse, wider = (
            JensenShannon(reference="histogram", decay=1.0).follow(followed(drift, [first]), first * factor).reference
        )
        taken = slice(0, 32) if free.start else slice(32, 64)
        assert torch.equal(coarse[taken], counts.view(32, 2).sum(1))
        assert coarse[free].eq(0).all()
        assert torch.equal(wider[taken.start : taken.stop + 1], edges[::2])


def test_nothing_given_is_changed_or_kept():
    for reference in REFERENCES:
        drift, first, second = JensenShannon(reference=reference), log_normal(100), log_normal(100, seed=1)
        given_first, given_second = first.clone(), second.clone()
        track = drift.follow(None, first)
        kept = [part.clone() for part in track.reference]
        drift.follow(track, second)
        first.zero_()
        assert all(torch.equal(part, before) for part, before in zip(track.reference, kept, strict=True))
        assert torch.equal(second, given_second)
        assert drift.follow(track, given_first).smoothed == 0.0


def test_settings_are_plain():
    drift = JensenShannon(bins=32, reference="histogram")
    assert drift.settings["range"] == [0.01, 0.99]
    assert JensenShannon(**drift.settings) == drift


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(bins=1), "bins must be at least 2, got 1"),
        (dict(scale="linear"), "scale must be one of"),
        (dict(score="sum"), "score must be one of"),
        (dict(reference="mean"), "reference must be one of"),
        (dict(range=(0.99, 0.01)), "range must be two ascending fractions"),
        (dict(range=(1, 99)), "range must be from 0 to 1, got 99"),
        (dict(decay=1.1), "decay must be from 0 to 1"),
        (dict(smoothing=math.nan), "smoothing must be from 0 to 1"),
    ],
)
def test_refused_options(options, message):
    with pytest.raises(ValueError, match=message):
        JensenShannon(**options)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("entries", [10, 70_000])
def test_refused_values(value, entries):
    odd = torch.ones(entries)
    odd[5] = value
    for pair in ((odd, torch.ones(entries)), (torch.ones(entries), odd)):
        with pytest.raises(ValueError, match="NaN or infinite"):
            distance(*pair)
    for reading in (odd, Factors(odd[:8], torch.ones(3))):
        for reference in REFERENCES:
            with pytest.raises(ValueError, match="NaN or infinite"):
                JensenShannon(reference=reference).follow(None, reading)


def test_refused_readings():
    with pytest.raises(ValueError, match=r"reference must have entries, got \(0, 3\)"):
        distance(torch.ones(0, 3), torch.ones(3))
    with pytest.raises(TypeError, match="current must be a floating tensor, got torch.int64"):
        distance(torch.ones(3), torch.arange(3))
    with pytest.raises(ValueError, match="at least one entry"):
        JensenShannon().follow(None, torch.ones(0))
    for drift in (JensenShannon(), JensenShannon(reference="factors")):
        with pytest.raises(ValueError, match=r"its reference has \[\(3,\)\] and the reading \[\(4,\)\]"):
            followed(drift, [torch.ones(3), torch.ones(4)])
    with pytest.raises(ValueError, match=r"its reference has \[\(2,\), \(3,\)\] and the reading \[\(6,\)\]"):
        followed(JensenShannon(reference="factors"), [Factors(torch.ones(2), torch.ones(3)), torch.ones(6)])
