"""Laws of every masked optimizer, whatever its algorithm."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fishkern as fk
from tests.support.closeness import assert_as_accurate

pytestmark = pytest.mark.matrix


class Kind(NamedTuple):
    """An optimizer, its counterpart in torch, and options that both take."""

    masked: type[torch.optim.Optimizer]
    dense: type[torch.optim.Optimizer]
    options: dict

    def make(self, model, selection, **options):
        return self.masked(model, selection, **{**self.options, **options})

    def make_dense(self, params, **options):
        return self.dense(params, foreach=False, fused=False, **{**self.options, **options})


OPTIMIZERS = {
    "adamw": Kind(fk.MaskedAdamW, torch.optim.AdamW, dict(lr=1e-2, weight_decay=0.1)),
    "sgd": Kind(fk.MaskedSGD, torch.optim.SGD, dict(lr=0.05, weight_decay=0.1)),
    "momentum": Kind(fk.MaskedSGD, torch.optim.SGD, dict(lr=0.05, momentum=0.9, dampening=0.2, weight_decay=0.1)),
    "nesterov": Kind(fk.MaskedSGD, torch.optim.SGD, dict(lr=0.05, momentum=0.9, nesterov=True)),
}
every_optimizer = pytest.mark.parametrize("kind", OPTIMIZERS.values(), ids=OPTIMIZERS)


def tiny(dtype=torch.float32) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 11), nn.Tanh(), nn.Linear(11, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def some(model: nn.Module, density: float = 0.3, *, seed: int = 0, bare: str = "2.weight") -> fk.Selection:
    """A random selection: one parameter whole, one not at all."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    masks = {n: torch.rand(s.numel(), generator=generator) < density for n, s in shapes.items() if n != bare}
    indices = {n: mask.nonzero().view(-1) for n, mask in masks.items() if n != "4.bias"}
    return fk.Selection(shapes, indices, whole=["4.bias"])


def ranged(model: nn.Module, density: float = 0.3, *, seed: int = 0) -> fk.Selection:
    """Random rows, of one parameter columns, and again one parameter whole and one not at all."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    ranges = {}
    for name, shape in shapes.items():
        kind, size = (fk.Columns, shape[1]) if name == "4.weight" else (fk.Rows, shape[0])
        numbers = (torch.rand(size, generator=generator) < density).nonzero().view(-1)
        ranges[name] = kind(*((number, number + 1) for number in numbers.tolist()))
    ranges = {name: given for name, given in ranges.items() if name not in ("2.weight", "4.bias")}
    return fk.Selection(shapes, {}, whole=["4.bias"], ranges=ranges)


def listed(selection: fk.Selection) -> fk.Selection:
    """The same entries without ranges."""
    return fk.Selection(selection.shapes, {name: selection.indices(name) for name in selection.names})


every_form = pytest.mark.parametrize("select", [some, ranged], ids=["listed", "ranges"])


def everything(model: nn.Module) -> fk.Selection:
    shapes = {name: p.shape for name, p in model.named_parameters()}
    return fk.Selection(shapes, {}, whole=list(shapes))


def loss_of(model: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(4, 6, generator=generator), torch.randn(4, 3, generator=generator)
    like = next(model.parameters())
    return F.mse_loss(model(x.to(like)), y.to(like))


def train(model: nn.Module, optimizer, steps, *, lr: float | None = None) -> None:
    for step in steps:
        if lr is not None:
            for group in optimizer.param_groups:
                group["lr"] = lr / (1 + step)
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def chosen(selection: fk.Selection) -> Tensor:
    return torch.cat([selection.mask(name).view(-1) for name in selection.names])


def same_state(a, b) -> bool:
    """Whether two state dicts hold equal tensors under equal keys."""
    return a["param_groups"] == b["param_groups"] and all(
        ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
        for ours, theirs in zip(a["state"].values(), b["state"].values(), strict=True)
    )


def test_every_optimizer_is_listed():
    exported = [value for value in vars(fk).values() if isinstance(value, type)]
    optimizers = {cls for cls in exported if issubclass(cls, fk.MaskedOptimizer)} - {fk.MaskedOptimizer}
    assert optimizers == {kind.masked for kind in OPTIMIZERS.values()}


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("maximize", [False, True])
def test_density_1_is_torch(kind, dtype, maximize):
    """Bit for bit over 100 steps of two groups with options of their own and a schedule."""
    ours, theirs = tiny(dtype), tiny(dtype)

    def groups(named):
        decay = [entry for entry in named if entry[0].endswith("weight")]
        return [{"params": decay}, {"params": [e for e in named if e not in decay], "lr": 3e-3, "weight_decay": 0.0}]

    options = dict(maximize=maximize)
    masked = kind.make(groups(list(ours.named_parameters())), everything(ours), master_weights=False, **options)
    dense = kind.make_dense(groups(list(theirs.named_parameters())), **options)
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100) for optimizer in (masked, dense)]
    for step in range(100):
        for model, optimizer, schedule in zip((ours, theirs), (masked, dense), schedules, strict=True):
            train(model, optimizer, [step])
            schedule.step()
    assert torch.equal(weights(ours), weights(theirs))
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        for key in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
            assert (key in masked.state[p]) == (key in dense.state[q])
            assert key not in dense.state[q] or torch.equal(masked.state[p][key], dense.state[q][key].view(-1))


@every_optimizer
@every_form
@pytest.mark.parametrize("density", [0.0, 0.05, 0.5])
def test_any_density_is_a_dense_simulation(kind, select, density):
    """torch's optimizer in float64, put back after each step where nothing is selected."""

    def simulated(dtype):
        model = tiny(dtype)
        start = [p.detach().clone() for p in model.parameters()]
        optimizer = kind.make_dense(model.parameters())
        for step in range(20):
            train(model, optimizer, [step])
            with torch.no_grad():
                for (name, p), before in zip(model.named_parameters(), start, strict=True):
                    p.copy_(torch.where(selection.mask(name), p, before))
        return weights(model)

    model = tiny()
    selection = select(model, density)
    train(model, kind.make(model, selection), range(20))
    assert_as_accurate(weights(model), simulated(torch.float32), simulated(torch.float64))


@every_optimizer
@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_else_moves(kind, select, dtype):
    """Neither by decay, momentum or a changed lr, nor with a loaded state."""
    model = tiny(dtype)
    selection, start = select(model), weights(model)
    optimizer = kind.make(model, selection)
    train(model, optimizer, range(10), lr=0.5)
    other = kind.make(model, selection)
    other.load_state_dict(optimizer.state_dict())
    train(model, other, range(10, 20))
    mask = chosen(selection)
    assert torch.equal(weights(model)[~mask], start[~mask])
    assert (weights(model)[mask] != start[mask]).float().mean() > 0.9


@every_optimizer
@every_form
def test_state_is_of_the_selection(kind, select):
    """One number for each selected entry, no indices of rows, and none for one of which nothing is selected."""
    model = tiny(torch.bfloat16)
    selection = select(model)
    optimizer = kind.make(model, selection)
    assert not optimizer.state
    train(model, optimizer, range(2))
    for name, p in model.named_parameters():
        count = selection.counts[name]
        assert (p in optimizer.state) == (count > 0)
        state = {**optimizer.state.get(p, {})}
        if (spans := selection.entries(name).spans) is not None and 0 < count < p.numel():
            assert state.pop("rows").shape == (len(spans), 2)
            assert "indices" not in state
        for key, value in state.items():
            assert value.shape == (() if key == "step" else (count,))
            assert value.dtype == (torch.int32 if key == "indices" else torch.float32)


@every_optimizer
@every_form
def test_master_is_float32_rounded(kind, select):
    """With a master, 16-bit weights are those of the float32 optimizer, rounded; small steps are not lost."""
    narrow, wide = tiny(torch.bfloat16), tiny(torch.bfloat16).float()
    selection = select(narrow, 0.5)
    options = dict(lr=1e-4, weight_decay=0.0)
    masked, exact = kind.make(narrow, selection, **options), kind.make(wide, selection, **options)
    for step in range(30):
        train(narrow, masked, [step])
        exact.zero_grad()
        for p, q in zip(narrow.parameters(), wide.parameters(), strict=True):
            q.grad = p.grad.float()
        exact.step()
    assert torch.equal(weights(narrow), weights(wide).bfloat16())
    assert not torch.equal(weights(wide), weights(tiny(torch.bfloat16)).float())


def by_state_dict(model, start, selection):
    model.load_state_dict(start)


def by_data(model, start, selection):
    """Which autograd does not notice."""
    for name, p in model.named_parameters():
        p.data = start[name].clone()


def by_delta(model, start, selection):
    base = tiny(torch.bfloat16)
    fk.apply_delta(model, fk.delta(base, selection))


@every_optimizer
@every_form
@pytest.mark.parametrize("restore", [by_state_dict, by_data, by_delta])
def test_restored_weights_stay_restored(kind, select, restore):
    """A checkpoint that is loaded between two steps counts, not the float32 copies of before."""
    model = tiny(torch.bfloat16)
    selection, start = select(model, 0.5), copy.deepcopy(model.state_dict())
    optimizer = kind.make(model, selection)
    train(model, optimizer, range(5))
    assert not torch.equal(weights(model), weights(tiny(torch.bfloat16)))
    restore(model, start, selection)
    train(model, optimizer, [5], lr=0.0)
    assert torch.equal(weights(model), weights(tiny(torch.bfloat16)))
    train(model, optimizer, range(6, 9), lr=0.5)
    assert not torch.equal(weights(model), weights(tiny(torch.bfloat16)))


@every_optimizer
@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_have_moved_in_memory_are_stepped(kind, select, dtype):
    """Those that the model has, not the memory that they had at the step before."""
    model, twin = tiny(dtype), tiny(dtype)
    optimizer, other = kind.make(model, select(model)), kind.make(twin, select(twin))
    for step in range(4):
        train(model, optimizer, [step])
        train(twin, other, [step])
        for p in twin.parameters():
            p.data = p.data.clone()
    assert torch.equal(weights(model), weights(twin))


@every_optimizer
@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_load_continue(kind, select, dtype):
    """Saved, loaded with weights_only and continued equals not stopping."""
    model = tiny(dtype)
    selection = select(model)
    optimizer = kind.make(model, selection)
    train(model, optimizer, range(5))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, range(5, 10))

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = tiny(dtype)
    resumed.load_state_dict(saved["model"])
    another = kind.make(resumed, selection, lr=7.0)  # the saved one counts
    another.load_state_dict(saved["optimizer"])
    assert same_state(another.state_dict(), saved["optimizer"])
    train(resumed, another, range(5, 10))
    assert torch.equal(weights(resumed), weights(model))
    assert same_state(another.state_dict(), optimizer.state_dict())


@every_optimizer
def test_a_state_from_before_an_option_existed_loads(kind):
    """An option that the state lacks stays as the optimizer was made; those of the state are loaded."""
    model, twin = tiny(), tiny()
    selection = some(model)
    optimizer = kind.make(model, selection)
    train(model, optimizer, range(3))
    twin.load_state_dict(model.state_dict())
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        del group["maximize"], group["weight_decay"]
    resumed = kind.make(twin, selection, lr=7.0)
    resumed.load_state_dict(saved)
    train(model, optimizer, range(3, 5))
    train(twin, resumed, range(3, 5))
    assert torch.equal(weights(model), weights(twin))


@every_optimizer
@every_form
def test_a_compiled_step_is_the_step(kind, select):
    """``torch.compile`` runs it as it is; also the first one, which makes the state."""
    model, twin = tiny(torch.bfloat16), tiny(torch.bfloat16)
    selection = select(model)
    optimizer, other = kind.make(model, selection), kind.make(twin, selection)
    compiled = torch.compile(other.step, backend="eager")
    for step in range(3):
        train(model, optimizer, [step])
        other.zero_grad()
        loss_of(twin, step).backward()
        compiled()
    assert torch.equal(weights(model), weights(twin))
    assert same_state(optimizer.state_dict(), other.state_dict())


@every_optimizer
def test_its_repr_is_short(kind):
    """The number of selected entries and the options, in one line, without the names of the parameters."""
    model = tiny()
    named = list(model.named_parameters())
    groups = [{"params": named[:2], "lr": 0.5}, {"params": named[2:]}]
    one, two = repr(kind.make(model, some(model))), repr(kind.make(groups, some(model)))
    count = some(model).count
    assert one.startswith(f"{kind.masked.__name__}({count} of 155 entries, 6 parameters, lr={kind.options['lr']}, ")
    assert f"6 parameters, 2 groups, lr=[0.5, {kind.options['lr']}], " in two
    assert max(map(len, (one, two))) < 200
    assert "\n" not in one + two


@every_optimizer
@every_form
@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"]
)
def test_copies_continue(kind, select, how):
    model = tiny(torch.bfloat16)
    optimizer = kind.make(model, select(model))
    train(model, optimizer, range(3))
    twin, twins = how((model, optimizer))
    train(model, optimizer, range(3, 6))
    train(twin, twins, range(3, 6))
    assert torch.equal(weights(model), weights(twin))
    assert same_state(optimizer.state_dict(), twins.state_dict())


@every_optimizer
def test_accelerate_keeps_the_state(kind):
    """``prepare`` saves and loads the state; torch's own load would round indices and masters to 16 bits."""
    accelerate = pytest.importorskip("accelerate")
    torch.manual_seed(0)
    model = nn.Linear(300, 300).bfloat16()
    places = torch.tensor([5, 70_001, 89_999])
    rows = fk.Rows((3, 9), (20, 21))
    selection = fk.Selection({"weight": (300, 300), "bias": (300,)}, {"weight": places}, ranges={"bias": rows})
    optimizer = kind.make(model, selection, lr=1e-4)
    for _ in range(10):
        optimizer.zero_grad()
        model(torch.randn(4, 300, dtype=torch.bfloat16)).square().mean().backward()
        optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    _, prepared = accelerate.Accelerator(cpu=True).prepare(model, optimizer)
    assert same_state(prepared.state_dict(), before)
    assert torch.equal(prepared.state_dict()["state"][0]["indices"], places.int())
    assert prepared.state_dict()["state"][1]["rows"].tolist() == [[3, 9], [20, 21]]
    prepared.step()
    prepared.zero_grad()


@every_optimizer
@every_form
def test_grad_scaler(kind, select):
    """Scaled gradients give the same steps, and a step that is skipped leaves weights and state alone."""
    plain, scaled = tiny(), tiny()
    selection = select(plain)
    ours, with_scaler = kind.make(plain, selection), kind.make(scaled, selection)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    train(plain, ours, range(4))
    for step in range(4):
        with_scaler.zero_grad()
        scaler.scale(loss_of(scaled, step)).backward()
        scaler.step(with_scaler)
        scaler.update()
    assert torch.equal(weights(plain), weights(scaled))
    state = copy.deepcopy(with_scaler.state_dict())
    next(scaled.parameters()).grad[0, 0] = torch.inf
    scaler.step(with_scaler)
    scaler.update()
    assert torch.equal(weights(plain), weights(scaled))
    assert same_state(with_scaler.state_dict(), state)


@every_optimizer
@every_form
@pytest.mark.parametrize("release", [False, True], ids=["kept", "released"])
def test_gradient_accumulation(kind, select, release):
    """Two backward passes before a step are one pass over both losses."""
    apart, together = tiny(), tiny()
    selection = select(apart)
    options = dict(release_grads=release, max_grad_norm=1e6)
    first, second = kind.make(apart, selection, **options), kind.make(together, selection, **options)
    for step in range(0, 6, 2):
        for model, optimizer, losses in ((apart, first, (step, step + 1)), (together, second, None)):
            optimizer.zero_grad()
            if losses:
                for number in losses:
                    loss_of(model, number).backward()
            else:
                (loss_of(model, step) + loss_of(model, step + 1)).backward()
            optimizer.step()
    torch.testing.assert_close(weights(apart), weights(together))


@every_optimizer
@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_released_gradients_change_nothing(kind, select, dtype):
    kept, released = tiny(dtype), tiny(dtype)
    selection = select(kept)
    train(kept, kind.make(kept, selection, release_grads=False), range(5))
    optimizer = kind.make(released, selection, release_grads=True)
    with pytest.warns(UserWarning, match="clip_grad_norm_ does not see them"):
        train(released, optimizer, range(5))
    assert torch.equal(weights(kept), weights(released))
    assert [p.grad is None for p in released.parameters()] == [name not in selection.whole for name in selection.names]


@every_optimizer
@every_form
@pytest.mark.parametrize("release", [False, True], ids=["kept", "released"])
def test_clipping_is_that_of_the_selected_entries(kind, select, release):
    """As masked gradients, torch's clip_grad_norm_ and torch's optimizer, put back elsewhere."""
    model, dense = tiny(), tiny()
    selection = select(model)
    optimizer = kind.make(model, selection, max_grad_norm=1e-2, release_grads=release)
    theirs = kind.make_dense(dense.parameters())
    for step in range(5):
        train(model, optimizer, [step])
        theirs.zero_grad()
        loss_of(dense, step).backward()
        start = [p.detach().clone() for p in dense.parameters()]
        for name, p in dense.named_parameters():
            p.grad *= selection.mask(name)
        norm = torch.nn.utils.clip_grad_norm_(dense.parameters(), 1e-2)
        theirs.step()
        with torch.no_grad():
            for (name, p), before in zip(dense.named_parameters(), start, strict=True):
                p.copy_(torch.where(selection.mask(name), p, before))
        torch.testing.assert_close(optimizer.grad_norm, norm)
    torch.testing.assert_close(weights(model), weights(dense))


AS_LISTED = {
    "float32": (torch.float32, {}),
    "float64": (torch.float64, {}),
    "masters": (torch.bfloat16, {}),
    "16 bits": (torch.bfloat16, dict(master_weights=False)),
    "clipped": (torch.float32, dict(max_grad_norm=1e-2)),
    "clipped masters": (torch.bfloat16, dict(max_grad_norm=1e-2)),
    "released": (torch.float32, dict(release_grads=True, max_grad_norm=1e-2)),
    "uphill": (torch.float32, dict(maximize=True)),
}


@every_optimizer
@pytest.mark.parametrize(("dtype", "options"), AS_LISTED.values(), ids=AS_LISTED)
def test_ranges_step_to_the_bits_of_their_entries(kind, dtype, options):
    """With a schedule, over a change of the selection; weights, state and norm. Unfused, and columns in any case."""
    results = []
    for form in (lambda selection: selection, listed):
        model = tiny(dtype)
        optimizer = kind.make(model, form(ranged(model, 0.6)), **{"fused": False, **options})
        train(model, optimizer, range(4), lr=0.5)
        change = optimizer.reselect(form(ranged(model, 0.4, seed=1)))
        train(model, optimizer, range(4, 8))
        results.append((model, optimizer, change))
    (ours, ranges, our_change), (theirs, lists, their_change) = results
    assert our_change == their_change
    assert torch.equal(weights(ours), weights(theirs))
    assert (ranges.grad_norm is None) == (lists.grad_norm is None)
    assert ranges.grad_norm is None or torch.equal(ranges.grad_norm, lists.grad_norm)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        mine, yours = ({**one.state.get(r, {})} for one, r in ((ranges, p), (lists, q)))
        for state in (mine, yours):
            state.pop("rows", None), state.pop("indices", None)
        assert mine.keys() == yours.keys()
        assert all(torch.equal(mine[key], yours[key]) for key in mine)


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("fused", [None, True])
def test_rows_step_as_torch_does_on_them(kind, dtype, maximize, fused):
    """To the bit as torch's fused optimizer steps each range as a tensor of its own; whole parameters by fused=True."""
    torch.manual_seed(0)
    ranges = {"wide": fk.Rows((0, 5), (7, 8), (20, 37)), "vector": fk.Rows((3, 9)), "all rows": fk.Rows((0, 3))}
    shapes = {"wide": (37, 19), "vector": (11,), "all rows": (3, 50), "whole": (6, 7)}
    model = nn.ParameterDict({name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()})
    selection = fk.Selection(shapes, {}, ranges=ranges, whole=["whole"])
    bounds = {name: given.bounds for name, given in ranges.items()} | {"whole": ((0, 6),)}
    rows = [(n, a, b, model[n][a:b].detach().clone().requires_grad_()) for n in shapes for a, b in bounds[n]]
    optimizer = kind.make(model, selection, maximize=maximize, fused=fused)
    theirs = kind.dense([row for *_, row in rows], fused=True, maximize=maximize, **kind.options)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(one, 0.9) for one in (optimizer, theirs)]
    start = {name: p.detach().clone() for name, p in model.items()}
    for _ in range(6):
        for p in model.values():
            p.grad = torch.randn_like(p)
        for name, first, last, row in rows:
            row.grad = model[name].grad[first:last].clone()
        for one, schedule in zip((optimizer, theirs), schedules, strict=True):
            one.step()
            schedule.step()
    for name, first, last, row in rows:
        if name == "whole" and fused is None:
            torch.testing.assert_close(model[name][first:last], row)
        else:
            assert torch.equal(model[name][first:last], row)
    for name, p in model.items():
        mask = selection.mask(name)
        assert torch.equal(p[~mask], start[name][~mask])


@every_optimizer
@pytest.mark.parametrize("fused", [None, False])
def test_a_selection_of_rows_that_shrinks(kind, fused):
    """What stays goes on as if nothing had happened, also from a file; what does not stays where it is."""
    torch.manual_seed(0)
    shape = (12, 5)
    wide = fk.Selection({"weight": shape}, {}, ranges={"weight": fk.Rows((1, 11))})
    narrow = wide - fk.Selection({"weight": shape}, {}, ranges={"weight": fk.Rows((0, 2), (4, 7))})
    assert narrow.entries("weight").ranges == fk.Rows((2, 4), (7, 11))
    weight, always = (nn.Parameter(torch.ones(shape)) for _ in range(2))
    grads = [torch.randn(shape) for _ in range(9)]

    def run(optimizer, parameter, some_grads):
        for grad in some_grads:
            parameter.grad = grad.clone()
            optimizer.step()

    optimizer = kind.make([("weight", weight)], wide, fused=fused)
    run(optimizer, weight, grads[:4])
    before = weight.detach().clone()
    assert optimizer.reselect(narrow) == (30, 20, 0)
    assert "start" not in optimizer.state[weight]  # every entry has the parameter's age, so rows are still fused
    run(optimizer, weight, grads[4:7])
    resumed = kind.make([("weight", weight)], narrow, fused=fused)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(resumed, weight, grads[7:])
    run(kind.make([("weight", always)], wide, fused=fused), always, grads)
    mask = narrow.mask("weight")
    torch.testing.assert_close(weight[mask], always[mask])
    assert torch.equal(weight[~mask], before[~mask])
    assert resumed.state[weight]["step"] == 9
    assert resumed.state[weight]["rows"].tolist() == [[2, 4], [7, 11]]


@every_optimizer
def test_a_state_loads_whichever_way_its_entries_are_written(kind):
    """Of rows into one of the same entries in a list, and back; other rows are refused."""
    model = tiny()
    selection = ranged(model)
    optimizer = kind.make(model, selection)
    train(model, optimizer, range(3))
    by_list = kind.make(model, listed(selection))
    by_list.load_state_dict(optimizer.state_dict())
    again = kind.make(model, selection)
    again.load_state_dict(by_list.state_dict())
    assert same_state(again.state_dict(), optimizer.state_dict())
    assert "rows" not in by_list.state[model[0].weight]
    other = kind.make(model, ranged(model, seed=1))
    with pytest.raises(ValueError, match="the state of 0.weight belongs to other entries than are selected here"):
        other.load_state_dict(optimizer.state_dict())
    damaged = optimizer.state_dict()
    damaged["state"][0]["rows"] = damaged["state"][0]["rows"].flip(1)
    with pytest.raises(ValueError, match="the state of 0.weight belongs to other entries than are selected here"):
        again.load_state_dict(damaged)


@every_optimizer
def test_rows_in_another_memory_order_step_at_the_same_places(kind):
    """Of a parameter that is not contiguous they are gathered."""
    torch.manual_seed(0)
    shape, rows = (6, 4, 2, 2), fk.Rows((1, 3), (5, 6))
    plain = nn.Parameter(torch.randn(shape))
    strided = nn.Parameter(plain.detach().clone(memory_format=torch.channels_last))
    for p in (plain, strided):
        optimizer = kind.make([("weight", p)], fk.Selection({"weight": shape}, {}, ranges={"weight": rows}))
        for seed in range(3):
            p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            optimizer.step()
    torch.testing.assert_close(plain, strided)


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["listed", "rows"])
def test_reselect(kind, form, dtype):
    """Entries that stay go on as if nothing had happened, those that come in as if training began with them."""
    torch.manual_seed(0)
    shape = (9, 8)
    if form == "listed":
        indices = [{"weight": (torch.rand(72) < 0.5).nonzero().view(-1)} for _ in range(2)]
        selections = [fk.Selection({"weight": shape}, given) for given in indices]
    else:
        ranges = [{"weight": fk.Rows((0, 2), (3, 6))}, {"weight": fk.Rows((1, 4), (7, 9))}]
        selections = [fk.Selection({"weight": shape}, {}, ranges=given) for given in ranges]
    weight, full, late = (nn.Parameter(torch.full(shape, 0.5).to(dtype)) for _ in range(3))
    grads = [torch.randn(shape).to(dtype) for _ in range(8)]

    def run(optimizer, parameter, some_grads):
        for grad in some_grads:
            parameter.grad = grad.clone()
            optimizer.step()

    optimizer = kind.make([("weight", weight)], selections[0])
    run(optimizer, weight, grads[:5])
    old, new = (set(selection.indices("weight").tolist()) for selection in selections)
    counts = optimizer.reselect(selections[1])
    assert counts == (len(old & new), len(old - new), len(new - old))
    before = weight.detach().clone()
    run(optimizer, weight, grads[5:])
    run(kind.make([("weight", full)], everything(nn.ParameterDict({"weight": full}))), full, grads)
    run(kind.make([("weight", late)], everything(nn.ParameterDict({"weight": late}))), late, grads[5:])

    was, now = (selection.mask("weight") for selection in selections)
    torch.testing.assert_close(weight[was & now], full[was & now])
    torch.testing.assert_close(weight[~was & now], late[~was & now])
    assert torch.equal(weight[~now], before[~now])
    state = optimizer.state[weight]
    assert torch.equal(state["start"], torch.where(was[now], 0.0, 5.0))
    loaded = kind.make([("weight", weight)], selections[1])
    loaded.load_state_dict(optimizer.state_dict())
    run(loaded, weight, grads[:1])
    assert loaded.state[weight]["step"] == 9


@every_optimizer
@every_form
def test_parameters_without_gradient_wait(kind, select):
    """They neither move nor count, and state begins with the first gradient."""
    model = tiny()
    optimizer = kind.make(model, select(model, 0.5))
    first, start = model[0].weight, model[0].weight.detach().clone()
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        first.grad = None
        optimizer.step()
    assert torch.equal(first, start)
    assert first not in optimizer.state
    train(model, optimizer, [3])
    assert optimizer.state[first]["step"] == 1
    assert optimizer.state[model[4].bias]["step"] == 4


@every_optimizer
@every_form
def test_state_put_in_by_hand_counts(kind, select):
    """``optimizer.state`` is the state, not a copy of it: people move it between devices entry by entry."""
    model, twin = tiny(), tiny()
    selection = select(model)
    optimizer, other = kind.make(model, selection), kind.make(twin, selection)
    for step in range(6):
        train(model, optimizer, [step])
        train(twin, other, [step])
        for held in other.state.values():
            for key, value in held.items():
                held[key] = value.clone()
    assert torch.equal(weights(model), weights(twin))


@every_optimizer
@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autograd_notices_a_step(kind, select, dtype):
    """A graph that a step has overtaken is refused, not back-propagated with other weights."""
    model = tiny(dtype)
    selection = select(model)
    versions = {name: p._version for name, p in model.named_parameters()}
    train(model, kind.make(model, selection), [0])
    for name, p in model.named_parameters():
        assert (p._version > versions[name]) == (selection.counts[name] > 0)


@every_optimizer
@every_form
def test_closure_and_hooks(kind, select):
    model = tiny()
    optimizer = kind.make(model, select(model))
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("loaded"))

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    start = weights(model)
    assert torch.equal(optimizer.step(closure), loss_of(tiny(), 0))
    assert not torch.equal(weights(model), start)
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["before", "after", "loaded"]


@every_optimizer
def test_tied_and_strided_parameters(kind):
    """A tied parameter moves once, under the name in the pool; one in another memory order moves at the same places."""

    class Tied(nn.Module):
        def __init__(self, strided: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            weight = torch.randn(7, 5)
            self.table = nn.Embedding(7, 5)
            self.table.weight = nn.Parameter(weight.mT.contiguous().mT if strided else weight)
            self.head = nn.Linear(5, 7, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids):
            return self.head(self.table(ids))

    results = []
    for name, strided in (("head.weight", False), ("table.weight", False), ("table.weight", True)):
        model = Tied(strided)
        selection = fk.Selection({name: (7, 5)}, {name: torch.tensor([0, 8, 30])})
        optimizer = kind.make(model, selection)
        start = model.table.weight.detach().clone()
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.tensor([1, 2, 6])).square().sum().backward()
            optimizer.step()
        mask = selection.mask(name)
        assert torch.equal(model.table.weight[~mask], start[~mask])
        results.append(model.table.weight.detach())
    assert torch.equal(results[0], results[1])
    torch.testing.assert_close(results[0], results[2])


@every_optimizer
def test_hooks_go_with_the_optimizer(kind):
    model = tiny()
    optimizer = kind.make(model, some(model), release_grads=True, max_grad_norm=1.0)
    loss_of(model, 0).backward()
    assert model[0].weight.grad is None
    del optimizer
    gc.collect()
    loss_of(model, 0).backward()
    assert model[0].weight.grad is not None


@every_optimizer
@every_form
def test_backends_agree(kind, select, backend):
    """The kernel trains a model to the weights that the reference gives."""
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    model, expected = tiny().to(device), tiny().to(device)
    selection = select(model)
    with fk.use_backend(backend):
        optimizer = kind.make(model, selection, max_grad_norm=0.1)
        train(model, optimizer, range(3))
        optimizer.reselect(select(model, seed=1))
        train(model, optimizer, range(3, 5))
    with fk.use_backend("torch"):
        optimizer = kind.make(expected, selection, max_grad_norm=0.1)
        train(expected, optimizer, range(3))
        optimizer.reselect(select(expected, seed=1))
        train(expected, optimizer, range(3, 5))
    torch.testing.assert_close(weights(model), weights(expected))
