"""What is selected of one parameter is a set of its entries, however it is written."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn

import fishkern as fk
from fishkern.selection import Columns, Entries, Rows
from fishkern.selection.ranges import Ranges

SHAPES = [(), (7,), (4, 5), (3, 2, 2), (1, 6), (6, 1), (0, 3), (3, 0)]


@st.composite
def ranges(draw, kind: type[Ranges], shape: torch.Size) -> Ranges:
    end = st.integers(0, kind.size(shape))
    return kind(*(sorted(draw(st.tuples(end, end))) for _ in range(draw(st.integers(0, 3)))))


@st.composite
def selected(draw, shape: torch.Size) -> Ranges | torch.Tensor:
    """Rows, columns, or a list of entries."""
    match draw(st.sampled_from([Rows, Columns, list])):
        case kind if kind is not list:
            return draw(ranges(kind, shape))
    numel = shape.numel()
    places = draw(st.lists(st.integers(0, numel - 1), unique=True)) if numel else []
    return torch.tensor(places, dtype=torch.int64)


@st.composite
def entries(draw, number: int) -> tuple[Entries, ...]:
    """Some of one shape."""
    shape = torch.Size(draw(st.sampled_from(SHAPES)))
    return tuple(Entries.of(shape, draw(selected(shape))) for _ in range(number))


def as_set(one: Entries) -> set[int]:
    return set(one.indices().tolist())


def oracle(shape: torch.Size, given: Ranges | torch.Tensor) -> set[int]:
    """The flat indices, by the definition of a row and a column."""
    if isinstance(given, torch.Tensor):
        return set(given.tolist())
    numbers = torch.arange(shape.numel()).view(shape)
    if len(shape) < 2:
        matrix = numbers.view(-1, 1) if isinstance(given, Rows) else numbers.view(1, -1)
    else:
        matrix = numbers.flatten(1) if shape.numel() else numbers.new_empty(0, 1)
    kept = [matrix[a:b] if isinstance(given, Rows) else matrix[:, a:b] for a, b in given.bounds]
    return {int(number) for part in kept for number in part.reshape(-1)}


@given(st.data(), st.sampled_from(SHAPES))
def test_every_reading_is_of_the_same_set(data, shape):
    shape = torch.Size(shape)
    given = data.draw(selected(shape))
    one, expected = Entries.of(shape, given), sorted(oracle(shape, given))
    assert one.indices().tolist() == expected
    assert one.indices().dtype == torch.int32
    assert one.count == len(expected)
    assert one.is_all == (len(expected) == shape.numel() > 0)
    mask = torch.zeros(shape, dtype=torch.bool)
    mask.view(-1)[expected] = True
    assert torch.equal(one.mask(), mask)
    assert (one.spans is None) == (not one.is_all and not isinstance(one.ranges, Rows))
    if one.spans is not None:
        assert [i for start, stop in one.spans for i in range(start, stop)] == expected
    assert one == Entries.of(shape, torch.tensor(expected, dtype=torch.int64))
    assert one == copy.deepcopy(one) == pickle.loads(pickle.dumps(one))


@given(entries(2))
def test_set_algebra(pair):
    a, b = pair
    for result, expected in [
        (a | b, as_set(a) | as_set(b)),
        (a & b, as_set(a) & as_set(b)),
        (a - b, as_set(a) - as_set(b)),
    ]:
        assert result.indices().tolist() == sorted(expected)
        assert result == Entries.of(a.shape, torch.tensor(sorted(expected), dtype=torch.int64))
    assert a.shared(b) == len(as_set(a) & as_set(b))
    assert (a == b) == (as_set(a) == as_set(b))


@given(entries(2))
def test_moves_pair_the_places_of_shared_entries(pair):
    a, b = pair
    ours, theirs = a.indices(), b.indices()
    moved = [(ours[here], theirs[there]) for here, there in a.moves(b)]
    assert all(torch.equal(here, there) for here, there in moved)
    assert [i for here, _ in moved for i in here.tolist()] == sorted(as_set(a) & as_set(b))


@given(entries(1), st.integers(1, 5))
def test_values_are_read_and_written_at_the_entries(one, piece):
    (one,) = one
    values = torch.randn(one.shape)
    strided = values.mT.contiguous().mT if values.ndim > 1 else values
    indices = one.indices().long()
    for tensor in (values.clone(), strided.clone(memory_format=torch.preserve_format)):
        assert torch.equal(one.gather(tensor), values.reshape(-1)[indices])
        expected = values.reshape(-1).double().index_fill(0, indices, 2.0)
        one.scatter_(tensor, torch.full((one.count,), 2.0, dtype=torch.float64))
        assert torch.equal(tensor.reshape(-1).double(), expected)
    flat = values.reshape(-1).clone()
    for start in range(0, len(flat), piece):
        one.fill_(flat[start : start + piece], 2.0, start)
    assert torch.equal(flat.double(), values.reshape(-1).double().index_fill(0, indices, 2.0))


def test_ranges_stay_ranges():
    """Also those of all and of none, which are ranges of either axis."""
    shape = torch.Size((8, 6))
    rows, columns = Entries.of(shape, Rows((0, 4), (6, 8))), Entries.of(shape, Columns((1, 5)))
    everything, nothing = Entries.all(shape), Entries.none(shape)
    assert (rows - Entries.of(shape, Rows((1, 2), (7, 8)))).ranges == Rows((0, 1), (2, 4), (6, 7))
    assert (rows | Entries.of(shape, Rows((4, 6)))).ranges == Rows((0, 8))
    assert (columns - Entries.of(shape, Columns((2, 3)))).ranges == Columns((1, 2), (3, 5))
    assert (everything - columns).ranges == Columns((0, 1), (5, 6))
    assert (everything - rows).ranges == Rows((4, 6))
    assert (nothing | columns).ranges == Columns((1, 5))
    assert (rows & columns).ranges is None
    assert Entries.of(shape, torch.arange(12)).ranges is None
    assert Entries.of(torch.Size((5,)), Columns((1, 3))).ranges == Rows((1, 3))


def test_rows_of_a_large_parameter_cost_nothing():
    shape = torch.Size((2**20, 2**14))
    rows = Entries.of(shape, Rows((0, 2**19)))
    rest = Entries.all(shape) - rows
    assert rest.count == rest.shared(rest) == 2**33
    assert rest != rows
    assert (rows | rest).is_all
    assert len(pickle.dumps(rest)) < 1000


def test_ranges_are_joined_and_frozen():
    assert Rows((5, 9), (0, 2), slice(2, 4), (3, 6), (7, 7)) == Rows(slice(9))
    assert Rows((0, 2), (3, 4)).bounds == ((0, 2), (3, 4))
    assert len(Rows((0, 2), (3, 4))) == 3
    assert Rows((0, 2)) != Columns((0, 2))
    assert repr(Rows(slice(4, 9), (1, 2))) == "Rows((1, 2), (4, 9))"
    assert len({Rows((0, 2)), Rows(slice(2)), Columns((0, 2))}) == 2
    with pytest.raises(AttributeError, match="Rows is frozen: bounds cannot be set"):
        Rows((0, 2)).bounds = ()


@pytest.mark.parametrize(
    ("error", "make", "says"),
    [
        (ValueError, lambda: Rows((3, 2)), r"a range starts before it stops, got \(3, 2\)"),
        (ValueError, lambda: Rows((-1, 2)), "the start of a range must be at least 0, got -1"),
        (ValueError, lambda: Rows(slice(0, 4, 2)), r"a range has a stop and no step, got slice\(0, 4, 2\)"),
        (ValueError, lambda: Columns(slice(3, None)), "a range has a stop and no step"),
        (TypeError, lambda: Rows(3), r"a range is slice\(start, stop\) or \(start, stop\), got 3"),
        (TypeError, lambda: Rows("ab"), "a range is slice"),
        (TypeError, lambda: Rows((0, 1.5)), "the stop of a range must be an integer, got 1.5"),
    ],
)
def test_what_is_no_range(error: type, make, says: str):
    with pytest.raises(error, match=says):
        make()


POOL = {"w": (8, 6), "conv": (4, 3, 2), "bias": (5,), "head": (2, 2), "bare": (3, 3)}


def ranged() -> fk.Selection:
    chosen = {"w": fk.Rows(slice(0, 4), slice(6, 8)), "conv": fk.Columns((1, 5)), "bias": fk.Rows((2, 4))}
    return fk.Selection(POOL, {"bare": torch.tensor([4, 0])}, whole=["head"], ranges=chosen, provenance={"k": 3})


def listed(selection: fk.Selection) -> fk.Selection:
    """The same selection without ranges."""
    return fk.Selection(selection.shapes, {name: selection.indices(name).clone() for name in selection.names})


def test_a_selection_of_ranges_is_that_of_the_same_entries():
    selection = ranged()
    assert selection == listed(selection)
    assert selection.counts == {"w": 36, "conv": 16, "bias": 2, "head": 4, "bare": 2}
    assert selection.whole == ("head",)
    assert [selection.entries(name).ranges for name in ("w", "conv", "bare")] == [
        fk.Rows((0, 4), (6, 8)),
        fk.Columns((1, 5)),
        None,
    ]
    selection.check([(name, torch.empty(shape)) for name, shape in POOL.items()])
    narrowed = selection.restrict(["w", "conv"]).rename(lambda name: f"model.{name}")
    assert narrowed.entries("model.w").ranges == fk.Rows((0, 4), (6, 8))
    other = fk.Selection(POOL, {}, ranges={"w": fk.Rows((2, 7))})
    assert (selection - other).entries("w").ranges == fk.Rows((0, 2), (7, 8))
    assert (selection | other).entries("w").ranges == fk.Rows((0, 8))
    assert selection.overlap(other) == listed(selection).overlap(listed(other)) == 18 / (60 + 30 - 18)
    assert selection.overlap_by_parameter(other)["w"] == 18 / (36 + 30 - 18)
    with pytest.raises(KeyError, match="x is not in the pool of 5 names"):
        selection.entries("x")


@pytest.mark.parametrize(
    ("error", "arguments", "says"),
    [
        (ValueError, dict(ranges={"w": fk.Rows((0, 9))}), r"w \(8, 6\) has 8 rows, but a range stops at 9"),
        (ValueError, dict(ranges={"conv": fk.Columns((0, 7))}), r"conv \(4, 3, 2\) has 6 columns, but a range stops"),
        (ValueError, dict(ranges={"x": fk.Rows((0, 1))}), "x is not in the pool of 5 names"),
        (ValueError, dict(ranges={"w": fk.Rows((0, 1))}, whole=["w"]), "w is in ranges= and in whole=: give one"),
        (
            ValueError,
            dict(ranges={"w": fk.Rows((0, 1))}, indices={"w": torch.tensor([1])}),
            "w is in ranges= and in indices: give one",
        ),
        (TypeError, dict(ranges={"w": slice(0, 1)}), "ranges are Rows or Columns; those of w are slice"),
    ],
)
def test_ranges_that_do_not_fit(error: type, arguments: dict, says: str):
    with pytest.raises(error, match=says):
        fk.Selection(**{"shapes": POOL, "indices": {}} | arguments)


def test_ranges_come_back_from_a_file(tmp_path: Path):
    """They cost no tensor, and mark the file as one that an older fishkern cannot read."""
    selection = ranged()
    path = selection.save(tmp_path / "s")
    loaded = fk.Selection.load(path)
    assert loaded == selection
    assert loaded.entries("w").ranges == selection.entries("w").ranges
    assert loaded.entries("conv").ranges == selection.entries("conv").ranges
    with safe_open(path, framework="pt") as file:
        assert list(file.keys()) == ["bare"]
        metadata = file.metadata()
    assert metadata["format_version"] == "2"
    assert json.loads(metadata["pool"])["w"] == [[8, 6], {"rows": [[0, 4], [6, 8]]}]
    with safe_open(listed(selection).save(tmp_path / "t"), framework="pt") as file:
        assert file.metadata()["format_version"] == "1"


@pytest.mark.parametrize("given", [{"w": fk.Rows((0, 2), (5, 7))}, {"w": fk.Columns((1, 4))}], ids=["rows", "columns"])
def test_a_delta_of_ranges_is_that_of_the_same_entries(tmp_path: Path, given):
    torch.manual_seed(0)
    base, trained = (nn.ParameterDict({"w": torch.randn(8, 6)}) for _ in range(2))
    selection = fk.Selection({"w": (8, 6)}, {}, ranges=given)
    with torch.no_grad():
        trained["w"].copy_(torch.where(selection.mask("w"), trained["w"], base["w"]))
    delta, plain = fk.delta(trained, selection), fk.delta(trained, listed(selection))
    assert torch.equal(delta.values("w"), plain.values("w"))
    assert delta._digests == plain._digests
    loaded = fk.Delta.load(delta.save(tmp_path / "d"))
    assert loaded.selection.entries("w").ranges == given["w"]
    before = fk.apply_delta(base, loaded)
    assert torch.equal(base["w"], trained["w"])
    fk.apply_delta(base, before)
    with torch.no_grad():
        base["w"].view(-1)[(~selection.mask("w")).view(-1).nonzero()[0]] += 1
    with pytest.raises(ValueError, match="the model is not the delta's base: 1 of 1 parameters differ"):
        fk.apply_delta(base, loaded)
