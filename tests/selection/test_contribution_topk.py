"""ContributionTopK: the counts by layer, the connections of each row, and the top set that a density asks for."""

from __future__ import annotations

import random
import warnings
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fishkern as fk
from fishkern.files import StoredTensor
from fishkern.selection import _reaching
from fishkern.selection._sums import exact_sum
from fishkern.selection.budgeted import share as share_of
from fishkern.selection.contributions import connections_of
from tests.support.contributions import Oracle

LAYERS = [
    ["vit.patch.projection.weight"],
    ["vit.layers.0.query.weight", "vit.layers.0.up.weight"],
    ["vit.layers.1.query.weight", "vit.layers.1.up.weight"],
    ["vit.layers.2.query.weight", "vit.layers.2.up.weight"],
    ["classifier.weight"],
]


def scores(power: float = 1.0) -> dict[str, Tensor]:
    """Rows are filters in the patch embedding; later layers have smaller scores."""
    values = {"vit.patch.projection.weight": torch.rand(5, 3, 2, 2)}
    for number in range(3):
        values[f"vit.layers.{number}.query.weight"] = torch.rand(6, 8) ** (1 + power * number)
        values[f"vit.layers.{number}.up.weight"] = torch.rand(9, 20) ** (1 + power * number)
    values["classifier.weight"] = torch.rand(3, 8)
    return values


def by_name(selection: fk.Selection) -> dict[str, list]:
    return {name: selection.mask(name).flatten(1).tolist() for name in selection.names}


@pytest.mark.filterwarnings("ignore:.*ranked entries are selected")
@pytest.mark.parametrize("share", ["count", "sum", "count-per-entry"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"least_per_row": 2}, {"most_per_row": 3}, {"least_per_row": 2, "most_per_row": 2, "order": "smallest"}],
    ids=str,
)
@pytest.mark.parametrize("by", ["layer", "parameter"])
def test_it_selects_what_the_definition_says(share: str, settings: dict, by: str):
    values = scores()
    layers = LAYERS if by == "layer" else [[name] for name in values]
    oracle = Oracle(values, layers, share=share, **settings)
    for top in (0.004, 0.05, 0.3, 1.0):
        size = share_of(top, len(oracle.values))
        selection = fk.select(values, fk.ContributionTopK(top=top, by=by, share=share, **settings))
        assert by_name(selection) == {name: mask.tolist() for name, mask in oracle.masks(size).items()}
        assert all(row.any() for name in values for row in selection.mask(name))
        contributions = fk.Contributions.of(selection)
        assert [one.top_count for one in contributions.layers.values()] == oracle.counts(size)
        assert contributions.top_count == size
        assert contributions.count == selection.count
        assert contributions.total == selection.total


def test_the_contributions_say_where_and_how_much():
    values = scores()
    rule = fk.ContributionTopK(top=0.2, always="classifier.*", most_per_row=7)
    contributions = rule.connections(values)
    assert list(contributions.layers) == ["vit.patch.projection.weight", *(f"vit.layers.{n}" for n in range(3))]
    one = contributions.layers["vit.layers.1"]
    assert one.names == ("vit.layers.1.query.weight", "vit.layers.1.up.weight")
    assert (one.layer.stack, one.layer.number, one.layer.path) == ("vit.layers", 1, "vit.layers.1")
    assert one.numel == 48 + 180
    assert one.share == one.top_count / contributions.top_count
    assert one.count == 15 * one.connections
    assert contributions.layers["vit.patch.projection.weight"].layer is None
    assert contributions.per_row["vit.layers.1.up.weight"] == one.connections
    assert contributions == fk.Contributions.of(fk.select(values, rule))
    assert contributions != fk.ContributionTopK(top=0.21, always="classifier.*").connections(values)
    assert repr(contributions).startswith("Contributions(top=0.2, ")


def test_contributions_are_in_the_file_of_a_selection(tmp_path: Path):
    selection = fk.select(scores(), fk.ContributionTopK(top=0.2))
    loaded = fk.Selection.load(selection.save(tmp_path / "s"))
    assert fk.Contributions.of(loaded) == fk.Contributions.of(selection)
    for other in (fk.select(scores(), fk.GlobalTopK(k=2)), selection | selection):
        with pytest.raises(ValueError, match="does not say what each layer contributes: select with ContributionTopK"):
            fk.Contributions.of(other)
    stored = selection.provenance["contributions"]
    for damaged in ([], {"top": 0.2}, {**stored, "top": "a"}, {**stored, "layers": {"a": {"numel": -1}}}):
        with pytest.raises(ValueError, match="does not say"):
            fk.Contributions.of(fk.Selection({}, {}, provenance={"contributions": damaged}))


def test_connections_are_counted_in_whole_numbers():
    """0.29 / 0.01 is 28.999999999999996, and 49 * (1 / 49) is below 1."""
    assert connections_of([29, 1, 70], 1) == [29, 1, 70]
    assert connections_of([Fraction(29, 100), Fraction(1, 100)], 1) == [29, 1]
    assert connections_of([49 * n for n in range(1, 9)], 49) == [49 * n for n in range(1, 9)]
    assert connections_of([2**62 + 1, 2**61 + 1], 1) == [1, 1]
    assert connections_of([5, 3], 2) == [3, 2]
    assert connections_of([0, 4, 9], 1) == [1, 1, 2]  # a layer without any counts as the smallest with some
    assert connections_of([0, 0], 3) == [3, 3]
    assert connections_of([1, 9], 1, most=4) == [1, 4]
    values = {f"layers.{n}.weight": torch.zeros(1, 100) for n in range(3)}
    for (name, value), count in zip(values.items(), (29, 1, 70), strict=True):
        value[0, :count] = torch.rand(count) + 1
        assert int(values[name].count_nonzero()) == count
    with pytest.warns(UserWarning, match="ranked entries are selected"):
        chosen = fk.select(values, fk.ContributionTopK(top=0.334))
    assert list(chosen.counts.values()) == [29, 1, 70]


def test_of_equal_scores_the_first_count_and_the_first_of_a_row_are_selected():
    values = {"layers.0.weight": torch.ones(2, 6), "layers.1.weight": torch.ones(2, 6)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        selection = fk.select(values, fk.ContributionTopK(top=0.67))
    assert selection.indices("layers.0.weight").tolist() == [0, 1, 2, 6, 7, 8]  # 12 of the first 16, 3 times 4
    assert selection.indices("layers.1.weight").tolist() == [0, 6]


@pytest.mark.parametrize("rule", [fk.ContributionTopK(top=0.1), fk.ContributionTopK(density=0.00375)], ids=str)
def test_a_file_is_read_two_or_three_times_and_never_whole(rule: fk.Rule, tmp_path: Path, monkeypatch):
    values = {f"layers.{n}.weight": torch.rand(300, 400) ** (n + 1) for n in range(2)}
    path = fk.Statistics(values, count=2).save(tmp_path / "s")
    entries = []
    read_pieces = StoredTensor.pieces

    def pieces(stored: StoredTensor, *args, **options):
        for piece in read_pieces(stored, *args, **options):
            entries.append(len(piece))
            yield piece

    expected = fk.select(fk.Statistics.load(path), rule)
    monkeypatch.setattr(StoredTensor, "pieces", pieces)
    monkeypatch.setattr(StoredTensor, "read", lambda *_: pytest.fail("a tensor was read whole"))
    assert fk.select(fk.Statistics.load(path, lazy=True), rule) == expected
    assert sum(entries) < (2.4 if rule.density is None else 3.1) * 240_000


def test_each_backend_counts_the_same(backend: str):
    rule = fk.ContributionTopK(top=0.1)
    values = scores()
    assert rule.connections(values, backend=backend) == rule.connections(values, backend="torch")
    assert fk.select(values, rule, backend=backend) == fk.select(values, rule, backend="torch")


def drawn(seed: int) -> tuple[dict[str, Tensor], list[list[str]], dict, random.Random]:
    """A small pool of one of several kinds, its layers, and settings of a rule."""
    draw = random.Random(seed)
    names = [(f"layers.{n}.m{m}.weight", n) for n in range(draw.randint(1, 4)) for m in range(draw.randint(1, 2))]
    names += [(name, number) for number, name in ((8, "embed.weight"), (9, "head.weight")) if draw.random() < 0.4]
    draw.shuffle(names)
    kind = draw.choice(["any", "ties", "constant", "wide", "signed", "zeros"])
    dtype = draw.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16])
    values = {}
    for name, number in names:
        flat = (draw.randint(1, 5), draw.randint(1, 9))
        shape = flat if draw.random() < 0.8 else (draw.randint(1, 3), 2, draw.randint(1, 3))
        value = torch.rand(shape, dtype=torch.float64) ** (1 + number)
        value = {
            "any": value,
            "ties": (4 * value).floor(),
            "constant": torch.ones_like(value),
            "wide": value**8,
            "signed": torch.randn_like(value),
            "zeros": value * (torch.rand(shape) < 0.3),
        }[kind]
        values[name] = value.to(dtype)
    layers: dict[int, list[str]] = {}
    for name, number in names:
        layers.setdefault(number, []).append(name)
    settings = {
        "share": draw.choice(["count", "count-per-entry"]),
        "least_per_row": draw.choice([1, 1, 2]),
        "most_per_row": draw.choice([None, None, 3, 5]),
        "order": draw.choice(["largest", "smallest"]),
    }
    return values, list(layers.values()), settings, draw


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("first", range(0, 45, 15))
def test_a_density_is_reached_as_nearly_as_by_trying_every_top(first: int, monkeypatch: pytest.MonkeyPatch):
    """In small and in large blocks, and with few or many scores followed at once."""
    for seed in range(first, first + 15):
        torch.manual_seed(seed)
        values, layers, settings, draw = drawn(seed)
        monkeypatch.setattr(_reaching, "_BLOCKS", draw.choice([2, 3, 5, 512]))
        monkeypatch.setattr(_reaching, "_MOST_READ", draw.choice([1, 20, 2**23]))
        by = draw.choice(["layer", "parameter"])
        oracle = Oracle(values, layers if by == "layer" else [[name] for name in values], **settings)
        total = len(oracle.values)
        least = sum(len(rows) * min(settings["least_per_row"], rows.shape[1]) for rows in oracle.rows.values())
        most = sum(
            len(rows) * min(settings["most_per_row"] or rows.shape[1], rows.shape[1]) for rows in oracle.rows.values()
        )
        for target in {least, draw.randint(least, most), draw.randint(least, most), most}:
            density = min(1.0, round(target / total + 1e-6, 6))
            assert share_of(density, total) == target
            rule = fk.ContributionTopK(density=density, by=by, **settings)
            selection = fk.select(values, rule)
            contributions = fk.Contributions.of(selection)
            size = oracle.nearest(target)
            assert contributions.top_count == size, (seed, target)
            assert selection.count == oracle.selected(size)
            assert by_name(selection) == {name: mask.tolist() for name, mask in oracle.masks(size).items()}
            again = fk.ContributionTopK(top=contributions.top, by=by, **settings)
            assert fk.select(values, again) == selection


def test_a_density_of_a_larger_model_comes_from_a_usual_top_set():
    """Off by at most one connection of each row of one layer; not by one of the tiny top sets that happen to fit."""
    values = {}
    for number in range(6):
        values[f"layers.{number}.a.weight"] = (torch.randn(40, 60) * torch.randn(40, 1).exp() * (1 + number / 10)) ** 2
        values[f"layers.{number}.b.weight"] = (torch.randn(20, 90) * torch.randn(20, 1).exp() * (1 + number / 10)) ** 2
    total = sum(value.numel() for value in values.values())
    for density in (0.018, 0.02, 0.025, 0.03):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            contributions = fk.ContributionTopK(density=density).connections(values)
        assert abs(contributions.count - share_of(density, total)) <= 60
        assert contributions.top > 0.003


def test_density_counts_the_whole_pool():
    values = scores()
    rule = fk.ContributionTopK(density=0.1, always="classifier.*", never="vit.patch.*")
    ranked = {name: value for name, value in values.items() if "layers" in name}
    oracle = Oracle(ranked, LAYERS[1:4])
    target = share_of(0.1, sum(value.numel() for value in values.values()))
    selection = fk.select(values, rule)
    assert selection.k == oracle.selected(oracle.nearest(target))
    assert selection.count == selection.k + 24


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: fk.ContributionTopK(), ValueError, "give either top or density, got top=None and density=None"),
        (lambda: fk.ContributionTopK(0.1, 0.1), ValueError, "give either top or density, got top=0.1 and density=0.1"),
        (lambda: fk.ContributionTopK(top=0), ValueError, "top must be above 0 and at most 1, got 0.0"),
        (lambda: fk.ContributionTopK(density=1.1), ValueError, "density must be above 0 and at most 1, got 1.1"),
        (lambda: fk.ContributionTopK(top="0.1"), TypeError, "top must be a number, got '0.1'"),
        (lambda: fk.ContributionTopK(0.1, least_per_row=0), ValueError, "least_per_row must be at least 1, got 0"),
        (lambda: fk.ContributionTopK(0.1, least_per_row=1.5), TypeError, "least_per_row must be an integer, got 1.5"),
        (
            lambda: fk.ContributionTopK(0.1, least_per_row=2, most_per_row=1),
            ValueError,
            "most_per_row must be at least 2, got 1",
        ),
        (lambda: fk.ContributionTopK(0.1, by="block"), ValueError, r"by must be one of \('layer', 'parameter'\)"),
        (lambda: fk.ContributionTopK(0.1, share="mean"), ValueError, r"share must be one of \('count', 'sum', 'count-"),
        (lambda: fk.ContributionTopK(0.1, order="top"), ValueError, "order must be one of"),
        (lambda: fk.ContributionTopK(density=0.1, share="sum"), ValueError, "share='sum' goes with top=: density= is"),
    ],
)
def test_rules_that_cannot_be(make, error: type[Exception], says: str):
    with pytest.raises(error, match=says):
        make()


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        (fk.ContributionTopK(top=0.001), r"top=0.001 of 768 ranked entries is none: the smallest top is 0.00131\."),
        (
            fk.ContributionTopK(density=0.06),
            r"density=0.06 of a pool of 768 is 46 entries, less than least_per_row=1 of each row \(53\): the smallest "
            r"density is 0.0691\.",
        ),
        (
            fk.ContributionTopK(density=0.5, most_per_row=2),
            r"density=0.5 of a pool of 768 is 384 entries, but only 106 are left to choose from with most_per_row=2 of",
        ),
        (
            fk.ContributionTopK(density=0.99, never="vit.patch.*"),
            "density=0.99 of a pool of 768 is 760 entries, but only 708 are left to choose from after always= and",
        ),
    ],
)
def test_what_scores_do_not_allow(rule: fk.ContributionTopK, says: str):
    with pytest.raises(ValueError, match=says):
        fk.select(scores(), rule)
    with pytest.raises(ValueError, match=says):  # from the shapes alone
        rule.check({name: score.to("meta") for name, score in scores().items()})
    fk.ContributionTopK(density=0.3).check(scores())


def test_parameters_without_rows_and_scores_that_are_no_numbers():
    values = {**scores(), "vit.norm.weight": torch.rand(4)}
    for rule in (fk.ContributionTopK(top=0.2), fk.ContributionTopK(density=0.2)):
        with pytest.raises(
            ValueError, match=r"1 of 9 parameters have no rows, such as vit.norm.weight of shape \(4,\)"
        ):
            fk.select(values, rule)
        with pytest.raises(ValueError, match="have no rows"):
            rule.connections(values)
        with pytest.raises(TypeError, match="must be float64, float32, bfloat16 or float16; w is torch.float8"):
            fk.select({"w": torch.ones(2, 2).to(torch.float8_e4m3fn)}, rule)
        assert fk.select({"w": torch.ones(4, 0)}, rule).count == 0
        infinite = {"a.weight": torch.tensor([[torch.inf, -torch.inf]]), "b.weight": torch.rand(2, 2)}
        assert fk.select(infinite, rule if rule.top else fk.ContributionTopK(density=0.5)).count >= 3


def test_layers_with_next_to_nothing_in_the_top_set_are_warned_of():
    values = {f"layers.{n}.weight": torch.rand(4, 50) for n in range(4)}
    values["layers.0.weight"] /= 1000
    values["layers.0.weight"][0, 0] = 2.0
    with pytest.warns(UserWarning, match="more than 10 times as many as least_per_row=1 of each row .16") as caught:
        selection = fk.select(values, fk.ContributionTopK(top=0.5))
    assert [warning.filename for warning in caught] == [__file__]
    said = str(caught[0].message)
    assert f"{selection.count} of 800 ranked entries are selected (density {selection.density:.2g})" in said
    assert "layers.0 has only 1 of the 400 entries in the top set" in said
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fk.select(values, fk.ContributionTopK(top=0.5, most_per_row=9))


def test_a_density_that_is_not_reached_is_warned_of():
    values = {"layers.0.weight": torch.rand(4, 50), "layers.1.weight": torch.rand(4, 50) / 1000}
    values["layers.1.weight"][0, 0] = 1e-9
    with pytest.warns(
        UserWarning, match=r"density=0.9 of a pool of 400 is 360 entries, and the nearest that .* is 204 "
    ):
        assert fk.select(values, fk.ContributionTopK(density=0.9)).count == 204


@pytest.mark.filterwarnings("ignore:what each row gets", "ignore:density=0.9")
@pytest.mark.parametrize("given", [{"top": 0.5}, {"density": 0.9}])
def test_zeros_that_count_by_their_position_are_warned_of(given: dict):
    values = {"layers.0.weight": torch.zeros(2, 10), "layers.1.weight": torch.zeros(2, 10)}
    values["layers.0.weight"][:, :3] = 1.0
    with pytest.warns(UserWarning, match=r"a top set of \d+ exceeds the 6 non-zero scores in the pool"):
        fk.select(values, fk.ContributionTopK(**given))


def test_sums_are_exact_in_any_order():
    values = torch.cat([torch.randn(500).abs() * 10.0 ** torch.randint(-30, 30, (500,)), torch.tensor([0.0, 1e-45])])
    indices = torch.arange(502)
    exact = sum((Fraction(value) for value in values.tolist()), Fraction(0))
    for order in (indices, torch.randperm(502)):
        for dtype in (torch.float32, torch.float64):
            assert exact_sum("w", values[order].to(dtype), indices) == exact
    assert exact_sum("w", values, torch.tensor([3, 501])) == Fraction(values[3].item()) + Fraction(values[501].item())
    assert exact_sum("w", torch.tensor([1e16, 1.0], dtype=torch.float64), torch.arange(2)) == 10**16 + 1
    tiny = torch.tensor([5e-324, 1.7976931348623157e308], dtype=torch.float64)
    assert exact_sum("w", tiny, torch.arange(2)) == Fraction(5e-324) + Fraction(1.7976931348623157e308)
    for wrong in (-1.0, torch.inf):
        with pytest.raises(ValueError, match=f"finite and not negative; w holds {wrong:g} at flat index 4: take"):
            exact_sum("w", torch.tensor([1.0, 1.0, 1.0, 1.0, wrong]), torch.tensor([1, 4]))
