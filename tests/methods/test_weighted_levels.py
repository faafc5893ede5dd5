"""Weighted k-means of the rows of a weight against its formula, entry by entry in float64."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

import fishkern as fk

room = import_module("fishkern.methods.weighted_levels")  # the package has the function under this name


def drawn(O: int, I: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(O, I, generator=generator), torch.rand(O, I, generator=generator) ** 8


def by_hand(weights: list[float], fisher: list[float], levels: list[float], moves: int) -> list[float]:
    """Lloyd's moves of one row, from some levels."""
    for _ in range(moves):
        of = [min(range(len(levels)), key=lambda k: (abs(w - levels[k]), k)) for w in weights]
        for k in range(len(levels)):
            inside = [(w, f) for w, f, one in zip(weights, fisher, of, strict=True) if one == k]
            if total := sum(f for _, f in inside):
                levels[k] = sum(w * f for w, f in inside) / total
            elif inside:
                levels[k] = sum(w for w, _ in inside) / len(inside)
    return levels


def cost(weight: torch.Tensor, fisher: torch.Tensor, quantised: torch.Tensor) -> float:
    return (fisher.double() * (weight.double() - quantised.double()).square()).sum().item()


@pytest.mark.parametrize("moves", [1, 3, 50])
def test_moves_are_those_of_the_formula(moves):
    weight, fisher = drawn(5, 60)
    fisher[1, 10:40], fisher[2] = 0.0, 0.0
    levels = fk.weighted_levels(weight, fisher, bits=2, iterations=moves, seed=3)
    x, order = weight.double().sort(dim=1)
    draws = torch.rand(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    counted = torch.where(fisher.sum(1, keepdim=True) > 0, fisher, 1.0).double()
    first = room._first_levels(x, counted.gather(1, order), draws)
    for row in range(5):
        expected = by_hand(weight[row].double().tolist(), counted[row].tolist(), first[row].tolist(), moves)
        assert levels.levels[row].tolist() == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_first_levels_are_drawn_by_their_cost():
    """An entry after the first is as likely as its Fisher information times its distance squared."""
    x, fisher = torch.tensor([[0.0, 1.0, 3.0]]).double().repeat(20_000, 1), torch.tensor([[1.0, 2.0, 1.0]]).double()
    draws = torch.rand(20_000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pairs = room._first_levels(x, fisher.repeat(20_000, 1), draws).tolist()
    expected = {(0.0, 1.0): 0.25 * 2 / 11 + 0.5 * 1 / 5, (0.0, 3.0): 0.25 * 9 / 11 + 0.25 * 9 / 17}
    expected[(1.0, 3.0)] = 0.5 * 4 / 5 + 0.25 * 8 / 17
    for pair, share in expected.items():
        assert pairs.count(list(pair)) / 20_000 == pytest.approx(share, abs=0.015), pair


@pytest.mark.parametrize("bits", [1, 3, 4, 8])
def test_every_entry_has_its_nearest_level_and_every_level_the_mean(bits):
    weight, fisher = drawn(7, 700, seed=1)
    quantised = fk.weighted_levels(weight, fisher, bits=bits, iterations=1000)
    assert quantised.levels.shape == (7, 2**bits)
    assert quantised.indices.dtype == torch.uint8
    assert bool((quantised.levels.diff(dim=1) >= 0).all())
    distance = (weight[:, :, None] - quantised.levels[:, None]).abs()
    chosen = (weight - quantised.weight()).abs()
    torch.testing.assert_close(chosen, distance.amin(2), rtol=0, atol=1e-6)
    for row in range(7):
        for k in quantised.indices[row].unique().tolist():
            of = quantised.indices[row] == k
            mean = (weight[row, of].double() * fisher[row, of].double()).sum() / fisher[row, of].double().sum()
            assert quantised.levels[row, k].item() == pytest.approx(mean.item(), abs=1e-6)


def test_it_costs_less_than_other_levels():
    weight, fisher = drawn(16, 300)
    ours = cost(weight, fisher, fk.weighted_levels(weight, fisher, bits=3).weight())
    unweighted = cost(weight, fisher, fk.weighted_levels(weight, torch.ones_like(fisher), bits=3).weight())
    scale = weight.abs().amax(1, keepdim=True) / 3.5
    rounded = cost(weight, fisher, ((weight / scale - 0.5).round() + 0.5) * scale)
    assert ours < 0.8 * unweighted
    assert ours < 0.5 * rounded


def test_one_seed_gives_one_result_in_any_pieces(monkeypatch):
    weight, fisher = drawn(9, 100)
    first, again = (fk.weighted_levels(weight, fisher, seed=5) for _ in range(2))
    monkeypatch.setattr(room, "PIECE", 250)
    parts, other = fk.weighted_levels(weight, fisher, seed=5), fk.weighted_levels(weight, fisher, seed=6)
    scaled = fk.weighted_levels(weight, fisher * 1024, seed=5)
    for one in (again, parts, scaled):
        assert torch.equal(one.levels, first.levels)
        assert torch.equal(one.indices, first.indices)
    assert not torch.equal(other.levels, first.levels)
    half = fk.weighted_levels(weight.bfloat16(), fisher)
    assert torch.equal(half.levels, fk.weighted_levels(weight.bfloat16().float(), fisher).levels)


def test_fewer_values_than_levels_are_kept_as_they_are():
    weight = torch.tensor([[1.0, 2.0, 2.0, -3.0], [0.5, 0.5, 0.5, 0.5]])
    quantised = fk.weighted_levels(weight, torch.tensor([[0.0, 1e-30, 1.0, 1e10], [1.0, 0.0, 1.0, 2.0]]), bits=4)
    assert torch.equal(quantised.weight()[1], weight[1])
    assert torch.equal(quantised.weight()[0, 1:], weight[0, 1:])


def test_what_is_refused():
    weight, fisher = drawn(3, 4)
    for args, error, message in (
        ((weight, fisher[:2]), ValueError, r"are \[O, I\], the same and not empty; got \(3, 4\) and \(2, 4\)"),
        ((weight[0], fisher[0]), ValueError, r"are \[O, I\]"),
        ((weight[:, :0], fisher[:, :0]), ValueError, "not empty"),
        ((weight, fisher.long()), TypeError, "are floating"),
        ((weight, -fisher - 1), ValueError, "at least 0"),
        ((weight * torch.inf, fisher), ValueError, "are finite"),
    ):
        with pytest.raises(error, match=message):
            fk.weighted_levels(*args)
    for options, message in (
        ({"bits": 9}, "at most 8, got 9"),
        ({"bits": 0}, "bits"),
        ({"iterations": 0}, "iterations"),
    ):
        with pytest.raises(ValueError, match=message):
            fk.weighted_levels(weight, fisher, **options)
    with pytest.raises(TypeError, match="seed must be an integer"):
        fk.weighted_levels(weight, fisher, seed=0.5)
