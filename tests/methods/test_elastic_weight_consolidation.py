"""The penalty of elastic weight consolidation against its formula, written out and differentiated in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fishkern as fk
from fishkern.methods import elastic_weight_consolidation as ewc

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def net(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def random_statistics(model: nn.Module, seed: int = 1, **options) -> fk.Statistics:
    generator = torch.Generator().manual_seed(seed)
    tensors = {n: torch.rand(p.shape, generator=generator) ** 4 for n, p in model.named_parameters()}
    return fk.Statistics(tensors, **{"count": 4, **options})


def moved(model: nn.Module, seed: int = 3) -> dict[str, torch.Tensor]:
    """Move every parameter; return the values before."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn(p.shape, generator=generator).to(p.dtype) / 4
    return before


def formula(model: nn.Module, fisher, anchor: dict, weight: float) -> tuple[float, dict[str, torch.Tensor]]:
    """weight / 2 * sum F (w - w0)^2 and its gradient by autograd, in float64."""
    w = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    terms = [(fisher[name].double() * (w[name] - anchor[name].double()) ** 2).sum() for name in fisher]
    value = weight / 2 * torch.stack(terms).sum()
    return value.item(), dict(zip(fisher, torch.autograd.grad(value, [w[n] for n in fisher]), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("piece", [4, 2**24])
def test_value_and_gradient_are_those_of_the_formula(dtype, piece, monkeypatch):
    monkeypatch.setattr(ewc, "_PIECE", piece)
    model = net(dtype)
    fisher = random_statistics(model)
    penalty = fk.QuadraticPenalty(fisher, model, weight=30)
    assert penalty().item() == 0
    anchor = moved(model)
    value, gradients = formula(model, fisher, anchor, 30)
    penalty().backward()
    rounding = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5}[dtype]
    assert penalty().item() == pytest.approx(value, rel=rounding)
    for name, p in model.named_parameters():
        stored = 0.005 if dtype == torch.bfloat16 else rounding  # the gradient itself has the parameter's dtype
        torch.testing.assert_close(p.grad.double(), gradients[name], rtol=stored, atol=0)


def test_a_half_of_the_weight_and_another_anchor_are_found():
    """What a reader would get wrong changes the numbers that the test above compares."""
    model = net(torch.float64)
    fisher = random_statistics(model)
    penalty = fk.QuadraticPenalty(fisher, model, weight=30)
    anchor = moved(model)
    assert penalty().item() != pytest.approx(formula(model, fisher, anchor, 60)[0], rel=1e-3)
    other = {name: value + 0.1 for name, value in anchor.items()}
    assert penalty().item() != pytest.approx(formula(model, fisher, other, 30)[0], rel=1e-3)


def test_it_adds_up_with_a_loss_and_with_others():
    model, twin = net(), net()
    fisher, other = random_statistics(model), random_statistics(model, seed=9)
    penalties = [fk.QuadraticPenalty(one, model, weight=5) for one in (fisher, other)]
    anchor = moved(model)
    twin.load_state_dict(model.state_dict())
    x = torch.randn(4, 5)
    (model(x).square().mean() + sum(penalty() for penalty in penalties)).backward()
    twin(x).square().mean().backward()
    for name, p in model.named_parameters():
        pulled = 5 * (fisher[name] + other[name]) * (p.detach() - anchor[name])
        torch.testing.assert_close(p.grad, twin.get_parameter(name).grad + pulled)


def test_it_keeps_one_copy():
    """Statistics in memory are not copied, and the graph of a call holds the parameters alone."""
    model = net()
    fisher = random_statistics(model)
    penalty = fk.QuadraticPenalty(fisher, model, weight=1)
    assert all(penalty.statistics[name].data_ptr() == fisher[name].data_ptr() for name in fisher)
    assert sum(value.numel() for value in penalty.anchor.values()) == sum(p.numel() for p in model.parameters())
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        penalty()
    own = {p.data_ptr() for p in model.parameters()}
    assert {one.data_ptr() for one in saved if one.numel() > 1} == own
    moved(model)
    assert penalty().item() > 0, "the anchor is a copy, which does not move along"


def test_online_is_the_decayed_sum_at_the_present_values():
    model = net(torch.float64)
    first, second, third = (random_statistics(model, seed=seed) for seed in (1, 2, 3))
    penalty = fk.QuadraticPenalty(first, model, weight=2)
    for new in (second, third):
        moved(model)
        penalty = fk.QuadraticPenalty(new, model, weight=2, after=penalty, decay=0.5)
    anchor = moved(model)
    together = {name: first[name] / 4 + second[name] / 2 + third[name] for name in first}
    value, gradients = formula(model, together, anchor, 2)
    penalty().backward()
    assert penalty().item() == pytest.approx(value, rel=1e-6)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-6, atol=0)
    assert penalty.statistics.provenance["definition"]["decayed_sums"] == [0.5, 0.5]
    assert penalty.statistics.count == 12


def test_online_goes_on_from_a_file(tmp_path):
    model = net()
    first = fk.QuadraticPenalty(random_statistics(model), model, weight=2)
    second = fk.QuadraticPenalty(random_statistics(model, 2), model, weight=2, after=first, decay=0.5)
    saved = fk.Statistics.load(second.statistics.save(tmp_path / "sum"), lazy=True)
    again = fk.QuadraticPenalty(saved, copy.deepcopy(model), weight=2)
    assert again.fingerprint == second.fingerprint != first.fingerprint
    with pytest.raises(ValueError, match="only statistics of one definition merge"):
        fk.merge(second.statistics, random_statistics(model))


def test_a_parameter_of_one_task_alone_counts_with_that_one():
    model = net()
    whole = random_statistics(model)
    body = {name: whole[name] for name in whole if name.startswith("0.")}
    head = {name: whole[name] for name in whole if name.startswith("2.")}
    both = fk.QuadraticPenalty(head, model, 1, after=fk.QuadraticPenalty(body, model, 1), decay=0.25).statistics
    torch.testing.assert_close(both["0.weight"], whole["0.weight"] / 4)
    torch.testing.assert_close(both["2.weight"], whole["2.weight"])


def test_a_new_head_is_free_and_a_tied_weight_is_held_once():
    model = net()
    fisher = random_statistics(model)
    penalty = fk.QuadraticPenalty({name: fisher[name] for name in ("0.weight", "0.bias")}, model, weight=1)
    moved(model)
    penalty().backward()
    assert model[2].weight.grad is None
    tied = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    tied["b"].weight = tied["a"].weight
    F = torch.rand(3, 3)
    assert list(fk.QuadraticPenalty({"b.weight": F}, tied, 1).parameters) == ["b.weight"]
    with pytest.raises(ValueError, match="a.weight and b.weight are one parameter: give its statistics once"):
        fk.QuadraticPenalty({"a.weight": F, "b.weight": F}, tied, 1)


def test_of_an_estimate_and_a_compiled_model():
    model = net()
    batches = [(torch.randn(4, 5), torch.randint(3, (4,)))]
    fisher = fk.estimate(model, batches, likelihood=fk.Classification(), parameters="0.*")
    penalty = fk.QuadraticPenalty(fisher, torch.compile(model, backend="eager"), weight=1e3)
    assert list(penalty.parameters) == ["0.weight", "0.bias"]
    assert repr(penalty) == "QuadraticPenalty(2 parameters, 42 coordinates, weight 1000)"
    with pytest.raises(AttributeError, match="QuadraticPenalty is frozen"):
        penalty.weight = 1


def test_its_second_derivative():
    """Of a gradient that is differentiated again, as by a penalty on gradients."""
    model = net(torch.float64)
    fisher = random_statistics(model)
    penalty = fk.QuadraticPenalty(fisher, model, weight=7)
    moved(model)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(penalty(), parameters, create_graph=True)
    directions = [torch.randn_like(p) for p in parameters]
    along = sum((g * v).sum() for g, v in zip(gradients, directions, strict=True))
    for name, second, v in zip(names, torch.autograd.grad(along, parameters), directions, strict=True):
        torch.testing.assert_close(second, 7 * fisher[name].double() * v)


def test_a_parameter_without_entries_costs_nothing():
    model = nn.Linear(3, 2)
    model.extra = nn.Parameter(torch.ones(0, 3))
    penalty = fk.QuadraticPenalty({"bias": torch.ones(2), "extra": torch.ones(0, 3)}, model, weight=2)
    with torch.no_grad():
        model.bias += 1
    penalty().backward()
    assert penalty().item() == pytest.approx(2)
    assert model.extra.grad.shape == (0, 3)


def test_what_is_refused():
    model = net()
    fisher = dict(random_statistics(model))
    make = fk.QuadraticPenalty
    refused = [
        (ValueError, "weight must be a positive number, got 0", lambda: make(fisher, model, 0)),
        (ValueError, "decay must be from 0 to 1, got 2", lambda: make(fisher, model, 1, decay=2)),
        (ValueError, "decay=0.5 is of the tasks before: give", lambda: make(fisher, model, 1, decay=0.5)),
        (TypeError, "after must be the QuadraticPenalty of the tasks before", lambda: make(fisher, model, 1, after=1)),
        (TypeError, "must be fishkern.Statistics or tensors by parameter name, got list", lambda: make([], model, 1)),
        (ValueError, "the statistics are of no parameter", lambda: make({}, model, 1)),
        (ValueError, "Sequential has no parameter head.weight", lambda: make({"head.weight": torch.ones(1)}, model, 1)),
        (ValueError, r"0.weight with shape \(7,\), in the model it has \(7, 5\)",
         lambda: make({"0.weight": torch.ones(7)}, model, 1)),
        (ValueError, "statistics of 0.bias hold -1", lambda: make({"0.bias": -torch.ones(7)}, model, 1)),
        (ValueError, "statistics of 0.bias hold nan", lambda: make({"0.bias": torch.full((7,), torch.nan)}, model, 1)),
        (ValueError, "statistics of 0.bias hold inf", lambda: make({"0.bias": torch.full((7,), torch.inf)}, model, 1)),
    ]  # fmt: skip
    for error, message, call in refused:
        with pytest.raises(error, match=message):
            call()
    groups = fk.Statistics({"a": torch.ones(1)}, count=1, provenance={"definition": {"groups": {"a": ["0.bias"]}}})
    with pytest.raises(ValueError, match="these statistics are of groups"):
        make(groups, model, 1)
    exact = random_statistics(model, provenance={"definition": {"estimator": "DiagonalFisher"}})
    with pytest.raises(ValueError, match="only statistics of one definition add up to one penalty"):
        make(exact, model, 1, after=make(fisher, model, 1))
    model[0].bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"0.bias does not require a gradient, so that nothing moves it"):
        make(fisher, model, 1)
