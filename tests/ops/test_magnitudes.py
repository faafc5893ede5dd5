"""Magnitudes as integers: their order, the places of values, and bounds that a rising function brings to edges."""

from __future__ import annotations

import math

import pytest
import torch

from fishkern.ops import magnitudes
from fishkern.ops.magnitudes import count_below, key_dtype, keys_of, keys_reaching, magnitudes_at, values_of

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_have_the_order_of_magnitudes(dtype):
    values = torch.tensor([0.0, -0.0, 1e-40, -1e-3, 1e-3, -1.0, 1.5, -3e38, math.inf, math.nan], dtype=dtype)
    (keys,) = keys_of(values)
    assert keys.dtype == key_dtype(dtype)
    magnitude = values.abs().tolist()
    for i, one in enumerate(magnitude[:-1]):
        for j, other in enumerate(magnitude[:-1]):
            assert (keys[i] < keys[j]) == (one < other)
        assert keys[i] < keys[-1], "NaN has the largest key"
    assert torch.equal(values_of(keys[:-1]), values[:-1].abs().to(values_of(keys).dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("values", ["normal", "few", "zeros", "equal"])
def test_places_of_many_values(dtype, values):
    """Above 2^16 values are counted by digits instead of sorted."""
    generator = torch.Generator().manual_seed(0)
    flat = {
        "normal": torch.randn(80_000, generator=generator).exp().to(dtype),
        "few": torch.arange(80_000).remainder(7).to(dtype),
        "zeros": torch.zeros(80_000, dtype=dtype),
        "equal": torch.full((80_000,), 0.1, dtype=dtype),
    }[values]
    pool = [flat[:30_000], -flat[30_000:].view(2, -1).mT]
    ordered = flat.sort().values.tolist()
    places = [0, 1, 799, 800, 40_000, 79_200, 79_998, 79_999]
    assert magnitudes_at(pool, places) == [ordered[place] for place in places]


@pytest.mark.parametrize("count", [5, 70_000], ids=["sorted", "counted"])
def test_values_without_a_place_are_refused(count):
    for odd in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="a value is NaN or infinite"):
            magnitudes_at([torch.ones(count), torch.tensor([odd])], [0])
    with pytest.raises(ValueError, match=r"values must be of one dtype, got torch.float32 and torch.float64: cast"):
        magnitudes_at([torch.ones(count), torch.ones(count, dtype=torch.float64)], [0])


@pytest.mark.parametrize("few", [0, 2**16], ids=["by cells", "one by one"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_counts_below_bounds_are_those_of_comparing_each(dtype, few, monkeypatch):
    monkeypatch.setattr(magnitudes, "_FEW", few)
    values = torch.randn(3000, generator=torch.Generator().manual_seed(1)).exp().mul_(-1).to(dtype)
    bounds = (
        torch.cat([torch.zeros(1, dtype=dtype), values[:9].abs(), torch.full((2,), 2.0, dtype=dtype)]).sort().values
    )
    keys = torch.cat(list(keys_of(bounds)))
    expected = [int((values.abs() < bound).sum()) for bound in bounds]
    assert count_below(values, keys).tolist() == expected
    assert len(set(expected)) > 8


@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.parametrize("guess", [0.0, 1.0, 3.0], ids=["too low", "right", "too high"])
def test_keys_reach_the_edges_of_a_rising_function(guess, closed):
    """Whatever is guessed: the value of each key reaches the edge, and that of the key before does not."""
    edges = torch.tensor([0.25, 1.0, 9.0], dtype=torch.float64)
    keys = keys_reaching(edges, lambda x: x.double().square(), guess * edges.sqrt(), torch.int32, closed=closed)
    reached, before = values_of(keys).double().square(), values_of(keys - 1).double().square()
    last = edges[-1:]
    assert (reached[:-1] >= edges[:-1]).all()
    assert (before[:-1] < edges[:-1]).all()
    assert bool(reached[-1:] > last) if closed else bool(reached[-1:] >= last)
    assert bool(before[-1:] <= last) if closed else bool(before[-1:] < last)
