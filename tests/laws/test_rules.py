"""Laws of every rule, however it selects."""

from __future__ import annotations

import inspect
import warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fishkern as fk
from tests.support import contributions

pytestmark = pytest.mark.matrix

RULES = {
    "global": fk.GlobalTopK(k=50),
    "global density": fk.GlobalTopK(density=0.13),
    "global smallest": fk.GlobalTopK(density=0.05, order="smallest"),
    "per tensor": fk.PerTensorTopK(k=3),
    "per tensor density": fk.PerTensorTopK(density=0.3, order="smallest"),
    "per row": fk.PerRowTopK(2),
    "per row smallest": fk.PerRowTopK(1, order="smallest"),
    "per row density": fk.PerRowTopK(density=0.4),
    "n of m": fk.NofM(1, 2),
    "n of m smallest": fk.NofM(1, 2, order="smallest"),
    "contribution": fk.ContributionTopK(top=0.3),
    "contribution by sums": fk.ContributionTopK(top=0.3, share="sum", least_per_row=2, most_per_row=3),
    "contribution density": fk.ContributionTopK(density=0.4, by="parameter", order="smallest"),
    "random": fk.Random(k=40, seed=3),
    "random density": fk.Random(density=0.5),
}
BY_SCORE = [name for name, rule in RULES.items() if not isinstance(rule, fk.Random)]
every_rule = pytest.mark.parametrize("name", RULES)
by_score = pytest.mark.parametrize("name", BY_SCORE)

SHAPES = {"embed.weight": (9, 4), "layers.0.weight": (7, 6), "layers.1.weight": (5, 3, 2), "head.weight": (4, 8)}
TOTAL = 36 + 42 + 30 + 32


def scores(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=generator) for name, shape in SHAPES.items()}


def expected_count(rule: fk.Rule, ranked: dict[str, torch.Tensor], total: int) -> int:
    """The budget, from the rule's definition: its share of the scores that it ranks, out of a pool of this size."""
    numels = [score.numel() for score in ranked.values()]
    if isinstance(rule, fk.ContributionTopK):
        settings = {key: getattr(rule, key) for key in ("share", "least_per_row", "most_per_row", "order")}
        oracle = contributions.Oracle(ranked, [[name] for name in ranked], **settings)  # one parameter in each layer
        if rule.top is None:
            return oracle.selected(oracle.nearest(int(Fraction(str(rule.density)) * total)))
        return oracle.selected(int(Fraction(str(rule.top)) * sum(numels)))
    if isinstance(rule, fk.NofM):
        return sum(numels) * rule.n // rule.m
    if isinstance(rule, fk.PerRowTopK):
        density = Fraction(str(rule.density or 0))
        of_row = {name: rule.k or int(density * score[0].numel()) for name, score in ranked.items()}
        return sum(len(score) * of_row[name] for name, score in ranked.items())
    if isinstance(rule, fk.PerTensorTopK) and rule.k is not None:
        return len(ranked) * rule.k
    if rule.k is not None:
        return rule.k
    density = Fraction(str(rule.density))
    if isinstance(rule, fk.PerTensorTopK):
        return sum(int(density * numel) for numel in numels)
    return int(density * total)


def changed(name: str, **settings) -> fk.Rule:
    """The rule with other settings."""
    own = {key: value for key, value in RULES[name].settings.items() if key != "name"}
    return type(RULES[name])(**own | settings)


def subclasses(kind: type) -> set[type]:
    direct = kind.__subclasses__()
    return {*direct}.union(*map(subclasses, direct))


def test_every_kind_of_rule_is_in_this_suite():
    ours = {kind for kind in subclasses(fk.Rule) if kind.__module__.startswith("fishkern.")}
    kinds = {kind for kind in ours if not inspect.isabstract(kind)}
    assert kinds == {type(rule) for rule in RULES.values()}


@every_rule
def test_the_budget_is_met_exactly(name: str):
    selection = fk.select(scores(), RULES[name])
    assert selection.count == selection.k == expected_count(RULES[name], scores(), TOTAL)
    assert selection.names == tuple(SHAPES)
    assert selection.total == TOTAL
    assert selection.density == selection.count / TOTAL
    for parameter in SHAPES:
        assert selection.mask(parameter).sum() == len(selection.indices(parameter)) == selection.counts[parameter]


@every_rule
def test_the_budget_is_met_by_constant_scores_too(name: str):
    """Ties are never selected together because they are ties."""
    constant = {key: torch.ones(shape) for key, shape in SHAPES.items()}
    assert fk.select(constant, RULES[name]).count == expected_count(RULES[name], constant, TOTAL)


@by_score
def test_ties_go_to_the_earlier_parameter_and_the_smaller_index(name: str):
    rule = RULES[name]
    selection = fk.select({key: torch.ones(shape) for key, shape in SHAPES.items()}, rule)
    if isinstance(rule, fk.PerRowTopK | fk.NofM | fk.ContributionTopK):
        for key, count in selection.counts.items():
            groups = (
                selection.mask(key).view(-1, rule.m) if isinstance(rule, fk.NofM) else selection.mask(key).flatten(1)
            )
            assert groups[:, : count // len(groups)].all()
    else:
        for key, count in selection.counts.items():
            assert selection.indices(key).tolist() == list(range(count))
    if isinstance(rule, fk.GlobalTopK):
        assert selection.counts["embed.weight"] == min(36, selection.count)
        assert selection.counts["layers.0.weight"] == max(0, selection.count - 36)


@every_rule
def test_always_comes_beside_the_budget_and_never_not_at_all(name: str):
    rule = changed(name, always="head.*", never=["embed.*"])
    selection = fk.select(scores(), rule)
    rest = {key: scores()[key] for key in ("layers.0.weight", "layers.1.weight")}
    budget = expected_count(rule, rest, TOTAL)
    assert selection.counts["embed.weight"] == 0
    assert selection.mask("embed.weight").shape == (9, 4)
    assert "head.weight" in selection.whole
    assert selection.mask("head.weight").all()
    assert selection.k == budget
    assert selection.count == budget + 32
    assert selection.total == TOTAL


@every_rule
@pytest.mark.parametrize("argument", ["always", "never"])
def test_a_pattern_without_a_match_raises(name: str, argument: str):
    with pytest.raises(ValueError, match=rf"{argument}='haed\.\*' matches no name of the pool \(4 names: embed"):
        fk.select(scores(), changed(name, **{argument: ["head.*", "haed.*"]}))


@every_rule
def test_a_name_cannot_be_in_both(name: str):
    with pytest.raises(ValueError, match=r"head.weight is in always= and in never="):
        fk.select(scores(), changed(name, always="head.*", never="*d.weight"))


@every_rule
def test_the_same_again_from_a_mapping_from_statistics_and_from_a_file(name: str, tmp_path: Path):
    plain = fk.select(scores(), RULES[name])
    statistics = fk.Statistics(scores(), count=3)
    path = statistics.save(tmp_path / "s", max_shard_size=200)
    threads = torch.get_num_threads()
    try:
        for number, source in enumerate([statistics, fk.Statistics.load(path), fk.Statistics.load(path, lazy=True)]):
            torch.set_num_threads(1 + number % 2)
            again = fk.select(source, RULES[name])
            assert again == plain
            assert again.provenance["statistics"]["count"] == 3
            assert again.provenance == fk.select(statistics, RULES[name]).provenance
    finally:
        torch.set_num_threads(threads)
    wrapped = {f"_orig_mod.{key}": value for key, value in scores().items()}
    assert fk.select(wrapped, RULES[name]) == plain


@pytest.mark.gpu
@every_rule
def test_the_same_on_a_gpu(name: str):
    there = {key: value.cuda() for key, value in scores().items()}
    assert fk.select(there, RULES[name]) == fk.select(scores(), RULES[name])


@every_rule
def test_a_positive_scale_does_not_matter(name: str):
    scaled = {key: 4 * value for key, value in scores().items()}
    assert fk.select(scaled, RULES[name]) == fk.select(scores(), RULES[name])


# sums of negative scores are refused
@pytest.mark.parametrize("name", [name for name in BY_SCORE if getattr(RULES[name], "share", "") != "sum"])
def test_smallest_is_largest_of_the_negated(name: str):
    rule = RULES[name]
    other = changed(name, order={"largest": "smallest", "smallest": "largest"}[rule.order])
    negated = {key: -value for key, value in scores().items()}
    assert fk.select(negated, other) == fk.select(scores(), rule)


@every_rule
def test_nothing_is_touched(name: str):
    given, state = scores(), torch.get_rng_state()
    fk.select(given, RULES[name])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, scores()[key]) for key, value in given.items())


@every_rule
def test_the_provenance_says_what_was_done(name: str):
    provenance = fk.select(scores(), RULES[name]).provenance
    settings = provenance["rule"]
    assert type(RULES[name])(**{key: value for key, value in settings.items() if key != "name"}) == RULES[name]
    assert settings["name"] == type(RULES[name]).__name__
    other = fk.select(scores(seed=1), RULES[name]).provenance
    assert provenance["statistics"]["digest"] != other["statistics"]["digest"]


@every_rule
@pytest.mark.parametrize("whole", [np.int64, torch.tensor], ids=["numpy", "torch"])
def test_numbers_of_any_library_become_plain_ones(name: str, whole):
    """A header holds plain ones; a score of another kind would be noticed after all the work."""
    fraction = np.float64 if whole is np.int64 else lambda value: torch.tensor(value, dtype=torch.float64)
    kinds = {"k": whole, "seed": whole, "density": fraction}
    kinds |= {"n": whole, "m": whole, "top": fraction, "least_per_row": whole, "most_per_row": whole}
    own = {key: value for key, value in vars(RULES[name]).items() if key in kinds and value is not None}
    rule = changed(name, **{key: kinds[key](value) for key, value in own.items()})
    assert {key: type(getattr(rule, key)) for key in own} == {key: type(value) for key, value in own.items()}
    assert rule == RULES[name]
    assert fk.select(scores(), rule).provenance == fk.select(scores(), RULES[name]).provenance


@every_rule
def test_a_rule_is_frozen(name: str):
    with pytest.raises(AttributeError):
        RULES[name].k = 3
    assert hash(changed(name)) == hash(RULES[name])


@by_score
def test_nan_is_refused_by_name(name: str):
    bad = scores()
    bad["layers.0.weight"][2, 3] = torch.nan
    with pytest.raises(ValueError, match=r"layers.0.weight holds NaN at flat index 15, which has no rank: look at the"):
        fk.select(bad, RULES[name])


@by_score
def test_zero_scores_are_warned_of(name: str):
    """LoRA's usual start: B = 0, so that every entry of A scores exactly zero."""
    zeros = {"lora_A.weight": torch.zeros(4, 8), "lora_B.weight": torch.rand(8, 4) + 1}
    rule = changed(name, k=None, density=0.52) if isinstance(RULES[name], fk.GlobalTopK) else RULES[name]
    rule = changed(name, order="largest") if isinstance(rule, fk.PerTensorTopK) else rule
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        selection = fk.select(zeros, rule)
    assert selection.count == expected_count(rule, zeros, 64)
    said = [str(warning.message) for warning in caught if "non-zero scores" in str(warning.message)]
    assert len(said) == (rule.order == "largest")
    assert all("B = 0" in text and "PiSSA" in text for text in said)
    assert all("k=33 exceeds the 32" in text for text in said if isinstance(rule, fk.GlobalTopK))
    assert all(warning.filename == __file__ for warning in caught)


@every_rule
def test_no_warning_without_zeros(name: str):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fk.select(scores(), RULES[name])


@given(data=st.data())
def test_budgets_are_exact_for_any_pool(data: st.DataObject):
    sizes = data.draw(st.lists(st.tuples(st.integers(1, 6), st.integers(3, 9)), min_size=1, max_size=5))
    shapes = {f"p{number}": size for number, size in enumerate(sizes)}
    total = sum(rows * columns for rows, columns in sizes)
    values = {key: torch.randint(3, shape).float() + 1 for key, shape in shapes.items()}
    density = data.draw(st.decimals("0.01", 1, places=3))
    k = data.draw(st.integers(0, total))
    rules = [fk.GlobalTopK(density=float(density)), fk.PerTensorTopK(density=float(density)), fk.GlobalTopK(k=k)]
    rules += [fk.Random(density=float(density), seed=k), fk.Random(k=k), fk.PerRowTopK(data.draw(st.integers(0, 3)))]
    rules += [fk.NofM(1, 1), fk.ContributionTopK(top=0.4, most_per_row=4)]
    for rule in rules:
        assert fk.select(values, rule).count == expected_count(rule, values, total)
