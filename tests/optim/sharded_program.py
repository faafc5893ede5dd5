"""What each process of ``test_sharded.py`` runs."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.nn import functional as F

import fishkern as fk
from fishkern import hosts
from fishkern.files.tensors import StoredTensor
from fishkern.optim import clipping
from fishkern.selection import bound_to_start, load_start, local, save_start

CASES: dict[str, Callable[[], Any]] = {}
rank, world, folder = 0, 1, Path()

ADAMW = dict(lr=3e-2, betas=(0.8, 0.95), weight_decay=0.1)
SGD = dict(lr=0.1, momentum=0.9, dampening=0.2, weight_decay=0.1)
NESTEROV = dict(lr=0.1, momentum=0.9, nesterov=True)
NORM = 0.02  # below every norm of this training, so that each step is clipped
STEPS = 20


def case(name: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    def listed(run: Callable[[], Any]) -> Callable[[], Any]:
        CASES[name] = run
        return run

    return listed


def net(dtype: torch.dtype = torch.float64, seed: int = 3) -> nn.Module:
    """Its rows divide by no number of ranks, and the last layer has one of them alone: the other shards are empty."""
    torch.manual_seed(seed)
    layers = nn.Linear(12, 11), nn.Tanh(), nn.Linear(11, 5, bias=False), nn.Tanh(), nn.Linear(5, 1)
    return nn.Sequential(*layers).to(dtype)


def even() -> nn.Module:
    """One whose columns divide by the number of ranks."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def sharded(model: nn.Module, *, replicas: int = 1, **options: Any) -> nn.Module:
    sizes, names = ((world,), ("ranks",)) if replicas == 1 else ((replicas, world // replicas), ("replicas", "ranks"))
    options["mesh"] = init_device_mesh("cpu", sizes, mesh_dim_names=names)
    for layer in model[:-1]:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, **options)
    return fully_shard(model, **options)


def listed_entries(model: nn.Module) -> fk.Selection:
    """Some entries, of a bias all; in the first layer of the first rows alone, which rank 0 holds."""
    generator = torch.Generator().manual_seed(0)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    indices = {n: torch.rand(s.numel(), generator=generator) < 0.4 for n, s in shapes.items() if n != "0.bias"}
    indices["0.weight"][30:] = False
    return fk.Selection(shapes, {n: mask.nonzero().view(-1) for n, mask in indices.items()}, whole=["0.bias"])


def ranges(model: nn.Module) -> fk.Selection:
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    some = {"0.weight": fk.Rows((1, 2), (3, 8)), "0.bias": fk.Rows((0, 7)), "2.weight": fk.Columns((1, 3), (6, 8))}
    return fk.Selection(shapes, {}, whole=["4.weight"] if "4.weight" in shapes else [], ranges=some)


def own_rows() -> slice:
    """The examples of this rank."""
    return slice(rank, None, world)


def loss_of(model: nn.Module, step: int, *, own: bool) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    y = torch.randn(12, 1, generator=generator, dtype=torch.float64)
    like = next(model.parameters())
    x, y = (part[own_rows()].to(like.dtype) if own else part.to(like.dtype) for part in (x, y))
    return F.mse_loss(model(x), y.expand(-1, model[-1].out_features))


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: (one.full_tensor() if hasattr(one, "full_tensor") else one).detach().clone()
        for name, one in model.named_parameters()
    }


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, *, own: bool = True) -> bool:
    """Train, and tell whether entries that are not selected have stayed what they were, after each step."""
    before, still = weights(model), True
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step, own=own).backward()
        optimizer.step()
        for name, after in weights(model).items():
            if isinstance(optimizer, fk.MaskedOptimizer) and name in optimizer.selection:
                outside = ~optimizer.selection.mask(name)
                still &= torch.equal(after[outside], before[name][outside])
    return still


def oracle(model: nn.Module, masks: dict[str, Tensor], steps: range, kind: type, norm: float, **options: Any) -> float:
    """Train in one process by the formulas of AdamW and SGD, on the entries under masks; the last norm."""
    lr, decay, kept = options["lr"], options.get("weight_decay", 0.0), {}
    parameters = dict(model.named_parameters())
    for t in range(1, len(steps) + 1):
        model.zero_grad()
        loss_of(model, steps[t - 1], own=False).backward()
        grads = {name: parameters[name].grad * masks[name] for name in masks}
        total = sum(float(grad.square().sum()) for grad in grads.values()) ** 0.5
        for name, mask in masks.items():
            w, g = parameters[name].detach(), grads[name] * min(1.0, norm / (total + 1e-6))
            if kind is fk.MaskedAdamW:
                b1, b2 = options["betas"]
                m, v = kept.get(name, (0 * w, 0 * w))
                m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
                kept[name] = m, v
                move = lr * decay * w + lr * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + 1e-8)
            else:
                g = g + decay * w * mask
                last, damped = kept.get(name), 1 - options.get("dampening", 0.0)
                kept[name] = m = g if last is None else options["momentum"] * last + damped * g
                move = lr * (g + options["momentum"] * m if options.get("nesterov") else m)
            w -= move * mask
    return total


def error_of(model: nn.Module, expected: nn.Module) -> float:
    """The largest difference of a weight."""
    ours, theirs = weights(model), weights(expected)
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def compared(
    make: Callable[[], nn.Module] = net,
    select: Callable[[nn.Module], fk.Selection] = listed_entries,
    kind: type = fk.MaskedAdamW,
    options: dict[str, Any] = ADAMW,
    **sharding: Any,
) -> dict[str, Any]:
    model, alone = sharded(make(), **sharding), make()
    selection = select(alone)
    optimizer = kind(model, selection, max_grad_norm=NORM, **options)
    start = weights(alone)
    still = trained(model, optimizer, range(STEPS))
    norm = oracle(alone, _masks(selection), range(STEPS), kind, NORM, **options)
    moved = max(float((one - start[name]).abs().max()) for name, one in weights(alone).items())
    held = sum(one["exp_avg"].numel() for one in optimizer.state.values() if "exp_avg" in one)
    return {
        "error": error_of(model, alone), "still": still, "moved": moved, "norm": [optimizer.grad_norm.item(), norm],
        "held": held, "selected": selection.count,
    }  # fmt: skip


def by_sgd(**sharding: Any) -> dict[str, Any]:
    """Train by SGD, whose steps follow the norm; those of AdamW hardly do."""
    return compared(kind=fk.MaskedSGD, options=SGD, **sharding)


CASES |= {
    "adamw, listed": compared,
    "adamw, ranges": lambda: compared(select=ranges),
    "sgd, listed": by_sgd,
    "nesterov, ranges": lambda: compared(select=ranges, kind=fk.MaskedSGD, options=NESTEROV),
    "replicated": lambda: compared(replicas=2),
    "replicated, ranges": lambda: compared(select=ranges, replicas=2),
    "columns": lambda: compared(even, shard_placement_fn=last_axis),
    "columns, ranges": lambda: compared(even, ranges, shard_placement_fn=last_axis),
    "replicated columns": lambda: compared(even, replicas=2, shard_placement_fn=last_axis),
    "kept": lambda: compared(reshard_after_forward=False),
}


def last_axis(parameter: nn.Parameter) -> Shard:
    return Shard(parameter.ndim - 1)


def first_row(model: nn.Module) -> fk.Selection:
    """Entries of rank 0 alone."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    return fk.Selection(shapes, {"0.weight": torch.tensor([1, 5, 13])})


@case("selected on ranks")
def _() -> dict[str, Any]:
    """A selection of which each rank has its own entries, against that of one process."""
    model, alone, again = sharded(net()), net(), sharded(net())
    scores = {name: parameter.detach().abs() for name, parameter in model.named_parameters()}
    rule = fk.GlobalTopK(density=0.3, always="0.bias")
    own = fk.select(scores, rule)
    selection = fk.select({name: parameter.detach().abs() for name, parameter in alone.named_parameters()}, rule)
    by_own = fk.MaskedAdamW(model, own, max_grad_norm=NORM, **ADAMW)
    by_whole = fk.MaskedAdamW(again, selection, max_grad_norm=NORM, **ADAMW)
    for one, optimizer in ((model, by_own), (again, by_whole)):
        for step in range(STEPS):
            optimizer.zero_grad()
            loss_of(one, step, own=True).backward()
            optimizer.step()
    oracle(alone, _masks(selection), range(STEPS), fk.MaskedAdamW, NORM, **ADAMW)
    state = by_own.state_dict()
    alike = _alike(state, by_whole.state_dict())
    by_own.load_state_dict(by_whole.state_dict())
    ours, theirs = fk.delta(model, own).save(folder / f"own-{rank}"), fk.delta(again, selection)
    return {
        "sharded": own.is_sharded, "error": error_of(model, alone), "alike": alike,
        "loaded": _alike(by_own.state_dict(), state),
        "bytes": ours.read_bytes() == theirs.save(folder / f"whole-{rank}").read_bytes(),
        "changed": list(by_own.reselect(own)) == [own.count, 0, 0],
        "bound": bound_to_start(own, model).count == own.count,
        "another model": _message(lambda: fk.MaskedAdamW(net(), own, **ADAMW)),
    }  # fmt: skip


CASES["one rank alone"] = lambda: compared(select=first_row)


@case("resumed")
def _() -> dict[str, bool]:
    """Going on from a state, by torch's way for one process and by that for several, against not stopping."""
    model = sharded(net(torch.float32))
    selection = listed_entries(net())
    optimizer = fk.MaskedAdamW(model, selection, max_grad_norm=NORM, **ADAMW)
    trained(model, optimizer, range(10))
    saved, state = copy.deepcopy(optimizer.state_dict()), weights(model)
    by_name = copy.deepcopy(get_state_dict(model, optimizer))
    trained(model, optimizer, range(10, 15))
    again = sharded(net(torch.float32))
    with torch.no_grad():
        for name, one in again.named_parameters():
            share = hosts.share_of(name, one)
            one.to_local().copy_(state[name][share.place])
    loading = fk.MaskedAdamW(again, selection, max_grad_norm=NORM, lr=7.0)
    loading.load_state_dict(saved)
    trained(again, loading, range(10, 15))
    other = sharded(net(torch.float32))
    loading = fk.MaskedAdamW(other, selection, max_grad_norm=NORM, lr=7.0)
    set_state_dict(other, loading, model_state_dict=by_name[0], optim_state_dict=by_name[1])
    trained(other, loading, range(10, 15))
    return {"own form": _equal(model, again), "torch's form": _equal(model, other)}


def _equal(model: nn.Module, other: nn.Module) -> bool:
    ours, theirs = weights(model), weights(other)
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def _from_checkpoint(model: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> None:
    state, held = get_state_dict(model, optimizer)
    dcp.load({"model": state, "optimizer": held}, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=state, optim_state_dict=held)


def _handed_on(steps: range, *, first: bool = False) -> dict[str, Any]:
    """Train some steps from the checkpoint that other processes have left, as often as there is one."""
    model = sharded(net()) if world > 1 else net()
    selection = listed_entries(net())
    optimizer = fk.MaskedAdamW(model, selection, max_grad_norm=NORM, **ADAMW)
    path = folder.parent / "checkpoint"
    if not first:
        _from_checkpoint(model, optimizer, path / f"{steps.start}")
    still = trained(model, optimizer, steps)
    state, held = get_state_dict(model, optimizer)
    dcp.save({"model": state, "optimizer": held}, checkpoint_id=path / f"{steps.stop}")
    alone = net()
    oracle(alone, _masks(selection), range(steps.stop), fk.MaskedAdamW, NORM, **ADAMW)
    lengths = {name: len(one["exp_avg"]) for name, one in held["state"].items() if "exp_avg" in one}
    counts = {name: count for name, count in selection.counts.items() if count}
    return {"error": error_of(model, alone), "still": still, "whole": lengths == counts}


def _masks(selection: fk.Selection) -> dict[str, Tensor]:
    return {name: selection.mask(name) for name in selection.names}


CASES |= {
    "steps 0 to 8": lambda: _handed_on(range(8), first=True),
    "steps 8 to 14": lambda: _handed_on(range(8, 14)),
    "steps 14 to 20": lambda: _handed_on(range(14, 20)),
}


@case("state")
def _() -> dict[str, Any]:
    """The state is that of one process, also after other entries have come in and others have gone."""
    model, alone = sharded(net()), net()
    first, second = listed_entries(alone), listed_entries(alone) - ranges(alone) | first_row(alone)
    only_first = fk.Selection(first.shapes, {"0.weight": torch.tensor([1])})
    ours, theirs = (fk.MaskedAdamW(one, first, max_grad_norm=NORM, **ADAMW) for one in (model, alone))
    alike, changes = [], []
    for selection in (first, second, first, only_first):
        for optimizer in (ours, theirs):
            changes.append(optimizer.reselect(selection, freeze=True))
        alike.append(_alike(ours.state_dict(), theirs.state_dict()))  # before a step, too
        trained(model, ours, range(4))
        trained(alone, theirs, range(4), own=False)
        alike.append(_alike(ours.state_dict(), theirs.state_dict()))
    saved = ours.state_dict()
    again = fk.MaskedAdamW(sharded(net()), only_first, **ADAMW)
    again.load_state_dict(saved)
    return {
        "alike": alike, "changes": changes[::2] == changes[1::2], "error": error_of(model, alone),
        "again": _alike(again.state_dict(), saved), "frozen": ours.frozen == theirs.frozen != (),
        "without gradient": all(one.grad is None for n, one in model.named_parameters() if n in ours.frozen),
    }  # fmt: skip


def _alike(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Whether two states are the same to rounding; the age of an entry counts, not from where it is counted."""
    if ours["param_groups"] != theirs["param_groups"] or ours["state"].keys() != theirs["state"].keys():
        return False
    for number, one in ours["state"].items():
        other = theirs["state"][number]
        ages = [state["step"] - state.get("start", torch.zeros_like(state["exp_avg"])) for state in (one, other)]
        keys = one.keys() - {"step", "start"}
        if keys != other.keys() - {"step", "start"} or not torch.equal(*ages):
            return False
        if not all(torch.allclose(one[key].double(), other[key].double(), rtol=1e-9, atol=1e-15) for key in keys):
            return False
    return True


@case("groups")
def _() -> dict[str, Any]:
    """Two groups with rates of their own, a schedule, and a parameter outside of the pool that trains whole."""
    model, alone = sharded(net()), net()
    selection = listed_entries(alone).restrict(lambda name: not name.startswith("4"))

    def train(one: nn.Module, *, own: bool) -> None:
        named = list(one.named_parameters())
        parts = [{"params": named[:2]}, {"params": named[2:], "lr": 0.05, "weight_decay": 0.0}]
        optimizer = fk.MaskedAdamW(parts, selection, outside="train", max_grad_norm=NORM, **ADAMW)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        for step in range(6):
            trained(one, optimizer, range(step, step + 1), own=own)
            schedule.step()

    train(model, own=True)
    train(alone, own=False)
    return {"error": error_of(model, alone)}


def _like_torch(**options: Any) -> bool:
    """With everything selected the steps are those of torch's optimizer on the same shards, to the bit."""

    def train(make: Callable[[nn.Module], torch.optim.Optimizer]) -> nn.Module:
        model = sharded(net(torch.float32), **options)
        trained(model, make(model), range(5))
        return model

    shapes = {name: parameter.shape for name, parameter in net().named_parameters()}
    everything = fk.Selection(shapes, {}, whole=list(shapes))
    masked = train(lambda model: fk.MaskedAdamW(model, everything, **ADAMW))
    dense = train(lambda model: torch.optim.AdamW(model.parameters(), foreach=False, fused=False, **ADAMW))
    return _equal(masked, dense)


CASES |= {
    "mixed precision": lambda: _like_torch(mp_policy=MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32)),
    "offloaded": lambda: _like_torch(offload_policy=CPUOffloadPolicy(pin_memory=False)),
}


@case("16 bits")
def _() -> dict[str, Any]:
    """Shards of 16-bit weights, with masters in float32."""
    model, selection = sharded(net(torch.bfloat16)), listed_entries(net())
    optimizer = fk.MaskedAdamW(model, selection, **ADAMW)
    still = trained(model, optimizer, range(6))
    saved, before = optimizer.state_dict(), weights(model)
    loading = fk.MaskedAdamW(model, selection, **ADAMW)
    loading.load_state_dict(saved)
    masters = all(one["master"].dtype == torch.float32 for one in saved["state"].values())
    trained(model, loading, range(6, 7))
    moved = any(not torch.equal(one, before[name]) for name, one in weights(model).items())
    return {"still": still, "masters": masters and len(saved["state"]) == 5, "moved": moved}


@case("delta")
def _() -> dict[str, Any]:
    model, alone, selection = sharded(net()), net(), listed_entries(net())
    optimizer = fk.MaskedAdamW(model, selection, **ADAMW)
    trained(model, optimizer, range(3))
    loss_of(model, 0, own=True)  # a forward pass alone leaves the parameters of the outermost unit whole
    delta = fk.delta(model, selection)
    alone.load_state_dict(weights(model))
    ours, theirs = delta.save(folder / f"ours-{rank}"), fk.delta(alone, selection).save(folder / f"theirs-{rank}")
    base = sharded(net())
    before = fk.apply_delta(base, fk.Delta.load(ours))
    applied = _equal(base, alone)
    fk.apply_delta(base, before)
    return {
        "bytes": ours.read_bytes() == theirs.read_bytes(),
        "applied": applied,
        "undone": _equal(base, net()),
        "another base": _message(lambda: fk.apply_delta(sharded(net(seed=4)), delta)),
        "streamed": _streamed(selection),
    }


def _streamed(selection: fk.Selection) -> bool:
    """Whether two samplers, one sharded and one whole, have the trainer's weights after each step."""
    model, samplers, readers = sharded(net()), (sharded(net()), net()), (fk.DeltaReader(), fk.DeltaReader())
    scores = {name: parameter.detach().abs() for name, parameter in model.named_parameters()}
    own = fk.select(scores, fk.PerTensorTopK(density=0.3))  # each rank has its own entries
    stream, equal = fk.Delta.stream(model), True
    for number, trained_now in enumerate((selection, selection, own, own)):
        optimizer = fk.MaskedAdamW(model, trained_now, **ADAMW)
        loss_of(model, number, own=True).backward()
        optimizer.step()
        optimizer.zero_grad()
        update = stream.update(optimizer.selection)
        equal &= (update.entries is None) == (number in (1, 3))
        for reader, sampler in zip(readers, samplers, strict=True):
            reader.apply(update, sampler)
            equal &= _equal(sampler, model)
    return equal


def _message(run: Callable[[], Any]) -> str:
    try:
        run()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@case("start")
def _() -> dict[str, Any]:
    model, selection = sharded(net()), listed_entries(net())
    bound = bound_to_start(selection, model)
    optimizer = fk.MaskedAdamW(model, bound, **ADAMW)
    trained(model, optimizer, range(2))
    again = fk.MaskedAdamW(model, bound, **ADAMW)  # of a model in which this very selection was trained
    trained(model, again, range(1))
    other, stranger = sharded(net(seed=4)), sharded(net(seed=4))
    stepping, unfit = fk.MaskedAdamW(other, bound, **ADAMW), fk.MaskedAdamW(stranger, bound, **ADAMW)
    path = save_start(sharded(net()), bound, folder / "start")
    read, spans = [], StoredTensor.spans

    def counted(tensor: StoredTensor, which: Iterable[tuple[int, int]], **options: Any) -> Iterator[Tensor]:
        which = list(which)
        read.extend(stop - start for start, stop in which)
        return spans(tensor, which, **options)

    with patch.object(StoredTensor, "spans", counted):
        load_start(other, path)
    alone = save_start(net(), bound, folder / f"start-{rank}")
    return {
        "as in one process": bound.provenance == bound_to_start(selection, net()).provenance,
        "another start": _message(lambda: trained(stranger, unfit, range(1))),
        "loaded": _equal(other, net()) and trained(other, stepping, range(1)),
        "bytes": path.read_bytes() == alone.read_bytes(),
        "read": sum(read), "own": sum(one.to_local().numel() for one in other.parameters()),
    }  # fmt: skip


@case("data parallel")
def _() -> dict[str, str]:
    """Ranks with whole models, whose gradients are averaged, and selections of their own."""
    model = net()
    selection = listed_entries(model)
    another = fk.Selection(selection.shapes, {"0.weight": torch.tensor([1, 5, 13]) + rank})
    wrapped = nn.parallel.DistributedDataParallel(model)

    def stepped(optimizer: fk.MaskedAdamW) -> str:
        wrapped(torch.ones(2, 12, dtype=torch.float64)).square().mean().backward()
        return _message(optimizer.step)

    optimizer = fk.MaskedAdamW(model, selection, **ADAMW)
    alike = stepped(optimizer)
    optimizer.reselect(another)
    return {
        "alike": alike,
        "reselected": stepped(optimizer),
        "other from the start": stepped(fk.MaskedAdamW(wrapped, another, **ADAMW)),
        "not wrapped": _message(fk.MaskedAdamW(net(), another, **ADAMW).step),
    }


@case("refusals")
def _() -> dict[str, str]:
    model, selection = sharded(net()), listed_entries(net())
    optimizer = fk.MaskedAdamW(model, selection, **ADAMW)
    trained(model, optimizer, range(1))
    saved = copy.deepcopy(optimizer.state_dict())
    if rank == 1:
        saved["state"][0]["exp_avg"] = saved["state"][0]["exp_avg"][1:]
    others = fk.MaskedAdamW(model, first_row(net()), **ADAMW)
    another = fk.Selection(selection.shapes, {"0.weight": torch.tensor([1, 5, 13]) + rank})  # as many on each rank
    scores = {name: parameter.detach().abs() for name, parameter in model.named_parameters()}
    own = fk.select(scores, fk.PerTensorTopK(density=0.3))
    least = fk.select(scores, fk.PerTensorTopK(density=0.3, order="smallest"))
    of_kinds = (own, own.gathered())[rank]
    base = fk.delta(model, first_row(net()))
    frozen_on_one = sharded(net())
    of_ours, of_frozen = (fk.MaskedAdamW(one, own, **ADAMW) for one in (model, frozen_on_one))
    if rank == 1:
        frozen_on_one[0].weight.requires_grad_(False)
    often = {"every": 2, "read_every": 1, "likelihood": lambda model, batch: model(batch[0])[:, 0]}
    source = [(torch.zeros(1, 12).double(), torch.zeros(1, 1).double())]
    differing = fk.Delta(another, {"0.weight": torch.zeros(3).double()}, base._digests)
    return {
        "another selection": [
            _message(lambda: fk.MaskedAdamW(model, another, **ADAMW)),
            _message(lambda: fk.MaskedAdamW(model, of_kinds, **ADAMW)),
            _message(lambda: fk.MaskedAdamW(model, least if rank == 0 else own, **ADAMW)),
            _message(lambda: optimizer.reselect(another)),
            _message(lambda: fk.delta(model, another)),
            _message(lambda: fk.delta(model, of_kinds)),
            _message(lambda: fk.apply_delta(model, differing, check=False)),
            _message(lambda: bound_to_start(another, model)),
            _message(lambda: save_start(model, another, folder / "another")),
        ],
        "frozen on one rank": _message(lambda: fk.MaskedAdamW(frozen_on_one, selection, **ADAMW)),
        "reselected on one rank": _message(lambda: of_frozen.reselect(own)),
        "freezer": _message(lambda: fk.fisher_adaptune(model, source, optimizer=of_ours, **often)),
        "released": _message(lambda: fk.MaskedAdamW(model, selection, release_grads=True)),
        "damaged on one rank": _message(lambda: optimizer.load_state_dict(saved)),
        "other entries": _message(lambda: others.load_state_dict(optimizer.state_dict())),
    }


@case("replaced parameters")
def _() -> dict[str, list[str]]:
    """What the first step says where FSDP2 trains other parameters than those of the optimizer."""

    def warnings_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
        with warnings.catch_warnings(record=True) as noted:
            warnings.simplefilter("always")
            for step in range(2):
                loss_of(model, step, own=True).backward()
                optimizer.step()
        return [str(one.message) for one in noted if one.category is UserWarning]

    early, evaluated, now = net(), sharded(net()), sharded(net())
    before = fk.MaskedAdamW(early, listed_entries(early), **ADAMW)
    with torch.no_grad():
        loss_of(evaluated, 0, own=True)  # which leaves the last layer whole
    gathered = fk.MaskedAdamW(evaluated.named_parameters(), listed_entries(net()), **ADAMW)
    return {
        "sharded later": warnings_of(before, sharded(early)),
        "gathered": warnings_of(gathered, evaluated),
        "sharded": warnings_of(fk.MaskedAdamW(now, listed_entries(net()), **ADAMW), now),
    }


def _of_own_part(grads: list[Tensor], shares: list[Any]) -> Tensor:
    return torch.nn.utils.get_total_norm(grads)


def _over_all(share: hosts.Share, tensor: Tensor, group: Any) -> list[Tensor]:
    """Exchange with replicas, too, as if they held other entries."""
    parts = [torch.empty_like(tensor) for _ in range(world)]
    dist.all_gather(parts, tensor)
    return parts


def _as_if_whole(numbers: Tensor, share: hosts.Share) -> Tensor:
    return numbers % share.local_shape.numel()


def _as_in_shard(entries: Any, share: hosts.Share) -> Tensor:
    return entries.indices()


def _planted(where: Any, name: str, wrong: Callable[..., Any], run: Callable[[], Any]) -> Any:
    with patch.object(where, name, wrong):
        return run()


CASES |= {
    "norm of the own part": lambda: _planted(clipping, "_norm_of_all", _of_own_part, by_sgd),
    "replicas counted": lambda: _planted(hosts.Share, "_exchanged", _over_all, lambda: by_sgd(replicas=2)),
    "global index in the shard": lambda: _planted(local, "_to_shard", _as_if_whole, compared),
    "local index in a file": lambda: _planted(local, "in_whole", _as_in_shard, lambda: _message(CASES["state"])),
}
