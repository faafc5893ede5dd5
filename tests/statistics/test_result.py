"""Statistics are a frozen mapping, and merging them is taking the mean over all units."""

import copy
import pickle
from functools import reduce

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from fishkern.statistics import Covered, Statistics, merge
from tests.support.closeness import assert_as_accurate

SHAPES = {"embed.weight": (5, 3), "norm.weight": (3,), "scale": (), "empty": (0, 4)}
DEFINITION = {"estimator": "DiagonalFisher", "fisher_type": "empirical", "unit": "example"}


def make(seed: int = 0, count: int = 4, *, paths: dict[str, Covered] | None = None, **definition) -> Statistics:
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.rand(shape, generator=generator) for name, shape in SHAPES.items()}
    coverage = {name: Covered("fused", tensor.numel()) for name, tensor in tensors.items()}
    coverage["head.weight"] = Covered("left out", 21, "requires_grad is False")
    provenance = {"definition": DEFINITION | definition, "runs": [{"seed": seed, "model": "Tiny"}]}
    return Statistics(tensors, count=count, provenance=provenance, coverage=coverage | (paths or {}))


def test_mapping():
    statistics = make()
    assert list(statistics) == list(SHAPES)
    assert len(statistics) == 4
    assert {name: tuple(tensor.shape) for name, tensor in statistics.items()} == SHAPES
    assert {name: tuple(shape) for name, shape in statistics.shapes.items()} == SHAPES
    assert statistics.total == 15 + 3 + 1
    assert statistics.count == 4
    assert "scale" in statistics
    assert "head.weight" not in statistics
    assert sum(covered.numel for covered in statistics.coverage.values()) == 15 + 3 + 1 + 21


def test_unknown_and_left_out_names():
    with pytest.raises(KeyError, match=r"^'nothing'$"):
        make()["nothing"]
    with pytest.raises(KeyError, match=r"head.weight was left out: requires_grad is False"):
        make()["head.weight"]


def test_a_plain_dict_enters():
    tensor = torch.randn(3, requires_grad=True)
    statistics = Statistics({"layer._orig_mod.weight": tensor, "b": torch.ones(2).double()}, count=1)
    assert list(statistics) == ["layer.weight", "b"]
    assert all(entry.dtype == torch.float32 and not entry.requires_grad for entry in statistics.values())
    assert statistics["layer.weight"].data_ptr() == tensor.data_ptr()
    assert statistics.provenance == {"definition": {}, "runs": []}
    assert statistics.coverage == {}


def test_frozen():
    statistics = make()
    with pytest.raises(AttributeError, match=r"frozen: count cannot be set"):
        statistics.count = 7
    with pytest.raises(AttributeError, match=r"frozen: _count cannot be deleted"):
        del statistics._count
    with pytest.raises(TypeError):
        statistics["scale"] = torch.ones(())
    with pytest.raises(TypeError):
        statistics.coverage["scale"] = Covered("loop", 1)
    statistics.provenance["definition"]["unit"] = "batch"
    assert statistics.provenance["definition"]["unit"] == "example"
    with pytest.raises(TypeError, match=r"unhashable"):
        hash(statistics)


@pytest.mark.parametrize(
    ("error", "arguments", "says"),
    [
        (ValueError, dict(count=0), "count must be at least 1, got 0"),
        (TypeError, dict(count=1.5), "integer"),
        (TypeError, dict(tensors={"w": torch.ones(2).int()}), "floating tensors, w is torch.int32"),
        (TypeError, dict(tensors={"w": [1.0]}), "floating tensors, w is list"),
        (ValueError, dict(tensors={"w": torch.tensor(1e300, dtype=torch.float64)}), "w holds .*, which float32 cannot"),
        (ValueError, dict(tensors={"_orig_mod.w": torch.ones(2), "w": torch.ones(2)}), "w would both be named w"),
        (ValueError, dict(provenance={"model": "Tiny"}), r"got the keys \['model'\]"),
        (TypeError, dict(provenance={"definition": {"device": torch.device("cpu")}}), "must be JSON: .*device"),
        (TypeError, dict(provenance={"runs": [{"loss": float("nan")}]}), "must be JSON"),
        (TypeError, dict(provenance={"runs": ["a"]}), r"provenance is .*, got {} and \['a'\]"),
        (ValueError, dict(coverage={"v": Covered("left out", 2)}), "w has a statistic, but coverage does not list it"),
        (
            ValueError,
            dict(coverage={"w": Covered("left out", 2)}),
            "w has a statistic, but coverage says it was left out",
        ),
        (
            ValueError,
            dict(coverage={"w": Covered("loop", 2), "v": Covered("fused", 2)}),
            "coverage says fused for v, which has no statistic",
        ),
    ],
)
def test_what_cannot_be_statistics(error: type, arguments: dict, says: str):
    with pytest.raises(error, match=says) as raised:
        Statistics(**{"tensors": {"w": torch.ones(2)}, "count": 1} | arguments)
    assert "\n" not in str(raised.value)


def test_unknown_path():
    with pytest.raises(ValueError, match=r"path must be one of .*, got 'magic'"):
        Covered("magic", 3)


def test_equality_is_by_content():
    statistics = make()
    assert statistics == make()
    assert statistics != make(seed=1)
    assert statistics != make(count=5)
    assert statistics != make(fisher_type="mc")
    assert statistics != make(paths={"scale": Covered("loop", 1)})
    assert statistics != dict(statistics)
    assert statistics != statistics.rename(lambda name: f"model.{name}")


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_equal(again):
    copied = again(make())
    assert copied == make()
    assert list(copied) == list(SHAPES)
    with pytest.raises(AttributeError, match=r"frozen"):
        copied.count = 7


def test_repr():
    said = repr(make(count=1200))
    assert said == (
        "Statistics(DiagonalFisher empirical, 4 parameters, 19 coordinates, mean over 1,200 examples, 1 left out)"
    )
    one = Statistics({"w": torch.ones(2)}, count=1)
    assert repr(one) == "Statistics(1 parameter, 2 coordinates, mean over 1 unit)"
    definition = {"estimator": "DiagonalFisher", "unit": "position"}
    by_position = Statistics({"w": torch.ones(2)}, count=3, provenance={"definition": definition})
    assert repr(by_position) == "Statistics(DiagonalFisher, 1 parameter, 2 coordinates, mean over 3 examples)"


def test_rename():
    renamed = make().rename(lambda name: f"base_model.model.{name}")
    assert list(renamed) == [f"base_model.model.{name}" for name in SHAPES]
    assert renamed.coverage["base_model.model.head.weight"].path == "left out"
    assert renamed.rename(lambda name: name.removeprefix("base_model.model.")) == make()
    with pytest.raises(ValueError, match=r"embed.weight and norm.weight would both be named w"):
        make().rename(lambda name: "w" if name.endswith("weight") else name)


@given(st.lists(st.integers(1, 5), min_size=2, max_size=5), st.integers(0, 2**31), st.sampled_from([1e-9, 1.0, 1e9]))
def test_split_and_merge_equals_the_whole(counts: list[int], seed: int, scale: float):
    units = torch.rand(sum(counts), 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    parts = [Statistics({"w": part.mean(0)}, count=len(part)) for part in units.split(counts)]
    merged = merge(*parts)
    assert merged.count == sum(counts)
    assert_as_accurate(merged["w"], units.float().mean(0), units.mean(0))


@given(st.lists(st.integers(1, 1000), min_size=3, max_size=3), st.integers(0, 2**31))
def test_merge_is_commutative_and_associative(counts: list[int], seed: int):
    a, b, c = (make(seed + n, count) for n, count in enumerate(counts))
    assert merge(a, b) == merge(b, a)  # to the last bit
    for grouped in (merge(merge(a, b), c), merge(a, merge(b, c))):
        assert grouped.count == sum(counts)
        assert grouped.coverage == merge(a, b, c).coverage
        assert grouped.provenance == merge(a, b, c).provenance
        for name in SHAPES:
            torch.testing.assert_close(grouped[name], merge(a, b, c)[name])


@given(st.integers(1, 2**20), st.integers(1, 2**20), st.integers(0, 2**31))
def test_merging_equals_leaves_the_mean(m: int, n: int, seed: int):
    merged = merge(make(seed, m), make(seed, n))
    assert all(torch.equal(merged[name], tensor) for name, tensor in make(seed).items())


@given(st.integers(1, 9), st.integers(1, 9))
def test_units_of_zero_only_change_the_count(m: int, n: int):
    assume(m != n)
    zeros = Statistics({name: torch.zeros(shape) for name, shape in SHAPES.items()}, count=n)
    ours = Statistics(dict(make()), count=m)
    for name, tensor in merge(ours, zeros).items():
        torch.testing.assert_close(tensor * (m + n), tensor.new_tensor(m) * ours[name])


def test_merge_keeps_order_and_runs():
    a, b = make(0), make(1)
    shuffled = Statistics(dict(reversed(list(b.items()))), count=4, provenance=b.provenance, coverage=b.coverage)
    merged = merge(a, shuffled)
    assert list(merged) == list(SHAPES)
    assert merged == merge(a, b)
    assert [run["seed"] for run in merged.provenance["runs"]] == [0, 1]
    assert merged.provenance["definition"] == DEFINITION


def test_merge_takes_the_slower_path_and_every_reason():
    paths = [
        {"scale": Covered("generic", 1, "no rule")},
        {"scale": Covered("loop", 1, "not captured")},
        {},
        {"head.weight": Covered("left out", 21, "by the caller")},
    ]
    for order in (paths, paths[::-1]):
        merged = reduce(merge, [make(paths=path) for path in order])
        assert merged.coverage["scale"] == Covered("loop", 1, "no rule; not captured")
        assert merged.coverage["head.weight"] == Covered("left out", 21, "by the caller; requires_grad is False")
        assert merged.coverage["norm.weight"] == Covered("fused", 3)


def test_merge_with_statistics_of_unknown_coverage():
    unknown = Statistics(dict(make()), count=1, provenance=make().provenance)
    assert merge(make(), unknown).coverage == merge(unknown, make()).coverage == make().coverage


def test_merge_by_weights():
    """Weights replace the counts, and are added to the definition, one list for each merge."""
    a, b, c = (make(seed, count) for seed, count in ((0, 3), (1, 5), (2, 8)))
    merged = merge(a, b, c, weights=(0.5, 0, 2))
    for name in a:
        torch.testing.assert_close(merged[name], (0.5 * a[name] + 2 * c[name]) / 2.5)
    assert merged.count == 16
    assert merged.provenance["definition"] == {**DEFINITION, "weights": [[0.5, 0, 2]]}
    twice = merge(merged, merged, weights=torch.tensor([1, 3]))
    assert twice.provenance["definition"]["weights"] == [[0.5, 0, 2], [1, 3]]
    with pytest.raises(ValueError, match="only statistics of one definition merge; these differ in weights"):
        merge(merged, a)
    for weights in ((1,), (1, 2, 3), (0, 0), (1, -1), (1, float("inf")), (1, float("nan"))):
        with pytest.raises(ValueError, match="weights must be one number of at least 0 for each of the 2 statistics"):
            merge(a, b, weights=weights)


def test_merge_says_what_to_write():
    a = make()
    with pytest.raises(TypeError, match=r"one by one: merge\(\*parts\), not merge\(parts\)"):
        merge([a, a])
    with pytest.raises(TypeError, match="merge takes statistics, such as estimate gives, got Linear"):
        merge(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="merge takes statistics, such as estimate gives, got dict"):
        merge(a, dict(a))
    with pytest.raises(TypeError, match=r"two statistics or more: merge\(a, b\)"):
        merge(a)


def test_merge_names_what_differs():
    with pytest.raises(ValueError, match=r"fisher_type \('empirical' and 'mc'\), mc_samples \(absent and 4\)"):
        merge(make(), make(fisher_type="mc", mc_samples=4))
    fewer = Statistics({"scale": torch.ones(())}, count=1, provenance=make().provenance)
    for pair in ((make(), fewer), (fewer, make())):
        with pytest.raises(ValueError, match=r"one lacks embed.weight, norm.weight, empty\."):
            merge(*pair)
    other = Statistics({"w": torch.ones(3)}, count=1)
    with pytest.raises(ValueError, match=r"w has shape \(3,\) in one and \(3, 1\) in the other"):
        merge(other, other, Statistics({"w": torch.ones(3, 1)}, count=1))
    with pytest.raises(ValueError, match=r"head.weight has 21 coordinates in one model and 22 in the other"):
        merge(make(), make(paths={"head.weight": Covered("left out", 22)}))
