"""What each process of ``test_sharded_ranks.py`` runs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from transformers import LlamaConfig, LlamaForCausalLM

import fishkern as fk
from fishkern.layers import Linear
from fishkern.statistics import independence, sharded_states, sharding
from fishkern.statistics.base import losses_of
from tests.support import pairs, zoo
from tests.support.oracle import next_token, squares_one_by_one, worst_error

CASES: dict[str, Callable[[], Any]] = {}
rank, world, folder = 0, 1, Path()


def case(name: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    def listed(run: Callable[[], Any]) -> Callable[[], Any]:
        CASES[name] = run
        return run

    return listed


def llama(tie: bool = False, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16, tie_word_embeddings=tie, attn_implementation="eager",
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def adapted() -> nn.Module:
    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return get_peft_model(llama(), config).double().eval()


@cache
def mesh(replicas: int = 1) -> DeviceMesh:
    """All ranks; made once, since each mesh has threads of its own."""
    sizes, names = ((world,), ("ranks",)) if replicas == 1 else ((replicas, world // replicas), ("replicas", "ranks"))
    return init_device_mesh("cpu", sizes, mesh_dim_names=names)


def sharded(model: nn.Module, *, replicas: int = 1, own: tuple[str, ...] = (), **options: Any) -> nn.Module:
    """Shard each layer, modules to be units of their own, and the rest."""
    options["mesh"] = mesh(replicas)
    for path, module in list(model.named_modules()):
        if path.endswith((*(f"layers.{n}" for n in range(2)), *own)):
            fully_shard(module, **options)
    return fully_shard(model, **options)


def data() -> dict[str, Tensor]:
    """Examples that do not divide by the number of ranks."""
    ids = torch.randint(1, 31, (2 * world + 1, 6), generator=torch.Generator().manual_seed(5))
    return {"input_ids": ids, "labels": ids.clone()}


def dealt(batch: dict[str, Tensor], size: int = 2) -> list[dict[str, Tensor]]:
    own = {key: value[rank::world].clone() for key, value in batch.items()}
    starts = range(0, len(own["labels"]), size)
    return [{key: value[start : start + size] for key, value in own.items()} for start in starts]


def compared(
    model: nn.Module, whole: nn.Module, batch: dict[str, Tensor] | None = None, batches: Any = None, **options: Any
) -> dict[str, Any]:
    """Compare an estimate with the loop over all examples in one process."""
    batch = data() if batch is None else batch
    statistics = fk.estimate(model, dealt(batch) if batches is None else batches, **options)
    truth = squares_one_by_one(whole, [batch], next_token)
    error, _ = worst_error({name: statistics.full(name) for name in statistics}, truth)
    parameters = dict(model.named_parameters())
    placed = all(statistics[name].placements == parameters[name].placements for name in statistics)
    paths = {covered.path for covered in statistics.coverage.values()} - {"left out"}
    return {
        "error": error, "count": statistics.count, "examples": len(batch["labels"]), "paths": sorted(paths),
        "placed": placed,
    }  # fmt: skip


def like_whole(
    model: nn.Module, whole: nn.Module, batches: list[Any], recipe: fk.Estimator | None = None, **options: Any
) -> dict[str, Any]:
    """Compare with an estimate of the whole model, of which every rank holds a copy, on the same batches."""
    statistics = fk.estimate(model, iter(batches), recipe, **options)
    expected = fk.estimate(whole, iter(batches), recipe, **options)
    truth = {name: one.double() for name, one in expected.items()}
    error, _ = worst_error({name: statistics.full(name) for name in truth}, truth)
    paths = sorted({covered.path for covered in statistics.coverage.values()} - {"left out"})
    return {"error": error, "paths": paths, "count": statistics.count, "examples": expected.count}


def in_blocks(run: Callable[[], Any]) -> Any:
    with patch.object(sharding, "_BLOCK", 2**10):
        return run()


def last_axis(parameter: nn.Parameter) -> Shard:
    return Shard(parameter.ndim - 1)


CASES |= {
    "whole": lambda: compared(sharded(llama()), llama()),
    "tied, in blocks": lambda: in_blocks(lambda: compared(sharded(llama(tie=True)), llama(tie=True))),
    "columns, in blocks": lambda: in_blocks(lambda: compared(sharded(llama(), shard_placement_fn=last_axis), llama())),
    "kept": lambda: compared(sharded(llama(), reshard_after_forward=False), llama()),
    "offloaded": lambda: compared(sharded(llama(), offload_policy=CPUOffloadPolicy(pin_memory=False)), llama()),
    "units of their own": lambda: compared(sharded(llama(), own=("lm_head", "model.norm")), llama()),
    "replicated": lambda: compared(sharded(llama(tie=True), replicas=2), llama(tie=True)),
    "replicated columns": lambda: compared(sharded(llama(), replicas=2, shard_placement_fn=last_axis), llama()),
    "lora": lambda: compared(sharded(adapted()), adapted()),
}


@case("lora, all")
def _() -> dict[str, Any]:
    whole = adapted()
    whole.requires_grad_(True)
    return compared(sharded(adapted()), whole, parameters="all")


@case("checkpointed")
def checkpointed(*, reentrant: bool = False) -> dict[str, Any]:
    model = sharded(llama()).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return compared(model, llama())


CASES["checkpointed reentrantly"] = lambda: checkpointed(reentrant=True)


@case("checkpointed by torch")
def _() -> dict[str, Any]:
    model = llama()
    model.model.layers = nn.ModuleList(checkpoint_wrapper(layer) for layer in model.model.layers)
    statistics = fk.estimate(sharded(model), dealt(data()))
    truth = squares_one_by_one(llama(), [data()], next_token)
    error, _ = worst_error({name: statistics.full(name) for name in statistics}, truth)
    paths = sorted({covered.path for covered in statistics.coverage.values()})
    return {"error": error, "paths": paths, "count": statistics.count, "examples": len(data()["labels"])}


CASES |= {
    "positions": lambda: like_whole(sharded(llama()), llama(), dealt(data()), fk.DiagonalFisher(unit="position")),
    "mc": lambda: like_whole(sharded(llama()), llama(), dealt(data()), fk.DiagonalFisher("mc", mc_samples=2)),
}


@case("packed")
def _() -> dict[str, Any]:
    """Each rank has a row of three documents, of lengths of its own, and then one of two."""

    def packed(*lengths: int) -> dict[str, Tensor]:
        places = torch.cat([torch.arange(length) for length in lengths])[None]
        ids = torch.randint(1, 31, places.shape, generator=torch.Generator().manual_seed(rank))
        return {"input_ids": ids, "labels": ids.clone(), "position_ids": places}

    return like_whole(sharded(llama(tie=True)), llama(tie=True), [packed(4, 3 + rank, 2), packed(3, 5)])


@case("pairs")
def _() -> dict[str, Any]:
    """Each example has two rows, the chosen ones before the rejected ones; the ranks have unequal numbers."""
    own = pairs.pairs()[rank::world]
    batches = [pairs.collated(own[:2]), *(pairs.collated([one]) for one in own[2:])]

    def net() -> nn.Module:
        torch.manual_seed(0)
        return zoo.llama().model.double().eval()

    return like_whole(sharded(net()), net(), batches, likelihood=fk.Preference())


@case("large logits")
def _() -> dict[str, Any]:
    """A head in chunks would need its weights outside of the model's forward pass."""
    return like_whole(sharded(llama()), llama(), dealt(data()), likelihood=fk.CausalLM(logits_bytes=64))


@case("judged alike")
def _() -> dict[str, Any]:
    """The losses of the first examples differ on the second rank, as if its device rounded otherwise."""
    calls = [0]

    def rounded(answer: Any) -> Tensor:
        calls[0] += 1
        return losses_of(answer) * (1 + rank * calls[0])

    with patch.object(independence, "losses_of", rounded):
        return compared(sharded(llama()), llama())


@case("experts")
def _() -> dict[str, Any]:
    """Experts that the tokens of one rank may not reach."""

    def net() -> nn.Module:
        torch.manual_seed(2)
        return zoo.mixtral().model.double().eval()

    batch = zoo.text_batch(2 * world, 5)
    return like_whole(sharded(net()), net(), dealt(batch))


class Gated(nn.Module):
    """A second linear whose output counts only where the input says so: the first examples do not show its rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh()
        return self.head(hidden + self.second(hidden) * (x[:, :1] > 0))


@case("gated")
def _() -> dict[str, Any]:
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    x[:, 0] = torch.tensor([-1.0, 1.0 if rank == 1 else -1.0, -1.0])  # the second batch of the second rank alone
    batches = [(x[n : n + 1], torch.tensor([n])) for n in range(3)]
    return like_whole(sharded(Gated().eval()), Gated().eval(), batches, likelihood=fk.Classification())


class Bent(nn.Module):
    """A module of a kind that no rule knows: its parameter acts on every feature in its own way."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.bend = nn.Parameter(torch.randn(5, 5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ni,ij,nj->nj", x, self.bend.sin(), x)


@case("generic")
def _() -> dict[str, Any]:
    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), Bent(), nn.Linear(5, 3)).double().eval()

    x = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    batches = [(x, torch.tensor([rank % 3, 1]))]
    return like_whole(sharded(net(), own=("2",)), net(), batches, likelihood=fk.Classification())


class Reusing(nn.Module):
    """A table whose weight is also used past its module's call, which only autograd sees."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.middle = nn.Embedding(7, 5), nn.Linear(5, 5)
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.middle(self.table(tokens).mean(1)).tanh() @ self.table.weight.mT


@case("looped")
def _(replicas: int = 1) -> dict[str, Any]:
    tokens = torch.randint(7, (2 * world + 1, 3), generator=torch.Generator().manual_seed(1))
    y = torch.arange(len(tokens)) % 7
    options = {"likelihood": fk.Classification()}
    model = sharded(Reusing().eval(), replicas=replicas)
    own = [(tokens[rank::world], y[rank::world])]
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        statistics = fk.estimate(model, iter(own), **options)
        alone = fk.estimate(Reusing().eval(), [(tokens, y)], **options)
    full = {name: statistics.full(name) for name in alone}
    error, _ = worst_error(full, {name: alone[name].double() for name in alone})
    verified = fk.verify(model, own, statistics, **options)
    wrong = fk.Statistics(
        {name: 1.1 * one for name, one in full.items()}, count=statistics.count, provenance=alone.provenance
    )
    return {
        "error": error, "paths": sorted({covered.path for covered in statistics.coverage.values()}),
        "noted": sum("slow exact path" in str(one.message) for one in noted),
        "verified": verified.ok, "examples": verified.examples, "wrong": fk.verify(model, own, wrong, **options).ok,
    }  # fmt: skip


CASES["looped, replicated"] = lambda: CASES["looped"](2)


@case("unequal")
def _() -> dict[str, Any]:
    """One rank has three batches, the others one example each."""
    batch = data()
    first = {key: value[: world + 2] for key, value in batch.items()}
    parts = [{key: value[n : n + 2] for key, value in first.items()} for n in range(0, world + 2, 2)]
    own = {key: value[world + 1 + rank :][:1] for key, value in batch.items()}
    used = {key: value[: 2 * world + 1] for key, value in batch.items()}
    return compared(sharded(llama()), llama(), used, iter(parts if rank == 0 else [own]))


@case("failures")
def _() -> dict[str, Any]:
    model, batches = sharded(llama()), dealt(data(), 1)

    def message(run: Callable[[], Any]) -> str:
        try:
            run()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

    def broken() -> Any:
        yield batches[0]
        if rank == 1:
            raise OSError("the disk is gone")
        yield from batches[1:]

    def changed(key: str, value: int) -> list[dict[str, Tensor]]:
        second = {name: tensor.clone() for name, tensor in batches[1].items()}
        if rank == 1:
            second[key][:] = value
        return [batches[0], second]

    def own_things() -> list[dict[str, Any]]:
        return [{**batches[0], "things": [lambda: None]}] if rank == 1 else []

    def inside() -> None:
        calls = [0]

        def fail(module: nn.Module, args: Any) -> None:
            if not torch.is_grad_enabled():
                return
            calls[0] += 1
            if rank == 1 and calls[0] == last:
                raise MemoryError("no room")

        handle = model.model.layers[0].mlp.register_forward_pre_hook(fail)
        try:
            last = 10**6
            fk.estimate(model, batches[:2])
            last, calls[0] = calls[0], 0
            fk.estimate(model, batches[:2])
        finally:
            handle.remove()

    def in_backward() -> None:
        calls = [0]

        def fails(layer: Linear, call: Any, output_grads: Any, names: Any) -> Any:
            calls[0] += 1
            if rank == 1 and calls[0] == last:
                raise MemoryError("no room for a product")
            return per_example_grads(layer, call, output_grads, names)

        last, per_example_grads = 10**6, Linear.per_example_grads
        with patch.object(Linear, "per_example_grads", fails):
            fk.estimate(model, batches[:2])
            last, calls[0] = calls[0] - 5, 0
            fk.estimate(model, batches[:2])

    def sums() -> None:
        def fails(states: sharded_states.ShardedStates, *args: Any, **options: Any) -> None:
            if rank == 1:
                raise MemoryError("no room for the sums")
            made(states, *args, **options)

        made = sharded_states.ShardedStates.__init__
        with patch.object(sharded_states.ShardedStates, "__init__", fails):
            fk.estimate(model, batches[:2])

    messages = {
        "sums": message(sums),
        "rule": message(in_backward),
        "loader": message(lambda: fk.estimate(model, broken())),
        "forward": message(lambda: fk.estimate(model, changed("input_ids", 99))),
        "inside": message(inside),
        "loss": message(lambda: fk.estimate(model, changed("labels", -100), likelihood=nan_without_labels)),
        "pickle": message(lambda: fk.estimate(model, own_things(), likelihood=of_text)),
        "empty": message(lambda: fk.estimate(model, [])),
        "another recipe": message(lambda: fk.estimate(model, batches, fk.DiagonalKronecker())),
        "error afterwards": compared(model, llama())["error"],
    }
    model.set_requires_gradient_sync(False)
    return messages | {"accumulating": message(lambda: fk.estimate(model, batches))}


def of_text(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    return fk.CausalLM().predictive(model, {key: batch[key] for key in ("input_ids", "labels")}).losses()


def nan_without_labels(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    losses = fk.CausalLM().predictive(model, batch).losses()
    return torch.where((batch["labels"] == -100).all(1), torch.nan, losses)


@case("mixed")
def mixed(**options: Any) -> dict[str, Any]:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    batches = dealt(data(), 3)

    def trained(*, estimates: bool) -> tuple[fk.Statistics | None, bool, dict[str, Tensor]]:
        model = sharded(llama(dtype=torch.float32), mp_policy=policy, **options).train()
        model.lm_head.weight.grad = marked = torch.ones_like(model.lm_head.weight)
        model.model.norm.weight.requires_grad_(False)
        statistics = fk.estimate(model, batches) if estimates else None
        as_found = model.training and model.lm_head.weight.grad is marked
        as_found &= [name for name, one in model.named_parameters() if not one.requires_grad] == ["model.norm.weight"]
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(2):
            optimizer.zero_grad()
            model(**batches[0]).loss.backward()
            optimizer.step()
        return statistics, as_found, {name: one.full_tensor().detach() for name, one in model.named_parameters()}

    statistics, as_found, after = trained(estimates=True)
    _, _, expected = trained(estimates=False)
    alone = llama(dtype=torch.bfloat16)
    alone.model.norm.weight.requires_grad_(False)
    parts: list[Any] = [None] * world
    dist.all_gather_object(parts, batches)
    whole = fk.estimate(alone, [batch for part in parts for batch in part])
    error, _ = worst_error(
        {name: statistics.full(name) for name in whole}, {name: whole[name].double() for name in whole}
    )
    alike = all(torch.equal(after[name], expected[name]) for name in expected)
    return {"error": error, "trained alike": alike, "as found": as_found}


CASES["mixed, replicated"] = lambda: mixed(replicas=2)


@case("files")
def _() -> dict[str, bool]:
    statistics = fk.estimate(sharded(llama()), dealt(data()), check=False)
    path = statistics.save(folder / "sharded")
    whole = {name: statistics.full(name) for name in statistics}
    facts = {name: getattr(statistics, name) for name in ("count", "provenance", "coverage", "precision")}
    alone = fk.Statistics(whole, **facts)
    other = alone.save(folder / f"alone-{rank}")
    loaded = fk.Statistics.load(path)
    return {
        "bytes": path.read_bytes() == other.read_bytes(),
        "loaded": loaded == alone,
        "equal": statistics == loaded,
        "full": all(torch.equal(loaded[name], whole[name]) for name in whole),
    }


def _planted(name: str, wrong: Callable[..., Any], *, check: bool = False, **options: Any) -> dict[str, Any]:
    squares_alone = patch.object(sharded_states, "cheaper", lambda parts, *_: [False] * len(parts))
    with squares_alone, patch.object(sharding.Part, name, wrong), warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        found = compared(sharded(llama(), **options), llama(), check=check)
    return found | {"noted": any("disagrees with its captured gradient" in str(one.message) for one in noted)}


_scattered, _sum_over_replicas_ = sharding.Part._scattered, sharding.Part.sum_over_replicas_
CASES |= {
    "no reduction": lambda: _planted("_scattered", _own_alone, check=True),
    "no reduction, unchecked": lambda: _planted("_scattered", _own_alone),
    "mean, unchecked": lambda: _planted("_scattered", lambda part, parts: _scattered(part, parts) / part.count),
    "replicated twice, unchecked": lambda: _planted("sum_over_replicas_", _twice, replicas=2),
}


def _own_alone(part: sharding.Part, parts: Tensor) -> Tensor:
    return parts[dist.get_rank(part.group)]


def _twice(part: sharding.Part, state: Tensor, ranks: Any) -> None:
    _sum_over_replicas_(part, state, ranks)
    _sum_over_replicas_(part, state, ranks)
