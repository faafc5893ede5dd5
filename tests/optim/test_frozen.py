"""What stops training saves: its state goes, its gradient is not computed, and it never moves again."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import fishkern as fk
from tests.support.closeness import assert_as_accurate

OPTIMIZERS = {
    "adamw": (fk.MaskedAdamW, torch.optim.AdamW, dict(lr=1e-2, weight_decay=0.1)),
    "sgd": (fk.MaskedSGD, torch.optim.SGD, dict(lr=0.05, momentum=0.9, weight_decay=0.1)),
}
every_optimizer = pytest.mark.parametrize("kind", OPTIMIZERS.values(), ids=OPTIMIZERS)
WIDTHS = (6, 12, 8, 3)
# By name the rows that still train after the event; "2.bias" and "4.weight" stop as a whole.
KEPT = {"0.weight": fk.Rows((0, 3), (6, 9)), "0.bias": fk.Rows((3, 12)), "2.weight": fk.Rows((0, 8))}


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(3)
    first, second, third = (nn.Linear(i, o) for i, o in pairwise(WIDTHS))
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), third).to(dtype)


def all_rows(model: nn.Module) -> fk.Selection:
    shapes = {name: p.shape for name, p in model.named_parameters()}
    return fk.Selection(shapes, {}, ranges={name: fk.Rows((0, shape[0])) for name, shape in shapes.items()})


def later(model: nn.Module) -> fk.Selection:
    shapes = {name: p.shape for name, p in model.named_parameters()}
    return fk.Selection(shapes, {}, ranges={**KEPT, "4.bias": fk.Rows((0, 1), (2, 3))})


def make(kind, model: nn.Module, selection: fk.Selection, **options) -> fk.MaskedOptimizer:
    return kind[0](model, selection, **{**kind[2], **options})


def backward(model: nn.Module, number: int, scaler: torch.amp.GradScaler | None = None) -> None:
    generator = torch.Generator().manual_seed(number)
    x, y = torch.randn(4, WIDTHS[0], generator=generator), torch.randn(4, WIDTHS[-1], generator=generator)
    like = next(model.parameters())
    loss = F.mse_loss(model(x.to(like)), y.to(like))
    (loss if scaler is None else scaler.scale(loss)).backward()


def train(model: nn.Module, optimizer, steps) -> None:
    for number in steps:
        optimizer.zero_grad()
        backward(model, number)
        optimizer.step()


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def mask(selection: fk.Selection) -> Tensor:
    return torch.cat([selection.mask(name).view(-1) for name in selection.names])


def simulated(kind, dtype: torch.dtype, event: int, steps: int) -> Tensor:
    """torch's optimizer on everything, and after each step from the event on what stopped is put back."""
    model = network(dtype)
    optimizer = kind[1](model.parameters(), **kind[2])
    stopped = ~mask(later(model))
    for number in range(steps):
        before = weights(model)
        train(model, optimizer, [number])
        if number >= event:
            after = torch.where(stopped, before, weights(model))
            nn.utils.vector_to_parameters(after, model.parameters())
    return weights(model)


@every_optimizer
@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("pending", [False, True], ids=["after a step", "before a step"])
def test_what_stops_stands_still_and_the_rest_goes_on(kind, freeze, pending):
    """Over 20 steps with decay and momentum, from the step of the event on, as torch's own with the frozen put back."""
    model = network()
    optimizer = make(kind, model, all_rows(model))
    train(model, optimizer, range(7))
    if pending:
        optimizer.zero_grad()
        backward(model, 7)
    start = weights(model)
    optimizer.reselect(later(model), freeze=freeze)
    if pending:
        optimizer.step()
    stopped = ~mask(later(model))
    for number in range(7 + pending, 27):
        train(model, optimizer, [number])
        assert torch.equal(weights(model)[stopped], start[stopped])
    assert (weights(model)[~stopped] != start[~stopped]).all()
    assert_as_accurate(weights(model), simulated(kind, torch.float32, 7, 27), simulated(kind, torch.float64, 7, 27))


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_goes_with_its_memory(kind, dtype):
    """What stays keeps its values to the bit, and nothing keeps the old memory alive: not even a view of it."""
    model = network(dtype)
    optimizer = make(kind, model, all_rows(model))
    train(model, optimizer, range(3))
    optimizer.zero_grad()
    before = {name: dict(optimizer.state[p]) for name, p in model.named_parameters()}
    numbers = len(optimizer._buckets[0][0].flat)  # of each entry, four bytes each
    held, bytes_before, entries = live_bytes(), optimizer.state_bytes, optimizer.selection.count
    kept_values = {
        (name, key): selected.gather(value.view(selected.shape)).clone()
        for name, state in before.items()
        for key, value in state.items()
        if (selected := later(model).entries(name)).count and value.shape == (selected.shape.numel(),)
    }
    del before
    change = optimizer.reselect(later(model), freeze=True)
    for (name, key), values in kept_values.items():
        assert torch.equal(optimizer.state[model.get_parameter(name)][key], values)
    assert change.kept == later(model).count
    assert change.dropped == entries - change.kept > 0
    ranges = sum(state["rows"].nbytes for state in optimizer.state.values() if "rows" in state)
    dropped = 4 * numbers * change.dropped - ranges
    extra = sum(values.untyped_storage().nbytes() for values in kept_values.values())
    assert held + extra - live_bytes() >= dropped
    assert bytes_before - optimizer.state_bytes >= dropped
    train(model, optimizer, [3])
    assert bytes_before - optimizer.state_bytes >= dropped
    fused = [optimizer._is_fused(bucket) for bucket in optimizer._buckets[0]]
    assert fused == [True]
    assert all("start" not in state for state in optimizer.state.values())


def live_bytes() -> int:
    """The memory of all tensors that Python can reach."""
    gc.collect()
    # those without memory of their own are left out: tensors of a plan or an export, sparse ones
    tensors = [one for one in gc.get_objects() if type(one) in (Tensor, nn.Parameter)]
    tensors = [one for one in tensors if one.layout is torch.strided]
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
    return sum(storages.values())


@every_optimizer
@pytest.mark.parametrize("left", [fk.Rows((0, 6)), fk.Rows((6, 9))], ids=["first", "added"])
def test_rows_are_fused_again_when_all_are_of_one_age(kind, left):
    """Those that were there first, or those that were added: the other ones are gone."""
    torch.manual_seed(0)
    weight, alone = (nn.Parameter(torch.ones(12, 5)) for _ in range(2))
    grads = [torch.randn(12, 5) for _ in range(7)]

    def of(*rows) -> fk.Selection:
        return fk.Selection({"weight": (12, 5)}, {}, ranges={"weight": fk.Rows(*rows)})

    def run(optimizer, parameter, some_grads):
        for grad in some_grads:
            parameter.grad = grad.clone()
            optimizer.step()

    optimizer = kind[0]([("weight", weight)], of((0, 6)), **kind[2])
    run(optimizer, weight, grads[:3])
    optimizer.reselect(of((0, 9)))
    run(optimizer, weight, grads[3:5])
    assert [optimizer._is_fused(bucket) for bucket in optimizer._buckets[0]] == [False]
    optimizer.reselect(of(*left.bounds))
    run(optimizer, weight, grads[5:])
    assert [optimizer._is_fused(bucket) for bucket in optimizer._buckets[0]] == [True]
    since = 3 if left.bounds[0][0] else 0
    assert optimizer.state[weight]["step"] == 7 - since
    run(kind[0]([("weight", alone)], of(*left.bounds), **kind[2]), alone, grads[since:])
    mask = of(*left.bounds).mask("weight")
    torch.testing.assert_close(weight[mask], alone[mask])


def test_memory_also_goes_where_a_parameter_outside_the_pool_waits_for_a_gradient():
    """Its state was a view of the same memory."""
    model = network()
    pool = all_rows(model).restrict("[!4]*")
    optimizer = fk.MaskedAdamW(model, pool, outside="train", fused=True)
    train(model, optimizer, range(2))
    optimizer.zero_grad()
    before = optimizer.state_bytes
    one = fk.Selection(pool.shapes, {}, ranges={"0.bias": fk.Rows((0, 1))})
    optimizer.reselect(one, freeze=True)
    left = 1 + sum(p.numel() for p in model[4].parameters())
    assert optimizer.state_bytes < 2 * 4 * left + 200 < before


def products(model: nn.Module) -> int:
    with FlopCounterMode(display=False) as counter:
        backward(model, 0)
    return counter.get_total_flops()


def test_a_frozen_weight_costs_no_product():
    """Neither its gradient's, nor those of gradients that only it needed."""
    model = network()
    optimizer = fk.MaskedAdamW(model, all_rows(model))
    whole = products(model)
    shapes = all_rows(model).shapes
    stop = fk.Selection(shapes, {}, whole=["2.weight"])
    assert optimizer.reselect(all_rows(model) - stop) == (mask(all_rows(model) - stop).sum(), 96, 0)
    assert (products(model), optimizer.frozen) == (whole, ())
    optimizer.reselect(all_rows(model) - stop, freeze=True)
    assert optimizer.frozen == ("2.weight",)
    assert model[2].weight.grad is None
    assert products(model) == whole - 2 * 4 * 12 * 8
    lowest = fk.Selection(shapes, {}, whole=["0.weight", "0.bias", "2.weight", "2.bias"])
    optimizer.reselect(all_rows(model) - lowest, freeze=True)
    # left are the forward pass and the last weight's own
    assert products(model) == 2 * 4 * (6 * 12 + 12 * 8 + 8 * 3) + 2 * 4 * 8 * 3


def test_only_what_the_optimizer_froze_trains_again():
    model = network()
    model[0].bias.requires_grad_(False)
    everything = all_rows(model)
    mine = everything - fk.Selection(everything.shapes, {}, whole=["0.bias"])
    optimizer = fk.MaskedAdamW(model, mine)
    optimizer.reselect(later(model) - fk.Selection(everything.shapes, {}, whole=["0.bias"]), freeze=True)
    assert optimizer.frozen == ("2.bias", "4.weight")
    assert not any(model.get_parameter(name).requires_grad for name in ("0.bias", "2.bias", "4.weight"))
    with pytest.raises(ValueError, match=r"requires_grad=False \(0.bias\)"):
        optimizer.reselect(everything)
    assert optimizer.frozen == ("2.bias", "4.weight")
    assert not model[2].bias.requires_grad
    assert optimizer.reselect(mine).added == mine.count - optimizer_count(mine, model)
    assert optimizer.frozen == ()
    assert model[2].bias.requires_grad
    assert not model[0].bias.requires_grad
    train(model, optimizer, range(2))
    assert optimizer.state[model[2].bias]["step"] == 2


def optimizer_count(mine: fk.Selection, model: nn.Module) -> int:
    return (later(model) & mine).count


def test_a_later_selection_without_freeze_leaves_frozen_what_is():
    model = network()
    optimizer = fk.MaskedAdamW(model, all_rows(model))
    optimizer.reselect(later(model), freeze=True)
    optimizer.reselect(later(model) - fk.Selection(later(model).shapes, {}, whole=["0.bias"]))
    assert optimizer.frozen == ("2.bias", "4.weight")
    assert model[0].bias.requires_grad


def test_nothing_left_to_train_is_refused():
    model = network()
    optimizer = fk.MaskedAdamW(model, all_rows(model))
    with pytest.raises(ValueError, match="nothing would be trained any more"):
        optimizer.reselect(fk.Selection(all_rows(model).shapes, {}), freeze=True)
    assert all(p.requires_grad for p in model.parameters())


def saved_and_loaded(model, optimizer, kind):
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = network(next(model.parameters()).dtype)
    resumed.load_state_dict(saved["model"])
    again = make(kind, resumed, optimizer.selection)
    backward(resumed, 0)
    again.load_state_dict(saved["optimizer"])
    return resumed, again


RESUMED = {
    "loaded": saved_and_loaded,
    "copied": lambda model, optimizer, kind: copy.deepcopy((model, optimizer)),
    "pickled": lambda model, optimizer, kind: pickle.loads(pickle.dumps((model, optimizer))),
}


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("resume", RESUMED.values(), ids=RESUMED)
def test_resuming_is_not_stopping(kind, dtype, resume):
    """With what is frozen, to the same bits; and it trains again as it would have."""
    model = network(dtype)
    optimizer = make(kind, model, all_rows(model))
    train(model, optimizer, range(3))
    optimizer.reselect(later(model), freeze=True)
    train(model, optimizer, range(3, 5))
    resumed, again = resume(model, optimizer, kind)
    assert again.frozen == optimizer.frozen == ("2.bias", "4.weight")
    assert resumed[2].bias.grad is None
    for one, by in ((model, optimizer), (resumed, again)):
        train(one, by, range(5, 8))
        by.reselect(all_rows(one))
        train(one, by, range(8, 10))
    assert [p.requires_grad for p in resumed.parameters()] == [True] * 6
    assert torch.equal(weights(model), weights(resumed))


def test_a_state_of_another_time_sets_what_is_frozen():
    """Of before the event, into the optimizer that went on; damaged ones and those of other selections are refused."""
    model = network()
    optimizer = fk.MaskedAdamW(model, all_rows(model))
    optimizer.reselect(later(model))
    earlier = optimizer.state_dict()
    optimizer.reselect(later(model), freeze=True)
    frozen = copy.deepcopy(optimizer.state_dict())
    del earlier["param_groups"][0]["frozen"]  # of a version that froze nothing
    optimizer.load_state_dict(earlier)
    assert optimizer.frozen == ()
    assert model[2].bias.requires_grad
    whole = fk.MaskedAdamW(network(), all_rows(model))
    with pytest.raises(ValueError, match=r"training in which 2.bias, 4.weight had stopped"):
        whole.load_state_dict(frozen)
    frozen["param_groups"][0]["frozen"] = ["5.bias"]
    with pytest.raises(ValueError, match="'frozen' of a group lists names of its parameters"):
        optimizer.load_state_dict(frozen)
    assert optimizer.frozen == ()


@every_optimizer
def test_released_gradients_groups_and_a_scaler(kind):
    """A gradient that is not computed is not released either, and a scaler misses nothing."""
    results = []
    for release in (False, True):
        model = network()
        named = list(model.named_parameters())
        groups = [{"params": named[:3]}, {"params": named[3:], "lr": 2e-2}]
        optimizer = make(kind, groups, all_rows(model), release_grads=release, max_grad_norm=1e6)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=not release)
        for number in range(8):
            optimizer.zero_grad()
            backward(model, number, scaler)
            scaler.step(optimizer)
            scaler.update()
            if number == 3:
                optimizer.reselect(later(model), freeze=True)
        assert optimizer.frozen == ("2.bias", "4.weight")
        assert [group["frozen"] for group in optimizer.param_groups] == [[], ["2.bias", "4.weight"]]
        results.append(weights(model))
    torch.testing.assert_close(*results)


def test_a_tied_parameter_stops_under_every_name():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.middle, self.head = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x):
            return self.head(self.middle(self.embedding(x)))

    model = Tied()
    shapes = {"head.weight": (5, 4), "middle.weight": (4, 4), "middle.bias": (4,)}
    optimizer = fk.MaskedAdamW(model, fk.Selection(shapes, {}, whole=list(shapes)))
    optimizer.reselect(fk.Selection(shapes, {}, whole=["middle.weight"]), freeze=True)
    assert optimizer.frozen == ("head.weight", "middle.bias")
    assert not model.embedding.weight.requires_grad
    start = model.embedding.weight.detach().clone()
    model(torch.tensor([1, 2])).sum().backward()
    optimizer.step()
    assert torch.equal(model.embedding.weight, start)
    assert optimizer.state[model.middle.weight]["step"] == 1
