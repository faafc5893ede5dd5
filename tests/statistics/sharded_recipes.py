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


class Own(fk.DiagonalFisher):
    """A recipe of the user's own."""


@case("refusals")
def _() -> list[str]:
    model, batches, messages = sharded(llama()), dealt(data()), []
    calls = [
        lambda: fk.estimate(model, batches, Own()),
        lambda: fk.estimate(model, batches, fk.DiagonalFisher(unit="batch")),
        lambda: fk.verify(model, batches, estimator=fk.GroupFisher()),
        lambda: fk.OnlineFisher(model),
        lambda: fk.prepare(model, batches[0]),
    ]
    for call in calls:
        try:
            call()
        except Exception as error:
            messages.append(f"{type(error).__name__}: {error}")
    return messages
