"""Random numbers in a pass: never the same twice, the user's left as found, and a stream for each example that asks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fishkern as fk

BATCH = fk.DiagonalFisher(unit="batch")  # the loss of a batch may draw as a whole


def data(count: int, N: int) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(N, 6, generator=generator)} for _ in range(count)]


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Linear(6, 6)


def noting(draws: list[float]):
    def losses(model: nn.Module, batch: dict) -> Tensor:
        noise = torch.randn_like(batch["x"])
        draws.append(noise[0, 0].item())
        return (model(batch["x"] + noise) - noise).square().mean(1)

    return losses


DRAWING = {"batch": (BATCH, 4), "one": (fk.DiagonalFisher(), 1), "sketch": (fk.SketchedFisher(draws=1), 1)}


@pytest.mark.parametrize("kind", DRAWING)
def test_no_two_batches_draw_the_same(kind):
    estimator, N = DRAWING[kind]
    draws: list[float] = []
    fk.estimate(net(), data(32, N), estimator, likelihood=noting(draws))
    assert len(draws) >= 32
    of_batches = draws[-32:]  # what comes before them draws aside, and is in no result
    assert len(set(of_batches)) == len(of_batches)


def test_the_users_generator_is_as_found_and_seeds_the_pass():
    model, found = net(), []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        expected = torch.rand(3)
        torch.manual_seed(seed)
        found.append(fk.estimate(model, data(5, 4), BATCH, likelihood=noting([])))
        assert torch.equal(torch.rand(3), expected)
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_what_the_data_draws_is_the_users():
    """A loader that shuffles or augments goes on in the user's stream, however much the loss draws in between."""

    def loader(seen: list[Tensor]):
        for _ in range(4):
            seen.append(torch.rand(2))
            yield {"x": torch.ones(3, 6)}

    expected: list[Tensor] = []
    model = net()
    torch.manual_seed(11)
    list(loader(expected))
    after = torch.rand(1)
    seen: list[Tensor] = []
    torch.manual_seed(11)
    fk.estimate(model, loader(seen), BATCH, likelihood=noting([]))
    assert torch.equal(torch.stack(seen), torch.stack(expected))
    assert torch.equal(torch.rand(1), after)


def test_the_users_generator_is_as_found_after_an_error():
    def losses(model, batch):
        torch.rand(5)
        raise ArithmeticError

    model = net()
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    with pytest.raises(ArithmeticError):
        fk.estimate(model, data(1, 2), likelihood=losses)
    assert torch.equal(torch.rand(2), expected)


def diffusion(model: nn.Module, batch: dict, draws) -> Tensor:
    x = batch["x"]
    noise = draws.randn(*x.shape[1:])
    level = (draws.randint(10) + draws.rand())[:, None] / 11
    return (model(x + level * noise) - noise).square().mean(1)


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("size", [1, 2, 3, 12])
def test_draws_belong_to_the_example(size, check):
    """Whatever the batch size: the loop, with the draws of each place."""
    model, (whole,) = net(), data(1, 12)
    batches = [{"x": rows} for rows in whole["x"].split(size)]
    likelihood = fk.Drawn(diffusion, seed=4)
    found = fk.estimate(model, batches, likelihood=likelihood, check=check)
    expected = fk.estimate(model, [whole], likelihood=likelihood)
    torch.testing.assert_close(found["weight"], expected["weight"])
    assert fk.verify(model, batches, found, likelihood=likelihood).ok
    other = fk.estimate(model, batches, likelihood=fk.Drawn(diffusion, seed=5))
    assert not torch.allclose(found["weight"], other["weight"], rtol=1e-2)


def test_the_draws_equal_a_loop_of_ones_own():
    """The streams are torch generators, so that a loop over single examples can be written down."""
    model, (batch,) = net().double(), data(1, 5)
    drawn = []

    def losses(model, batch, draws):
        noise = draws.randn(6).double()
        drawn.append(noise)
        return (model(batch["x"].double()) - noise).square().sum(1)

    found = fk.estimate(model, [batch], likelihood=fk.Drawn(losses), check=False)
    noise = torch.cat([next(one for one in drawn if len(one) == size) for size in (2, 3)])  # the first two, the rest
    assert len({tuple(row.tolist()) for row in noise}) == 5
    total = torch.zeros(6, 6, dtype=torch.float64)
    for n in range(5):
        loss = (model(batch["x"][n].double()) - noise[n]).square().sum()
        total += torch.autograd.grad(loss, model.weight)[0].square() / 5
    torch.testing.assert_close(found["weight"], total.float())


def test_estimates_of_several_draws_merge():
    model, batches = net(), data(2, 4)
    first, second = (fk.estimate(model, batches, likelihood=fk.Drawn(diffusion, seed=seed)) for seed in (0, 1))
    both = fk.merge(first, second)
    torch.testing.assert_close(both["weight"], (first["weight"] + second["weight"]) / 2)
    assert both.provenance["definition"]["likelihood"] == "function diffusion, drawn for each example"
    assert [run["draws_seed"] for run in both.provenance["runs"]] == [0, 1]


def test_a_wrong_loss_that_draws():
    with pytest.raises(TypeError, match=r"function must be \(model, batch, draws\)"):
        fk.Drawn("diffusion")
    with pytest.raises(TypeError, match="seed must be an integer"):
        fk.Drawn(diffusion, seed=0.5)
    with pytest.raises(ValueError, match="distribution of the labels"):
        fk.estimate(net(), data(1, 2), fk.DiagonalFisher("mc"), likelihood=fk.Drawn(diffusion))
