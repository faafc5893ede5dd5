"""The parameters that an optimizer takes, and those that it refuses in one line."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fishkern as fk
from fishkern.selection import bound_to_start


class Model(nn.Module):
    """An adapter and a head, of which the pool has the adapter."""

    def __init__(self, dtype=torch.float32) -> None:
        super().__init__()
        self.adapter = nn.Linear(4, 6, dtype=dtype)
        self.head = nn.Linear(6, 2, dtype=dtype)

    def forward(self, x):
        return self.head(self.adapter(x))


def adapter(model: nn.Module, entries=(1, 7)) -> fk.Selection:
    shapes = {n: p.shape for n, p in model.named_parameters() if n.startswith("adapter")}
    return fk.Selection(shapes, {"adapter.weight": torch.tensor(entries)})


def step(model, optimizer) -> None:
    optimizer.zero_grad()
    torch.manual_seed(1)
    model(torch.randn(3, 4)).square().sum().backward()
    optimizer.step()


def test_outside_the_pool_is_an_error():
    model = Model()
    message = r"2 trainable parameters, 14 entries, are outside the selection's pool \(head.weight, head.bias\)"
    with pytest.raises(ValueError, match=message):
        fk.MaskedAdamW(model, adapter(model))
    model.head.requires_grad_(False)
    assert len(fk.MaskedAdamW(model, adapter(model)).param_groups[0]["params"]) == 2


def test_outside_the_pool_frozen():
    model = Model()
    start = [p.detach().clone() for p in model.head.parameters()]
    optimizer = fk.MaskedAdamW(model, adapter(model), outside="freeze")
    step(model, optimizer)
    assert not any(p.requires_grad for p in model.head.parameters())
    assert all(torch.equal(p, q) for p, q in zip(model.head.parameters(), start, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outside_the_pool_trained_whole_as_torch_does(dtype):
    ours, theirs = Model(), Model()
    theirs.load_state_dict(ours.state_dict())
    ours.head.to(dtype), theirs.head.to(dtype)
    optimizer = fk.MaskedAdamW(ours, adapter(ours), lr=0.1, outside="train", master_weights=False)
    dense = torch.optim.AdamW(theirs.head.parameters(), lr=0.1, foreach=False)
    grads = [torch.randn_like(p) for p in theirs.head.parameters()]
    for _ in range(5):
        for model in (ours, theirs):
            for p, grad in zip(model.head.parameters(), grads, strict=True):
                p.grad = grad.clone()
        optimizer.step()
        dense.step()
    assert all(torch.equal(p, q) for p, q in zip(ours.head.parameters(), theirs.head.parameters(), strict=True))


def test_groups_of_named_parameters():
    """Each with options of its own; also a group that is left with nothing."""
    model = Model()
    named = dict(model.named_parameters())
    groups = [
        {"params": [("head.weight", named["head.weight"])], "lr": 7.0},
        {"params": [(n, named[n]) for n in ("adapter.bias", "adapter.weight")], "weight_decay": 0.5},
    ]
    model.head.requires_grad_(False)
    optimizer = fk.MaskedAdamW(groups, adapter(model), lr=0.1)
    assert [g["param_names"] for g in optimizer.param_groups] == [[], ["adapter.bias", "adapter.weight"]]
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(7.0, 0.01), (0.1, 0.5)]
    step(model, optimizer)
    loaded = fk.MaskedAdamW(groups, adapter(model))
    loaded.load_state_dict(optimizer.state_dict())
    assert loaded.param_groups[1]["lr"] == 0.1


def test_a_group_comes_later():
    model = Model()
    model.head.requires_grad_(False)
    optimizer = fk.MaskedSGD(model, adapter(model), lr=0.1, outside="train")
    step(model, optimizer)
    model.head.requires_grad_(True)
    start = model.head.weight.detach().clone()
    optimizer.add_param_group({"params": [("head.weight", model.head.weight)], "lr": 0.5})
    step(model, optimizer)
    assert not torch.equal(model.head.weight, start)
    assert optimizer.state[model.adapter.weight]["step"] == 2


def test_wrappers_do_not_change_names():
    model = Model()
    model.head.requires_grad_(False)
    optimizer = fk.MaskedAdamW(nn.DataParallel(torch.compile(model)), adapter(model))
    assert optimizer.param_groups[0]["param_names"] == ["adapter.weight", "adapter.bias"]


def test_cast_after_it_was_made():
    """State is made for the dtype that a parameter has at the step."""
    model = Model()
    optimizer = fk.MaskedAdamW(model, adapter(model), outside="freeze", lr=0.1)
    step(model, optimizer)
    model.to(torch.bfloat16)
    optimizer.zero_grad()
    model(torch.randn(3, 4, dtype=torch.bfloat16)).square().sum().backward()
    optimizer.step()
    state = optimizer.state[model.adapter.weight]
    assert state["step"] == 2
    assert torch.equal(model.adapter.weight.view(-1)[[1, 7]], state["master"].bfloat16())


def test_sparse_gradients_are_refused():
    model = nn.Embedding(5, 3, sparse=True)
    for release in (False, True):
        optimizer = fk.MaskedSGD(model, adapter_of(model), release_grads=release, max_grad_norm=1.0)
        with pytest.raises(ValueError, match="weight has a sparse gradient .*: make its module with sparse=False"):
            model(torch.tensor([1])).sum().backward()
            optimizer.step()
        optimizer.close()


def adapter_of(model: nn.Module) -> fk.Selection:
    return fk.Selection({"weight": model.weight.shape}, {"weight": torch.tensor([1])})


def frozen(model):
    model.requires_grad_(False)
    return model


def twice(model):
    return [("adapter.weight", model.adapter.weight), ("other", model.adapter.weight)]


def one_name(model):
    return [("adapter.weight", model.adapter.weight), ("adapter._orig_mod.weight", model.head.weight)]


REFUSED = {
    "names that it lacks": (lambda m: m.head, {}, ValueError, "2 of 2 names are not in the model"),
    "other shapes": (lambda m: [("adapter.weight", m.head.weight)], {}, ValueError, "adapter.weight is .* here and"),
    "no names": (lambda m: m.parameters(), {}, TypeError, "identifies parameters by their names.* got Parameter"),
    "another thing": (adapter, {}, TypeError, "identifies parameters by their names.* got Selection"),
    "one parameter twice": (twice, {}, ValueError, "adapter.weight and other are one parameter"),
    "one name twice": (one_name, {}, ValueError, "two parameters are named adapter.weight"),
    "selected but frozen": (frozen, {}, ValueError, r"selected entries have requires_grad=False \(adapter.weight\)"),
    "unknown outside": (lambda m: m, dict(outside="ignore"), ValueError, "outside must be one of"),
    "a norm of zero": (lambda m: m, dict(max_grad_norm=0.0), ValueError, "max_grad_norm must be above 0"),
    "negative lr": (lambda m: m, dict(lr=-1.0), ValueError, "lr, eps and weight_decay must be at least 0"),
    "betas of one": (lambda m: m, dict(betas=(0.9, 1.0)), ValueError, r"betas in \[0, 1\)"),
}


@pytest.mark.parametrize("parameters, options, error, message", REFUSED.values(), ids=REFUSED)
def test_refused(parameters, options, error, message):
    model = Model()
    with pytest.raises(error, match=message):
        fk.MaskedAdamW(parameters(model), adapter(model), **{"outside": "freeze", **options})


def test_complex_parameters_are_refused():
    weight = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    with pytest.raises(ValueError, match="weight is torch.complex64, and only floating parameters are trained"):
        fk.MaskedAdamW([("weight", weight)], fk.Selection({"weight": (3,)}, {"weight": torch.tensor([1])}))


def test_nothing_selected():
    model = Model()
    nothing = fk.Selection(adapter(model).shapes, {})
    with pytest.raises(ValueError, match="nothing would move"):
        fk.MaskedAdamW(model, nothing, outside="freeze")
    model.head.requires_grad_(True)
    optimizer = fk.MaskedAdamW(model, nothing, outside="train")
    step(model, optimizer)
    assert optimizer.state.keys() == set(model.head.parameters())


@pytest.mark.parametrize("kind", [fk.MaskedAdamW, fk.MaskedSGD])
def test_a_learning_rate_is_one_number(kind):
    """Also that of a group."""
    model = Model()
    model.head.requires_grad_(False)
    two, named = torch.tensor([0.1, 0.2]), list(model.adapter.named_parameters(prefix="adapter"))
    for arguments, options in ((model, {"lr": two}), ([{"params": named, "lr": two}], {})):
        with pytest.raises(ValueError, match=r"lr must be one number or a zero-dimensional tensor, got \(2,\)"):
            kind(arguments, adapter(model), **options)
    with pytest.raises(ValueError, match="must be at least 0.* got lr=-1"):
        kind([{"params": named, "lr": -1}], adapter(model))
    step(model, kind(model, adapter(model), lr=torch.tensor(0.1)))


def test_sgd_options():
    model = Model()
    with pytest.raises(ValueError, match="Nesterov needs a momentum and no dampening"):
        fk.MaskedSGD(model, adapter(model), outside="freeze", nesterov=True)
    with pytest.raises(ValueError, match="momentum and weight_decay must be at least 0"):
        fk.MaskedSGD(model, adapter(model), outside="freeze", momentum=-0.5)


class TestStateThatDoesNotFit:
    """It is refused in one line, and nothing of it is loaded."""

    def saved(self, entries=(1, 7), **options):
        model = Model()
        optimizer = fk.MaskedAdamW(model, adapter(model, entries), outside="freeze", **options)
        step(model, optimizer)
        return model, optimizer

    def test_other_entries(self):
        model, optimizer = self.saved(entries=(1, 8))
        other = fk.MaskedAdamW(model, adapter(model))
        with pytest.raises(ValueError, match="the state of adapter.weight belongs to other entries"):
            other.load_state_dict(optimizer.state_dict())
        assert not other.state

    def test_other_names(self):
        _, optimizer = self.saved()
        state = optimizer.state_dict()
        state["param_groups"][0]["param_names"] = ["adapter.weight", "adapter.offset"]
        with pytest.raises(ValueError, match="other parameters; 2 are in one and not the other, such as adapter.bias"):
            optimizer.load_state_dict(state)

    def test_other_groups(self):
        _, optimizer = self.saved()
        state = optimizer.state_dict()
        with pytest.raises(ValueError, match="the state has 2 groups, the optimizer 1"):
            optimizer.load_state_dict({**state, "param_groups": state["param_groups"] * 2})

    def test_state_of_torch(self):
        model, optimizer = self.saved()
        dense = torch.optim.AdamW(model.adapter.parameters())
        with pytest.raises(ValueError, match="not that of a masked optimizer"):
            optimizer.load_state_dict(dense.state_dict())

    def test_names_in_another_order(self):
        """By name, not by place."""
        model, optimizer = self.saved()
        turned = fk.MaskedAdamW(list(model.named_parameters())[::-1], adapter(model))
        turned.load_state_dict(optimizer.state_dict())
        ours, theirs = (o.state[model.adapter.weight]["exp_avg"] for o in (optimizer, turned))
        assert torch.equal(ours, theirs)


def test_reselect_keeps_the_pool():
    model = Model()
    optimizer = fk.MaskedAdamW(model, adapter(model), outside="freeze")
    with pytest.raises(ValueError, match="out of the same pool"):
        optimizer.reselect(adapter(model).restrict("*.weight"))


def test_a_start_is_looked_at_once():
    """At the first step only; a later selection does not require the trained weights to be at their start."""
    model = Model()
    first, second = (bound_to_start(adapter(model, entries), model) for entries in ((1, 7), (2, 8)))
    optimizer = fk.MaskedSGD(model, first, lr=50.0, outside="freeze")
    step(model, optimizer)
    step(model, optimizer)
    assert optimizer.reselect(second) == (0, 2, 2)
    step(model, optimizer)
    with pytest.raises(ValueError, match="start"):
        step(model, fk.MaskedSGD(model, second))
