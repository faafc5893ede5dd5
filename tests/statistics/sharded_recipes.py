"""What each process of ``test_sharded_recipes.py`` runs: recipes other than the default one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import fishkern as fk
from fishkern.statistics import sharded_sketch, shards
from fishkern.statistics.streams import uniform
from tests.statistics import sharded_program as program
from tests.statistics.sharded_program import CASES, case, data, dealt, like_whole, llama, mesh, sharded
from tests.support.oracle import next_token, squares_one_by_one, worst_error


@case("groups")
def groups(replicas: int = 1) -> dict[str, Any]:
    """Sums over groups, of a tied model, against sums of the squares of the loop over all examples."""
    squares = squares_one_by_one(llama(tie=True), [data()], next_token)
    model, errors = sharded(llama(tie=True), replicas=replicas), {}
    of_all = {
        "row": lambda one: one.flatten(1).sum(1) if one.ndim > 1 else one,
        "column": lambda one: one.sum(0) if one.ndim > 1 else one,
        "tensor": lambda one: one.sum(),
    }
    for by, of in of_all.items():
        statistics = fk.estimate(model, dealt(data()), fk.GroupFisher(by))
        truth = {name: of(one) for name, one in squares.items()}
        errors[by], _ = worst_error({name: statistics[name] for name in truth}, truth)
    layers = fk.estimate(model, dealt(data()), fk.GroupFisher("layer"))
    inside = sum(one.sum() for name, one in squares.items() if name.startswith("model.layers.1."))
    errors["layer"] = abs(layers["model.layers.1"].item() / inside.item() - 1)
    return errors


CASES["groups, replicated"] = lambda: groups(2)


@case("groups, no reduction")
def _() -> dict[str, Any]:
    with patch.object(shards.Ranks, "sum_", lambda ranks, tensor, group=None: None):
        return groups()


@case("groups, looped")
def _() -> dict[str, Any]:
    """A weight that is used past its module's call: its gradients are gathered, one example after the other."""
    tokens = torch.randint(7, (2 * program.world + 1, 3), generator=torch.Generator().manual_seed(1))
    labels = torch.arange(len(tokens)) % 7
    own = [(tokens[program.rank :: program.world], labels[program.rank :: program.world])]
    options = {"likelihood": fk.Classification()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        statistics = fk.estimate(sharded(program.Reusing().eval()), iter(own), fk.GroupFisher("row"), **options)
        alone = fk.estimate(program.Reusing().eval(), [(tokens, labels)], fk.GroupFisher("row"), **options)
    error, _ = worst_error(dict(statistics), {name: alone[name].double() for name in alone})
    return {"error": error, "paths": sorted({covered.path for covered in statistics.coverage.values()})}


def sketched(
    model: nn.Module, whole: nn.Module, batches: list[Any], loss: Callable[..., Tensor], **options: Any
) -> float:
    """Compare a sketch with its formula: the batches that the ranks take at one time are one batch."""
    recipe = fk.SketchedFisher(draws=3, seed=4)
    statistics = fk.estimate(model, iter(batches), recipe, **options)
    every: list[Any] = [None] * program.world
    dist.all_gather_object(every, batches)
    parameters = dict(whole.named_parameters())
    squares, before = {name: torch.zeros_like(one) for name, one in parameters.items()}, [0] * program.world
    for number in range(max(map(len, every))):
        losses, places = [], []
        for rank, own in enumerate(every):
            rows = loss(whole, own[number]) if number < len(own) else torch.zeros(0).double()
            losses.append(rows)
            places += [rank + program.world * (before[rank] + n) for n in range(len(rows))]
            before[rank] += len(rows)
        for draw in range(3):
            numbers = uniform(4, draw, range(max(places) + 1), 1)[places, 0]
            signed = (torch.cat(losses) * (numbers - 0.5).sign()).sum()
            grads = torch.autograd.grad(signed, list(parameters.values()), retain_graph=True, allow_unused=True)
            for name, grad in zip(parameters, grads, strict=True):
                squares[name] += 0 if grad is None else grad.square() / 3
    error, _ = worst_error(
        {name: statistics.full(name) for name in squares},
        {name: one.detach() / sum(before) for name, one in squares.items()},
    )
    return error


def token_means(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return torch.stack(
        [
            next_token(model, {key: value[n : n + 1] for key, value in batch.items()})
            for n in range(len(batch["labels"]))
        ]
    )


@case("sketch")
def sketch(replicas: int = 1) -> float:
    return sketched(sharded(llama(tie=True), replicas=replicas), llama(tie=True), dealt(data()), token_means)


@case("sketch, mean")
def _() -> float:
    """FSDP2's mean of gradients taken for their sum."""
    real = sharded_sketch.ShardedSketch._add_gradients

    def wrong(one: sharded_sketch.ShardedSketch) -> None:
        with patch.object(one._sharding.ranks, "count", 1):
            real(one)

    with patch.object(sharded_sketch.ShardedSketch, "_add_gradients", wrong):
        return sketch()


@case("sketch, ignored parameters")
def _() -> float:
    model = llama()
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh())
    fully_shard(model, mesh=mesh(), ignored_params={model.model.norm.weight, model.lm_head.weight})
    return sketched(model, llama(), dealt(data()), token_means)


@case("sketch, ignored in 16 bits")
def _() -> dict[str, float]:
    """A whole parameter's gradients in 16 bits, which autograd has given the ranks: added up in float64, in 16 bits."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).bfloat16().eval()
    fully_shard(model, mesh=mesh(), ignored_params={model[2].weight})
    inputs = torch.randn(4, 8, generator=torch.Generator().manual_seed(program.rank)).bfloat16()
    taken, real = [], sharded_sketch.take_grad

    def recording(parameter: nn.Parameter) -> Tensor | None:
        grad = real(parameter)
        if parameter is model[2].weight:
            taken.append(grad.clone())
        return grad

    with patch.object(sharded_sketch, "take_grad", recording):
        options = {"likelihood": fk.Classification()}
        statistics = fk.estimate(model, iter([(inputs, torch.arange(4))]), fk.SketchedFisher(draws=3), **options)
    every: list[Any] = [None] * program.world
    dist.all_gather_object(every, taken)
    wide = sum(sum(one.double() for one in draw).square() for draw in zip(*every, strict=True))
    narrow = sum(sum(draw).double().square() for draw in zip(*every, strict=True))
    found = statistics["2.weight"].double() * statistics.count
    return {name: float((found - one).abs().max() / one.max()) for name, one in (("wide", wide), ("16", narrow))}


@case("sketch, checkpointed reentrantly")
def _() -> float:
    model = sharded(llama(tie=True)).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    return sketched(model, llama(tie=True), dealt(data()), token_means)


@case("sketch, one rank without data")
def _() -> float:
    return sketched(sharded(llama()), llama(), dealt(data()) if program.rank == 0 else [], token_means)


@case("sketch, training")
def _() -> bool:
    """Whether a model in mixed precision trains as if it had not been sketched."""

    def trained(*, estimates: bool) -> dict[str, Tensor]:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
        model, batches = sharded(llama(dtype=torch.float32), mp_policy=policy).train(), dealt(data(), 3)
        if estimates:
            fk.estimate(model, iter(batches), fk.SketchedFisher(draws=2))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(2):
            optimizer.zero_grad()
            model(**batches[0]).loss.backward()
            optimizer.step()
        return {name: one.full_tensor() for name, one in model.named_parameters()}

    after, expected = trained(estimates=True), trained(estimates=False)
    return all(torch.equal(after[name], expected[name]) for name in expected)


CASES["sketch, replicated"] = lambda: sketch(2)


class Branching(nn.Module):
    """Its second layer runs on every batch, and only some batches depend on it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh()
        more = self.second(hidden)
        return self.head(hidden + more if x[0, 0] > 0 else hidden)


@case("sketch, unreached")
def _() -> float:
    """The batch of the first rank does not reach a layer, whose gradient the second one has alone."""
    x = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(program.rank))
    x[:, 0] = 1.0 if program.rank else -1.0
    batches = [(x, torch.tensor([0, 2]))]

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    model = sharded(Branching().eval())
    return sketched(model, Branching().eval(), batches, loss, likelihood=fk.Classification())


@case("all labels")
def _() -> dict[str, Any]:
    """The expectation over labels; the ranks' batches have unequal numbers of positions, and so of labels."""
    batches = [{key: value[:, : 3 + program.rank] for key, value in one.items()} for one in dealt(data())]
    recipe = fk.DiagonalFisher("type-2")
    return like_whole(sharded(llama()), llama(), batches, recipe)


def all_of(own: Any) -> list[Any]:
    every: list[Any] = [None] * program.world
    dist.all_gather_object(every, own)
    return every


@case("batches")
def batch_gradients(replicas: int = 1) -> dict[str, Any]:
    """Squares of the gradient of the mean loss of what all ranks run at one time; in the end one rank has no batch."""
    own, whole = dealt(data()), llama(tie=True)
    statistics = fk.estimate(sharded(llama(tie=True), replicas=replicas), iter(own), fk.DiagonalFisher(unit="batch"))
    every, parameters = all_of(own), dict(whole.named_parameters())
    squares, steps = {name: torch.zeros_like(one) for name, one in parameters.items()}, max(map(len, every))
    for number in range(steps):
        losses = torch.cat([token_means(whole, part[number]) for part in every if number < len(part)])
        grads = torch.autograd.grad(losses.mean(), list(parameters.values()))
        for name, grad in zip(parameters, grads, strict=True):
            squares[name] += grad.square().detach() / steps
    error, _ = worst_error({name: statistics.full(name) for name in squares}, squares)
    paths = sorted({covered.path for covered in statistics.coverage.values()})
    return {"error": error, "count": statistics.count, "steps": steps, "paths": paths}


@case("batches, mean of means")
def _() -> dict[str, Any]:
    """The ranks' own means averaged, as FSDP2 does it: wrong where they have unequal numbers of examples."""
    wrong = lambda one, batch, *, own: float(own) / program.world  # noqa: E731
    with patch.object(sharded_sketch.ShardedSketch, "_weight", wrong):
        return batch_gradients()


CASES["batches, replicated"] = lambda: batch_gradients(2)


def padded(own: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Take the last position of each rank's first example for padding."""
    masks = [torch.ones_like(one["input_ids"]) for one in own]
    masks[0][0, -1] = 0
    labels = [one["labels"].masked_fill(mask == 0, -100) for one, mask in zip(own, masks, strict=True)]
    return [one | {"attention_mask": m, "labels": y} for one, m, y in zip(own, masks, labels, strict=True)]


def parts_of(energies: fk.Energies) -> dict[str, Tensor]:
    parts = ("input", "output", "joint", "importance")
    values = {f"{name} {part}": getattr(one, part) for name, one in energies.items() for part in parts}
    return {name: torch.as_tensor(value).double() for name, value in values.items()}


@case("energies")
def energies(**options: Any) -> dict[str, Any]:
    """Of a sharded model, against each example's gradient, and of whole copies of the model on all ranks."""
    own, whole = padded(dealt(data())), llama()
    recipe = fk.DirectionEnergy(importance="kronecker")
    found = fk.estimate(sharded(llama(), **options), iter(own), recipe)
    copies = fk.estimate(whole, iter(own), recipe)
    alike, _ = worst_error(parts_of(found), parts_of(copies))
    names = ["model.layers.0.self_attn.k_proj.weight", "model.layers.1.mlp.down_proj.weight", "lm_head.weight"]
    weights = [whole.get_parameter(name) for name in names]
    bases = [torch.linalg.svd(one.detach(), full_matrices=False) for one in weights]
    joint, count = [torch.zeros(len(S)).double() for _, S, _ in bases], 0
    for batch in (batch for part in all_of(own) for batch in part):
        for n in range(len(batch["labels"])):
            one = {key: value[n : n + 1] for key, value in batch.items()}
            grads = torch.autograd.grad(whole(**one).loss, weights)
            count += 1
            for total, grad, (U, _, Vh) in zip(joint, grads, bases, strict=True):
                total += (U.mT @ grad @ Vh.mT).diagonal().square()
    truth = {name: one / count for name, one in zip(names, joint, strict=True)}
    error, _ = worst_error({name: found[name].joint for name in names}, truth)
    return {"error": error, "alike": alike, "count": found.count, "examples": count, "weights": len(found)}


@case("energies, no reduction")
def _() -> dict[str, Any]:
    with patch.object(shards.Ranks, "sum_", lambda ranks, tensor, group=None: None):
        return energies()


@case("energies, power basis, in parts")
def _() -> dict[str, Any]:
    """Two layers, one after the other, of a tied model with LoRA beside what accelerates leaves whole."""
    own, recipe = dealt(data()), fk.DirectionEnergy(basis="power", importance="exact", layers_per_pass=1)
    found, copies = (fk.estimate(model, own, recipe) for model in (sharded(program.adapted()), program.adapted()))
    error, _ = worst_error(parts_of(found), parts_of(copies))
    return {"error": error}


@case("energies, one rank's mask")
def _() -> str:
    """A mask of another shape on one rank alone, which is read before the model runs."""
    own = padded(dealt(data()))
    if program.rank == 1:
        own[0]["attention_mask"] = own[0]["attention_mask"][:, None, None].expand(-1, 1, 6, 6)
    try:
        fk.estimate(sharded(llama()), iter(own), fk.DirectionEnergy())
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@case("prepared")
def prepared(replicas: int = 1) -> dict[str, Any]:
    """The bits of a call without it, before and after a step of training and on other data, and in fewer runs."""
    own, model = dealt(data()), sharded(llama(tie=True), replicas=replicas)
    other = [{key: value.flip(1) for key, value in one.items()} for one in own]
    optimizer, runs = torch.optim.SGD(model.parameters(), lr=0.1), [0]
    model.model.layers[0].register_forward_pre_hook(lambda *_: runs.__setitem__(0, runs[0] + 1))
    ready = fk.prepare(model, own[0])
    found: dict[str, Any] = {"paths": sorted(set(ready.paths.values())), "preparing": runs[0]}

    def compared(batches: list[Any], **options: Any) -> tuple[bool, int, int]:
        each = []
        for more in (options, {}):
            runs[0] = 0
            each.append((fk.estimate(model, batches, **more), runs[0]))
        (first, fewer), (second, more) = each
        return all(torch.equal(first[name].to_local(), second[name].to_local()) for name in second), fewer, more

    found["seen"] = compared(own, prepared=ready)
    model(**own[0]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    found["trained"] = compared(own, prepared=ready)
    with torch.no_grad():
        model(**own[0])  # which leaves the outermost unit whole
    found["other data"] = compared(other, prepared=ready)
    model.model.norm.weight.requires_grad_(False)
    try:
        fk.estimate(model, own, prepared=ready)
    except Exception as error:
        found["changed"] = f"{type(error).__name__}: {error}"
    return found


@case("prepared, others")
def _() -> dict[str, bool]:
    """Recipes of one gradient, of factors, and modules that run once more for each example."""
    found = {}

    def alike(model: nn.Module, batches: list[Any], recipe: fk.Estimator, **options: Any) -> bool:
        ready = fk.prepare(model, batches[0], recipe, **options)
        first = fk.estimate(model, batches, prepared=ready)
        return first == fk.estimate(model, batches, recipe, **options)

    recipes = (fk.SketchedFisher(draws=2), fk.DiagonalFisher(unit="batch"), fk.GroupFisher("row"), fk.DirectionEnergy())
    for recipe in recipes:
        found[type(recipe).__name__ + getattr(recipe, "unit", "")] = alike(sharded(llama()), dealt(data()), recipe)
    x = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(program.rank))

    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), program.Bent(), nn.Linear(5, 3)).double().eval()

    batches = [(x[:2], torch.tensor([0, 1])), (x[2:], torch.tensor([2, 1]))]
    found["generic"] = alike(sharded(net(), own=("2",)), batches, fk.DiagonalFisher(), likelihood=fk.Classification())
    return found


class Own(fk.DiagonalFisher):
    """A recipe of the user's own."""


@case("refusals")
def _() -> list[str]:
    model, batches, messages = sharded(llama()), dealt(data()), []
    calls = [
        lambda: fk.estimate(model, batches, Own()),
        lambda: fk.verify(model, batches, estimator=fk.GroupFisher()),
        lambda: fk.OnlineFisher(model),
    ]
    for call in calls:
        try:
            call()
        except Exception as error:
            messages.append(f"{type(error).__name__}: {error}")
    return messages
