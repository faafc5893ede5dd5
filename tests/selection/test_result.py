"""Selections are frozen sets of coordinates, out of a pool that they remember."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fishkern as fk
from fishkern.selection.result import Selection

SHAPES = {"embed.weight": (5, 3), "norm.weight": (3,), "scale": (), "empty": (0, 4)}


def make(**indices: list[int]) -> Selection:
    chosen = {name.replace("_", "."): torch.tensor(values) for name, values in indices.items()}
    return Selection(SHAPES, chosen)


def as_set(selection: Selection) -> set[tuple[str, int]]:
    return {(name, index) for name in selection.names for index in selection.indices(name).tolist()}


def test_pool_and_contents():
    selection = make(embed_weight=[14, 0, 7], scale=[0])
    assert selection.names == tuple(SHAPES)
    assert {name: tuple(shape) for name, shape in selection.shapes.items()} == SHAPES
    assert selection.counts == {"embed.weight": 3, "norm.weight": 0, "scale": 1, "empty": 0}
    assert (selection.count, selection.total, selection.density) == (4, 19, 4 / 19)
    assert selection.indices("embed.weight").tolist() == [0, 7, 14]
    assert all(selection.indices(name).dtype == torch.int32 for name in SHAPES)
    for name, shape in SHAPES.items():
        mask = selection.mask(name)
        assert (tuple(mask.shape), mask.dtype) == (shape, torch.bool)
        assert mask.flatten().nonzero().flatten().tolist() == selection.indices(name).tolist()
    assert selection.mask("scale").item() is True
    assert "empty" in selection
    assert "lm_head" not in selection
    for read in (selection.indices, selection.mask):
        with pytest.raises(KeyError, match="lm_head is not in the pool of 4 names"):
            read("lm_head")
    assert Selection({}, {}).density == 0.0


def test_whole_parameters_keep_no_list():
    by_name = Selection(SHAPES, {}, whole=["norm.weight", "empty"])
    by_indices = Selection(SHAPES, {"norm.weight": torch.tensor([2, 0, 1])})
    assert by_name == by_indices
    assert by_name.whole == by_indices.whole == ("norm.weight",)
    assert by_name.indices("norm.weight").tolist() == [0, 1, 2]
    assert by_name.mask("norm.weight").all()
    assert by_name.count == 3


def test_large_parameters_have_long_indices():
    """Without the memory: only the list is kept."""
    last = {"w": torch.tensor([2**32 - 1]), "v": torch.tensor([2**31 - 1])}
    selection = Selection({"w": (2**16, 2**16), "v": (2**31,)}, last)
    assert selection.indices("w").dtype == torch.int64
    assert selection.indices("v").dtype == torch.int32
    assert selection.indices("w").tolist() == [2**32 - 1]
    assert selection.total == 2**32 + 2**31
    assert (selection & selection) == selection == (selection | selection)
    assert (selection - selection).count == 0


def test_wrappers_are_taken_out():
    selection = Selection({"_orig_mod.a._orig_mod.w": (3,)}, {"_orig_mod.a.w": torch.tensor([1])}, whole=[])
    assert selection.names == ("a.w",)
    assert selection.indices("a.w").tolist() == [1]


def test_frozen():
    selection = make()
    with pytest.raises(AttributeError, match="frozen: count cannot be set"):
        selection.count = 3
    with pytest.raises(AttributeError, match="frozen: _entries cannot be deleted"):
        del selection._entries
    with pytest.raises(TypeError):
        selection.shapes["x"] = (3,)
    with pytest.raises(TypeError, match="unhashable"):
        hash(selection)
    assert copy.deepcopy(selection) == selection == pickle.loads(pickle.dumps(selection))


def test_an_older_pickle_loads():
    """It had a list of indices for each name, or None for all."""
    selection = make(embed_weight=[1, 5])
    names = selection.names
    entries = {name: None if name in selection.whole else selection.indices(name) for name in names}
    older = Selection.__new__(Selection)
    older.__setstate__({"_shapes": dict(selection.shapes), "_entries": entries, "_provenance": '{"k": 2}'})
    assert older == selection
    assert older.k == 2
    assert pickle.loads(pickle.dumps(older)) == selection


def test_what_it_was_made_of_may_change():
    """Also where nothing had to be sorted or cast."""
    given = {"embed.weight": torch.tensor([1, 5, 9], dtype=torch.int32), "norm.weight": torch.tensor([2, 0])}
    shapes = dict(SHAPES)
    selection = Selection(shapes, given)
    for tensor in given.values():
        tensor.fill_(1)
    shapes["norm.weight"] = (7,)
    assert selection == make(embed_weight=[1, 5, 9], norm_weight=[0, 2])


@pytest.mark.parametrize(
    ("error", "arguments", "says"),
    [
        (ValueError, dict(indices={"head": torch.tensor([0])}), "head is not in the pool of 4 names: give its shape"),
        (ValueError, dict(whole=["head"]), "head is not in the pool"),
        (ValueError, dict(indices={"norm.weight": torch.tensor([3])}), "norm.weight has 3 coordinates, .* index is 3"),
        (ValueError, dict(indices={"norm.weight": torch.tensor([-1])}), "has 3 coordinates, .* index is -1"),
        (ValueError, dict(indices={"norm.weight": torch.tensor([1, 1])}), "the indices of norm.weight repeat"),
        (TypeError, dict(indices={"norm.weight": torch.tensor([1.0])}), r"of norm.weight are torch.float32 \(1,\)"),
        (TypeError, dict(indices={"norm.weight": torch.ones(3, dtype=torch.bool)}), "torch.bool"),
        (TypeError, dict(indices={"norm.weight": [1]}), "those of norm.weight are list"),
        (ValueError, dict(shapes={"w.a": (1,), "_orig_mod.w.a": (1,)}), "w.a and _orig_mod.w.a would both be"),
        (ValueError, dict(shapes={"a": (4, -1)}), r"a has the shape \(4, -1\), and no size is below zero"),
        (TypeError, dict(provenance={"k": object()}), "provenance must be JSON"),
    ],
)
def test_refusals(error: type, arguments: dict, says: str):
    with pytest.raises(error, match=says):
        Selection(**{"shapes": SHAPES, "indices": {}} | arguments)


POOLS = st.dictionaries(st.sampled_from("abc"), st.sets(st.integers(0, 9)), min_size=1)


@given(POOLS, POOLS)
def test_set_algebra(ours: dict[str, set[int]], theirs: dict[str, set[int]]):
    def selection(chosen: dict[str, set[int]]) -> Selection:
        indices = {name: torch.tensor(sorted(places), dtype=torch.int64) for name, places in chosen.items()}
        return Selection(dict.fromkeys(chosen, (2, 5)), indices)

    a, b = selection(ours), selection(theirs)
    for result, expected in [
        (a | b, as_set(a) | as_set(b)),
        (a & b, as_set(a) & as_set(b)),
        (a - b, as_set(a) - as_set(b)),
    ]:
        assert as_set(result) == expected
        assert set(result.names) == set(a.names) | set(b.names)
        assert result.count == len(expected)
    union = as_set(a) | as_set(b)
    assert a.overlap(b) == b.overlap(a) == (len(as_set(a) & as_set(b)) / len(union) if union else 1.0)
    assert (a | b) == (b | a)
    assert a.overlap(a) == 1.0
    for name, overlap in a.overlap_by_parameter(b).items():
        mine, yours = ours.get(name, set()), theirs.get(name, set())
        assert overlap == (len(mine & yours) / len(mine | yours) if mine | yours else 1.0)


def test_algebra_needs_equal_shapes():
    a, b = make(), Selection({"norm.weight": (4,)}, {})
    for combine in (a.union, a.intersection, a.difference, a.overlap, a.overlap_by_parameter):
        with pytest.raises(ValueError, match=r"norm.weight is \(3,\) in one selection and \(4,\) in the other"):
            combine(b)


def test_equality_is_of_pool_and_contents():
    a = make(embed_weight=[1, 2])
    assert a == make(embed_weight=[2, 1])
    assert a == Selection(dict(reversed(SHAPES.items())), {"embed.weight": torch.tensor([1, 2])}, provenance={"k": 2})
    assert a != make(embed_weight=[1])
    assert a != make(embed_weight=[1, 3])
    assert a != Selection({**SHAPES, "more": (1,)}, {"embed.weight": torch.tensor([1, 2])})
    assert a != Selection({**SHAPES, "scale": (1,)}, {"embed.weight": torch.tensor([1, 2])})
    assert make() != Selection(SHAPES, {}, whole=["scale"])
    assert a != "something else"


def test_restrict():
    selection = Selection(SHAPES, {"embed.weight": torch.tensor([4])}, whole=["norm.weight"], provenance={"k": 1})
    for keep in ("*.weight", ["embed.*", "norm.*"], lambda name: name.endswith("weight")):
        part = selection.restrict(keep)
        assert part.names == ("embed.weight", "norm.weight")
        assert part.counts == {"embed.weight": 1, "norm.weight": 3}
        assert part.provenance == {"k": 1}
    with pytest.raises(ValueError, match=r"keep='head.\*' matches no name of the pool"):
        selection.restrict("head.*")


def test_rename():
    selection = Selection(SHAPES, {"embed.weight": torch.tensor([4])}, whole=["norm.weight"])
    renamed = selection.rename(lambda name: f"base_model.model.{name}")
    assert renamed.names == tuple(f"base_model.model.{name}" for name in SHAPES)
    assert renamed.rename(lambda name: name.removeprefix("base_model.model.")) == selection
    with pytest.raises(ValueError, match=r"embed.weight and norm.weight would both be named x"):
        selection.rename(lambda name: "x")


class Tied(nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, width)
        self.norm = nn.LayerNorm(3)
        self.head = nn.Linear(width, 5, bias=False)
        self.head.weight = self.embed.weight


def test_check_against_a_model():
    pool = {"embed.weight": (5, 3), "norm.weight": (3,), "head.weight": (5, 3)}
    selection = Selection(pool, {"embed.weight": torch.tensor([1])})
    model = Tied()
    selection.check(model)
    selection.check(nn.DataParallel(model))
    selection.check(dict(model.named_parameters(remove_duplicate=False)).items())
    with pytest.raises(ValueError, match=r"2 shapes differ \(embed.weight is \(5, 3\) here and \(5, 4\) there, head"):
        selection.check(Tied(width=4))
    with pytest.raises(ValueError, match=r"3 of 3 names are not in the model \(0.embed.weight, .*rename\(") as raised:
        selection.rename(lambda name: f"0.{name}").check(model)
    assert "\n" not in str(raised.value)


def test_repr():
    scores: dict[str, Tensor] = {"w": torch.rand(30, 40), "b": torch.rand(30), "c": torch.rand(4)}
    selection = fk.select(scores, fk.GlobalTopK(density=0.1, always="b", never="c"))
    assert repr(selection) == (
        "Selection(GlobalTopK, 153 of 1,234 coordinates, density 0.124, in 2 of 3 parameters, 1 whole)"
    )
    assert repr(make(scale=[0])) == "Selection(1 of 19 coordinates, density 0.0526, in 1 of 4 parameters, 1 whole)"
