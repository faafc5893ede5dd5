"""The selection of each rule against an independent truth; budgets, refusals, lazy statistics."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import fishkern as fk
from fishkern.files import StoredTensor
from fishkern.selection.budgeted import share


def scores(*shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {f"p{number}": torch.randint(0, 50, shape).float() + 1 for number, shape in enumerate(shapes)}


@pytest.mark.parametrize("order", ["largest", "smallest"])
def test_global_is_a_stable_sort_of_everything(order: str):
    values = scores((30, 7), (5,), (2, 3, 4), ())
    flat = torch.cat([value.flatten() for value in values.values()])
    first = flat.sort(stable=True, descending=order == "largest").indices[:60]
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[first] = True
    selection = fk.select(values, fk.GlobalTopK(k=60, order=order))
    assert torch.equal(torch.cat([selection.mask(name).flatten() for name in values]), mask)


@pytest.mark.parametrize("order", ["largest", "smallest"])
def test_per_tensor_is_a_stable_sort_of_each(order: str):
    values = scores((30, 7), (5,), (2, 3, 4))
    selection = fk.select(values, fk.PerTensorTopK(k=4, order=order))
    for name, value in values.items():
        first = value.flatten().sort(stable=True, descending=order == "largest").indices[:4]
        assert selection.indices(name).tolist() == sorted(first.tolist())


@pytest.mark.parametrize("order", ["largest", "smallest"])
@pytest.mark.parametrize("piece", [1, 50, 2**20])
def test_per_row_is_a_stable_sort_of_each_row(order: str, piece: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fishkern.selection._rows.PIECE", piece)
    values = scores((30, 7), (8, 3, 5), (0, 4))
    selection = fk.select(values, fk.PerRowTopK(3, order=order))
    for name, value in values.items():
        rows = value.flatten(1)
        expected = torch.zeros_like(rows, dtype=torch.bool)
        expected.scatter_(1, rows.sort(dim=1, stable=True, descending=order == "largest").indices[:, :3], True)
        assert torch.equal(selection.mask(name).flatten(1), expected)


@pytest.mark.filterwarnings("error")
def test_scores_of_a_mapping_may_be_negative():
    """Their sign counts: the smallest are the most negative."""
    values = {"w": torch.tensor([3.0, -5.0, 0.0, -1.0])}  # a zero among the first is no tie, and not warned of
    assert fk.select(values, fk.GlobalTopK(k=2)).indices("w").tolist() == [0, 2]
    assert fk.select(values, fk.GlobalTopK(k=2, order="smallest")).indices("w").tolist() == [1, 3]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (fk.GlobalTopK, "k=2 is less than the 3 scores in the pool that are exactly zero, .* by their position alone"),
        (fk.PerTensorTopK, "k=2 is less than the number of scores in 1 of 2 parameters .such as w. that are exactly"),
        (fk.PerRowTopK, "k=2 is less than the number of scores in some rows of 1 of 2 parameters .such as w. that are"),
    ],
)
def test_zeros_that_are_smallest_by_their_position_are_warned_of(make: type[fk.Rule], says: str):
    """Of equal zeros the first are taken; where all of them are, or none, nothing is to be said."""
    values = {"v": torch.full((1, 5), 0.5), "w": torch.tensor([[3.0, 0.0, 0.0, 2.0, 0.0]])}
    with pytest.warns(UserWarning, match=says) as caught:
        assert fk.select(values, make(k=2, order="smallest")).indices("w").tolist() == [1, 2]
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fk.select(values, make(k=3, order="smallest"))
        fk.select(values, make(k=4, order="smallest"))
        fk.select(values, make(k=2, order="largest"))
        signed = {"v": values["v"], "w": torch.tensor([[-3.0, 0.0, 0.0, -2.0, 0.0]])}
        fk.select(signed, make(k=2, order="smallest"))
        for order in ("largest", "smallest"):
            fk.select(values, make(k=5, order=order) if make is not fk.GlobalTopK else make(k=10, order=order))


@pytest.mark.parametrize(
    ("density", "total", "k"),
    [(0.005, 1000, 5), (0.29, 100, 29), (0.57, 100, 57), (0.1, 30, 3), (1e-9, 10**9, 1), (0.0049, 1000, 4), (1, 7, 7)],
)
def test_density_is_a_decimal_number(density: float, total: int, k: int):
    """``int(0.29 * 100)`` is 28."""
    assert share(density, total) == k
    assert share(torch.tensor(density, dtype=torch.float64).item(), total) == k


def test_density_counts_the_whole_pool():
    values = scores((10, 10), (10, 10))
    selection = fk.select(values, fk.GlobalTopK(density=0.25, always="p1"))
    assert (selection.k, selection.count, selection.total) == (50, 150, 200)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("k", [0, 7, 60, 119, 120])
def test_random_depends_on_seed_names_and_sizes_alone(seed: int, k: int):
    values = scores((10, 7), (5, 10))
    rule = fk.Random(k=k, seed=seed)
    first = fk.select(values, rule)
    torch.manual_seed(99)
    torch.rand(3)
    others = {name: torch.full_like(value, torch.nan) for name, value in reversed(values.items())}
    assert first == fk.select(others, rule)
    if 7 <= k < 119:
        assert first != fk.select(values, fk.Random(k=k, seed=seed + 1))


@pytest.mark.parametrize("k", [2, 4])
def test_random_is_uniform(k: int):
    """Each of the 15 sets is as frequent as any other (chi-square, 14 degrees of freedom: above 42 once in 10,000)."""
    values = {"a": torch.zeros(4), "b": torch.zeros(2)}
    seen = Counter()
    for seed in range(1500):
        selection = fk.select(values, fk.Random(k=k, seed=seed))
        seen[tuple(torch.cat([selection.mask(name) for name in values]).tolist())] += 1
    assert len(seen) == 15
    assert sum((count - 100) ** 2 / 100 for count in seen.values()) < 42


def test_lazy_statistics_are_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Only small tensors are read whole, and the values of 16-bit files are those in the file."""
    statistics = fk.Statistics({"a": torch.rand(300, 400), "b": torch.rand(9, 3)}, count=2)
    path = statistics.save(tmp_path / "s", dtype=torch.bfloat16)
    eager, lazy = fk.Statistics.load(path), fk.Statistics.load(path, lazy=True)
    read = StoredTensor.read

    def read_small(stored: StoredTensor, *args) -> torch.Tensor:
        assert stored.numel() <= 2**16, "a large tensor was read whole"
        return read(stored, *args)

    monkeypatch.setattr(StoredTensor, "read", read_small)
    for rule in (fk.GlobalTopK(k=900), fk.PerTensorTopK(density=0.3), fk.PerRowTopK(2), fk.Random(k=5)):
        assert fk.select(lazy, rule) == fk.select(eager, rule)
        assert fk.select(lazy, rule).provenance == fk.select(eager, rule).provenance


def test_a_file_cut_short_is_noticed(tmp_path: Path):
    path = fk.Statistics({"a": torch.rand(300, 40)}, count=2).save(tmp_path / "s")
    lazy = fk.Statistics.load(path, lazy=True)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RuntimeError, match=r"has changed since it was opened: load it again"):
        fk.select(lazy, fk.GlobalTopK(k=9))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: fk.GlobalTopK(), "give either k or density, got k=None and density=None"),
        (lambda: fk.GlobalTopK(k=3, density=0.1), "give either k or density, got k=3 and density=0.1"),
        (lambda: fk.PerTensorTopK(k=-1), "k must be at least 0, got -1"),
        (lambda: fk.Random(density=0.0), "density must be above 0 and at most 1, got 0.0"),
        (lambda: fk.GlobalTopK(density=1.5), "density must be above 0 and at most 1, got 1.5"),
        (lambda: fk.GlobalTopK(density=float("nan")), "density must be above 0 and at most 1, got nan"),
        (lambda: fk.GlobalTopK(k=1, order="top"), r"order must be one of \('largest', 'smallest'\), got 'top'"),
        (lambda: fk.PerRowTopK(-2), "k must be at least 0, got -2"),
        (lambda: fk.PerRowTopK(None), "give either k or density, got k=None and density=None"),
        (lambda: fk.GlobalTopK(k=1, always=[3]), r"always takes patterns of names, strings such as .*; got \(3,\)"),
    ],
)
def test_rules_that_cannot_be(make, says: str):
    with pytest.raises(ValueError, match=says):
        make()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: fk.GlobalTopK(k=2.5), "k must be an integer, got 2.5"),
        (lambda: fk.PerTensorTopK(k=torch.tensor(3.0)), r"k must be an integer, got tensor\(3.\)"),
        (lambda: fk.PerRowTopK("3"), "k must be an integer, got '3'"),
        (lambda: fk.Random(k=1, seed="0"), "seed must be an integer, got '0'"),
        (lambda: fk.Random(density="0.1"), "density must be a number, got '0.1'"),
        (lambda: fk.GlobalTopK(density=torch.rand(2)), r"density must be a number, got tensor\("),
    ],
)
def test_what_is_no_number_is_refused_at_once(make, says: str):
    with pytest.raises(TypeError, match=says):
        make()


def test_a_rule_that_no_header_can_hold_is_refused_before_it_chooses():
    @dataclass(frozen=True)
    class Own(fk.Rule):
        threshold: object

        def choose(self, scores, total, backend=None):
            pytest.fail("it has chosen")

    with pytest.raises(TypeError, match="Own must hold plain values, for the header of a file: .* Tensor"):
        fk.select({"w": torch.rand(3)}, Own(torch.tensor(0.5)))


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        (fk.GlobalTopK(k=28), "k=28 of a pool of 27 was requested, but only 27 are left"),
        (fk.GlobalTopK(density=1.0, always="b"), "k=27 of a pool of 27 was requested, but only 24 are left .*: lower"),
        (fk.Random(k=25, never="b"), "k=25 of a pool of 27 was requested, but only 24 are left"),
        (fk.PerTensorTopK(k=4), "k=4 exceeds the size of 1 of 2 parameters, such as b: take density="),
        (fk.PerRowTopK(2), r"1 of 2 parameters have no rows, such as b of shape \(3,\): name them in always="),
        (fk.PerRowTopK(7, never="b"), "k=7 exceeds the rows of 1 of 1 parameters, such as w with rows of 6: lower k"),
    ],
)
def test_budgets_that_cannot_be_met(rule: fk.Rule, says: str):
    with pytest.raises(ValueError, match=says):
        fk.select({"w": torch.rand(4, 6), "b": torch.rand(3)}, rule)


def test_what_cannot_be_selected_from():
    with pytest.raises(TypeError, match=r"rule must be a selection rule such as GlobalTopK.*, got 0.005"):
        fk.select({"w": torch.rand(3)}, 0.005)
    with pytest.raises(TypeError, match="scores are floating tensors, w is torch.int64: cast it"):
        fk.select({"w": torch.ones(3).long()}, fk.GlobalTopK(k=1))
    with pytest.raises(TypeError, match="scores are floating tensors, w is list"):
        fk.select({"w": [1.0]}, fk.GlobalTopK(k=1))
    w = torch.rand(3)
    for odd, message in {
        "numpy": (w.numpy(), "scores are floating tensors, w is ndarray: make a tensor of it"),
        "sparse": (w.to_sparse(), r"scores are dense tensors, w is torch.sparse_coo: make it dense"),
        "meta": (w.to("meta"), "w is on the meta device, where scores have no values"),
        "complex": (w.cfloat(), "scores are floating tensors, w is torch.complex64: cast it"),
    }.values():
        for rule in (fk.GlobalTopK(k=1), fk.PerTensorTopK(k=1), fk.PerRowTopK(1), fk.Random(k=1)):
            with pytest.raises(TypeError, match=message):
                fk.select({"w": odd}, rule)
    for rule in (fk.GlobalTopK(k=1), fk.PerTensorTopK(k=1), fk.PerRowTopK(1)):
        with pytest.raises(TypeError, match="scores must be float64, .*; w is torch.float8_e4m3fn: cast it"):
            fk.select({"v": w[None], "w": w[None].to(torch.float8_e4m3fn)}, rule)
    for odd in ([("w", w)], iter([("w", w)]), w, "fisher.safetensors", None):
        with pytest.raises(TypeError, match=f"a mapping from names to tensors, .*; got {type(odd).__name__}"):
            fk.select(odd, fk.GlobalTopK(k=1))
    with pytest.raises(TypeError, match="by the names of parameters, strings; got 0"):
        fk.select({0: w}, fk.GlobalTopK(k=1))
    with pytest.raises(ValueError, match="two names become w without wrappers"):
        fk.select({"w": torch.rand(3), "_orig_mod.w": torch.rand(3)}, fk.GlobalTopK(k=1))
    assert fk.select({}, fk.GlobalTopK(density=0.5)).count == 0
