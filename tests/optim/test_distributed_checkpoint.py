"""torch.distributed.checkpoint: it keys a state by the names of parameters, and makes one before it loads."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fishkern as fk
from fishkern.selection import bound_to_start

dcp = pytest.importorskip("torch.distributed.checkpoint")
from torch.distributed.checkpoint.state_dict import (  # noqa: E402
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

INPUTS = torch.randn(10, 6, generator=torch.Generator().manual_seed(1))


def model(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def optimizer(of: nn.Module, selection: fk.Selection, lr: float = 1e-2) -> fk.MaskedAdamW:
    named = list(of.named_parameters())
    groups = [{"params": named[:2]}, {"params": named[2:], "lr": 10 * lr}]
    return fk.MaskedAdamW(groups, selection, lr=lr)


def step(of: nn.Module, by: torch.optim.Optimizer) -> None:
    by.zero_grad()
    of(INPUTS.to(next(of.parameters()).dtype)).square().mean().backward()
    by.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
def test_going_on_from_a_distributed_checkpoint_is_not_stopping(tmp_path, dtype, flat):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    of = model(dtype)
    scores = {name: parameter.detach().float().abs() for name, parameter in of.named_parameters()}
    rows = fk.Selection({"0.weight": (8, 6)}, {}, ranges={"0.weight": fk.Rows((1, 3), (5, 8))})
    selection = bound_to_start(fk.select(scores, fk.PerTensorTopK(density=0.4, never="0.weight")) | rows, of)
    by = optimizer(of, selection)
    for _ in range(3):
        step(of, by)
    weights, state = get_state_dict(of, by, options=options)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=tmp_path)

    again = model(dtype)
    by_again = optimizer(again, selection, lr=7.0)
    before = copy.deepcopy(again.state_dict())
    weights, state = get_state_dict(again, by_again, options=options)
    assert all(torch.equal(value, before[name]) for name, value in again.state_dict().items())
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=tmp_path)
    set_state_dict(again, by_again, model_state_dict=weights, optim_state_dict=state, options=options)
    assert [group["lr"] for group in by_again.param_groups] == [1e-2, 1e-1]
    for _ in range(3):
        step(of, by)
        step(again, by_again)
    assert all(torch.equal(a, b) for a, b in zip(of.parameters(), again.parameters(), strict=True))


def test_a_group_without_parameters_goes_through_a_whole_state():
    """torch flattens a whole state, as accelerate saves it by default, and loses empty lists, also those of names."""
    of, again = model(torch.float32), model(torch.float32)
    selection = fk.select({name: one.detach().abs() for name, one in of.named_parameters()}, fk.GlobalTopK(k=20))
    by, by_again = (
        fk.MaskedAdamW([{"params": list(one.named_parameters())}, {"params": []}], selection, lr=1e-2)
        for one in (of, again)
    )
    step(of, by)
    state = by.state_dict()
    empty = {key: value for key, value in state["param_groups"][1].items() if value != [] or key == "params"}
    by_again.load_state_dict({**state, "param_groups": [state["param_groups"][0], empty]})
    again.load_state_dict(of.state_dict())
    step(of, by)
    step(again, by_again)
    assert "param_names" not in empty
    assert all(torch.equal(a, b) for a, b in zip(of.parameters(), again.parameters(), strict=True))


def test_a_parameter_without_a_selected_entry_has_no_state_to_load():
    """torch's strict loading misses it by name, and says how it goes on."""
    of = model(torch.float32)
    scores = {name: parameter.detach().abs() for name, parameter in of.named_parameters()}
    selection = fk.select(scores, fk.GlobalTopK(k=20, never="2.bias"))
    by = optimizer(of, selection)
    step(of, by)
    weights, state = copy.deepcopy(get_state_dict(of, by))
    again = model(torch.float32)
    by_again = optimizer(again, selection)
    with pytest.raises(RuntimeError, match=r"'2.bias'.*strict=False"):
        set_state_dict(again, by_again, model_state_dict=weights, optim_state_dict=state)
    loose = StateDictOptions(strict=False)
    set_state_dict(again, by_again, model_state_dict=weights, optim_state_dict=state, options=loose)
    step(of, by)
    step(again, by_again)
    assert all(torch.equal(a, b) for a, b in zip(of.parameters(), again.parameters(), strict=True))
