"""Gradients that are gathered and released during backward."""

from __future__ import annotations

import math
import warnings
from unittest import mock

import pytest
import torch
from torch import nn

import fishkern as fk


def selection(model: nn.Module, density: float = 0.01) -> fk.Selection:
    """Of the weight some entries, of the bias all."""
    weight = model.weight
    entries = (torch.rand(weight.numel()) < density).nonzero().view(-1)
    return fk.Selection({n: p.shape for n, p in model.named_parameters()}, {"weight": entries}, whole=["bias"])


def test_base_weights_by_default_and_adapters_not():
    """Large and little of it selected: released. Small, or much of it selected, or whole: kept."""
    large, small = nn.Linear(1100, 1000), nn.Linear(50, 20)
    for model, density, released in ((large, 0.1 - 1e-3, True), (large, 0.2, False), (small, 0.01, False)):
        optimizer = fk.MaskedAdamW(model, selection(model, density), max_grad_norm=1.0)
        model(torch.randn(2, model.in_features)).sum().backward()
        assert (model.weight.grad is None) is released
        assert model.bias.grad is not None
        optimizer.close()
        optimizer.zero_grad()


def test_clipping_elsewhere_is_warned_of_once():
    """At the first step that nobody clips, and at the line that does it."""
    model = nn.Linear(5, 3)

    def step(optimizer):
        model(torch.randn(2, 5)).sum().backward()
        optimizer.step()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = fk.MaskedSGD(model, selection(model, 0.5), release_grads=True)
        optimizer.step()  # nothing was released
    with pytest.warns(UserWarning, match=r"1 parameters are released .* max_grad_norm= \(math.inf for no") as warned:
        step(optimizer)
    assert warned[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(optimizer)
        optimizer.close()
        late = fk.MaskedSGD(model, selection(model, 0.5), release_grads=True)
        late.max_grad_norm = 1.0  # as a callback of a Trainer does
        step(late)
        late.close()
        unclipped = fk.MaskedSGD(model, selection(model, 0.5), release_grads=True, max_grad_norm=math.inf)
        step(unclipped)
        unclipped.close()
        step(fk.MaskedSGD(model, selection(model, 0.5), release_grads=False))


def test_a_parameter_without_selected_entries_is_released_too():
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    shapes = {name: p.shape for name, p in model.named_parameters()}
    chosen = fk.Selection(shapes, {"1.weight": torch.tensor([2])})
    optimizer = fk.MaskedAdamW(model, chosen, release_grads=True, max_grad_norm=1.0)
    model(torch.randn(2, 5)).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    optimizer.step()
    assert len(optimizer.state) == 1


def test_rows_keep_no_gradient_alive():
    """A range of rows is read as a view, which would hold on to the whole gradient."""
    model = nn.Linear(50, 20, bias=False)
    rows = fk.Selection({"weight": (20, 50)}, {}, ranges={"weight": fk.Rows((3, 5))})
    optimizer = fk.MaskedSGD(model, rows, release_grads=True, max_grad_norm=math.inf)
    model(torch.randn(2, 50)).sum().backward()
    (gathered,) = optimizer._released.grads.values()
    assert gathered.untyped_storage().nbytes() == 2 * 50 * 4


def test_dropped_by_zero_grad_and_spent_by_step():
    model = nn.Linear(50, 20)
    start = model.weight.detach().clone()
    optimizer = fk.MaskedSGD(model, selection(model, 0.3), lr=0.1, release_grads=True, max_grad_norm=math.inf)
    model(torch.randn(2, 50)).sum().backward()
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(model.weight, start)
    model(torch.randn(2, 50)).sum().backward()
    optimizer.step()
    moved = model.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(moved, start)
    assert torch.equal(model.weight, moved)


def test_accumulates_in_float32():
    """256 + 1 is 256 in bfloat16; the float32 buffer keeps both."""
    model = nn.Linear(3, 2, bias=False).bfloat16()
    chosen = fk.Selection({"weight": (2, 3)}, {"weight": torch.tensor([1, 4])})
    optimizer = fk.MaskedSGD(model, chosen, lr=1.0, release_grads=True, max_grad_norm=math.inf)
    start = model.weight.detach().view(-1)[[1, 4]].float()
    for size in (256.0, 1.0, 1.0):
        model(torch.full((1, 3), size, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    torch.testing.assert_close(optimizer.state[model.weight]["master"], start - 258.0)


def test_grad_scaler_is_refused_in_one_line():
    model = nn.Linear(5, 3)
    optimizer = fk.MaskedAdamW(model, selection(model, 0.5), release_grads=True, max_grad_norm=1.0)
    for unscale_first in (False, True):
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(model(torch.randn(2, 5)).sum()).backward()
        if unscale_first:
            scaler.unscale_(optimizer)
        with pytest.raises(RuntimeError, match="a GradScaler cannot check gradients that are released"):
            scaler.step(optimizer)
    optimizer.zero_grad()
    optimizer.step()


def test_several_processes():
    """Gradients would be gathered before they are exchanged: not by default, and never silently."""
    model = nn.Linear(1100, 1000)
    distributed = "torch.distributed."
    with (
        mock.patch(distributed + "is_initialized", return_value=True),
        mock.patch(distributed + "get_world_size", return_value=2),
    ):
        kept = fk.MaskedAdamW(model, selection(model), max_grad_norm=1.0)
        model(torch.randn(2, 1100)).sum().backward()
        assert model.weight.grad is not None
        kept.step()
        optimizer = fk.MaskedAdamW(model, selection(model), max_grad_norm=1.0, release_grads=True)
        model(torch.randn(2, 1100)).sum().backward()
        with pytest.raises(RuntimeError, match="released before processes exchange them"):
            optimizer.step()


def test_closed():
    """Afterwards gradients stay, and steps go on."""
    model = nn.Linear(50, 20)
    optimizer = fk.MaskedAdamW(model, selection(model), release_grads=True, max_grad_norm=1.0)
    model(torch.randn(2, 50)).sum().backward()
    optimizer.close()
    optimizer.close()
    model(torch.randn(2, 50)).sum().backward()
    assert model.weight.grad is not None
    optimizer.step()
    assert optimizer.state[model.weight]["step"] == 1
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer.zero_grad()
    scaler.scale(model.weight.sum()).backward()
    scaler.step(optimizer)
    assert model.weight.grad.eq(1).all()


def test_reselect_waits_for_the_step():
    model = nn.Linear(50, 20)
    first, second = selection(model), selection(model)
    optimizer = fk.MaskedAdamW(model, first, release_grads=True, max_grad_norm=1.0)
    model(torch.randn(2, 50)).sum().backward()
    with pytest.raises(RuntimeError, match="call reselect after"):
        optimizer.reselect(second)
    optimizer.step()
    optimizer.reselect(second)
    start = model.weight.detach().clone()
    model(torch.randn(2, 50)).sum().backward()
    optimizer.step()
    assert torch.equal(model.weight[~second.mask("weight")], start[~second.mask("weight")])
    assert not torch.equal(model.weight, start)


def test_activation_checkpointing_and_two_optimizers():
    """A recomputed forward changes nothing, and each optimizer has parameters of its own."""
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    halves = [
        fk.Selection(
            {n: p.shape for n, p in model.named_parameters() if n[0] == half}, {f"{half}.weight": torch.tensor([1])}
        )
        for half in "01"
    ]
    optimizers = [
        fk.MaskedSGD(
            [(n, p) for n, p in model.named_parameters() if n in half],
            half,
            lr=0.1,
            release_grads=True,
            max_grad_norm=math.inf,
        )
        for half in halves
    ]
    start = [p.detach().clone() for p in model.parameters()]
    x = torch.randn(2, 5, requires_grad=True)
    torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    moved = [int((p != q).sum()) for p, q in zip(model.parameters(), start, strict=True)]
    assert moved == [1, 0, 1, 0]
