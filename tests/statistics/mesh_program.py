"""What each process of ``test_mesh_ranks.py`` runs: FSDP2 over one axis of a mesh, tensor parallel over the other."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

import fishkern as fk
from fishkern.statistics import sharded_states, sharded_team, sharding
from fishkern.statistics.sharded_factors import FactorExchange
from fishkern.statistics.sharded_pass import ShardedPass
from fishkern.statistics.sharded_team import ShardedTeamPass
from fishkern.statistics.shards import Ranks
from tests.statistics import tensor_program as program
from tests.statistics.tensor_program import (
    ATTENTION,
    CASES,
    Net,
    case,
    compared,
    data,
    in_batches,
    like_whole,
    llama,
    refusal,
    split,
    tokens,
)


def mesh(*sizes: int) -> Any:
    return init_device_mesh("cpu", sizes, mesh_dim_names=("replica", "data", "model")[-len(sizes) :])


def shard(model: nn.Module, over: Any, layers: Any, **options: Any) -> nn.Module:
    """Shard layers and what is around them over all axes of a mesh but the last."""
    data_axes = over["replica", "data"] if over.ndim == 3 else over["data"]
    for layer in layers:
        fully_shard(layer, mesh=data_axes, **options)
    return fully_shard(model, mesh=data_axes, **options)


def both(model: nn.Module, sizes: tuple[int, ...] = (2, 2), *, placement: Any = None, **options: Any) -> nn.Module:
    """Split a LLaMA over the last axis of a mesh, and shard it over the others."""
    over = mesh(*sizes)
    split(model, mesh=over["model"], **options)
    return shard(model, over, model.model.layers, shard_placement_fn=placement)


def dealt(one: Tensor, size: int = 2) -> Tensor:
    """Give the examples of the team that this process is in, which has so many of them."""
    return one[program.rank // size :: program.world // size].clone()


def own(batch: dict[str, Tensor], size: int = 2) -> list[dict[str, Tensor]]:
    """A team's batches; of two teams the first has three examples, in two of them, and the other has two, in one."""
    return in_batches({key: dealt(value, size) for key, value in batch.items()})


def of_teams(
    model: nn.Module, whole: nn.Module, batch: dict[str, Tensor] | None = None, size: int = 2, **options: Any
) -> Any:
    batch = data() if batch is None else batch
    return compared(model, whole, batch, iter(own(batch, size)), **options)


def last_axis(parameter: nn.Parameter) -> Shard:
    return Shard(parameter.ndim - 1)


CASES |= {
    "both": lambda: of_teams(both(llama()), llama()),
    "both, one team": lambda: of_teams(both(llama(), (1, 2)), llama()),
    "both, teams of one": lambda: of_teams(both(llama(), (2, 1)), llama(), size=1),
    "both, tied": lambda: of_teams(both(llama(tie=True)), llama(tie=True)),
    "both, columns": lambda: of_teams(both(llama(), placement=last_axis), llama()),
    "both, replicas": lambda: of_teams(both(llama(), (2, 1, 2)), llama()),
    "both, positions": lambda: like_whole(
        both(llama()), llama(), fk.DiagonalFisher(unit="position"), iter(own(data())), whole_batches=[data()]
    ),
    "both, mc": lambda: like_whole(
        both(llama()), llama(), fk.DiagonalFisher("mc", seed=3), iter(own(data(4))), whole_batches=[data(4)]
    ),
}


@case("both, sequence")
def _() -> dict[str, Any]:
    batch = data()
    batch["position_ids"] = torch.arange(6).expand(5, 6).contiguous()
    model = both(llama(attention="sdpa"), sequence=True)
    return of_teams(model, llama(attention="sdpa"), batch)


@case("both, LoRA")
def _() -> dict[str, Any]:
    """An adapter of the queries, which every process of a team has whole, as it has the heads that they go to."""
    from peft import LoraConfig, get_peft_model  # which takes longer to import than most cases to run

    def adapted(model: nn.Module) -> nn.Module:
        torch.manual_seed(6)
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        return get_peft_model(model, config).double().eval()

    over, model = mesh(2, 2), adapted(llama())
    inner = split(model.base_model.model, mesh=over["model"], gathered=(*ATTENTION, "self_attn.o_proj"))
    return of_teams(shard(model, over, inner.model.layers), adapted(llama()))


class Beside(Net):
    """One that adds what two weights give past the call of their module: one is split, the other is not."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.rows(ids) + self.columns(ids)
        x = x + self.down(self.up(self.norm(x)).tanh())
        return nn.functional.linear(self.last(x).mean(1), self.head.weight) + self.head(x.mean(1))


@case("both, looped")
def _() -> dict[str, Any]:
    """Every example of every team runs alone, on all processes; and so it does for ``verify``."""
    over = mesh(2, 2)
    plan = {name: style for name, style in program.NET.items() if name != "norm"}
    plan["up"] = program.ColwiseParallel()
    model = program.parallelize_module(Beside().eval(), over["model"], plan)
    shard(model, over, [model.up, model.down])
    ids, labels = (torch.cat(parts) for parts in zip(*tokens(), strict=True))
    batches = [(dealt(ids), dealt(labels))]
    options = {"likelihood": fk.Classification()}
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        found = like_whole(model, Beside().eval(), None, iter(batches), whole_batches=[(ids, labels)], **options)
        statistics = fk.estimate(model, batches, check=False, **options)
        verified = fk.verify(model, batches, **options)
    return found | {
        "noted": sum("slow exact path" in str(one.message) for one in noted),
        "unchecked": fk.verify(model, batches, statistics, **options).ok,
        "verified": verified.ok, "counted": verified.examples,
    }  # fmt: skip


_scattered = sharding.Part._scattered
PLANTED: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "no reduction over the data": (
        sharding.Part, "_scattered", lambda part, parts: parts[dist.get_rank(part.group)]
    ),
    "mean instead of sum": (
        sharding.Part, "_scattered", lambda part, parts: _scattered(part, parts) / part.count
    ),
    "counted once for each process": (
        ShardedTeamPass, "over", lambda one, batches, ranks, report: ShardedPass.over(one, batches, ranks, report)
    ),
}  # fmt: skip


def planted(name: str, sizes: tuple[int, int]) -> float:
    of, method, wrong = PLANTED[name]
    with patch.object(of, method, wrong):
        return of_teams(both(llama(), sizes), llama(), size=sizes[1], check=False)["error"]


CASES |= {name: lambda name=name: planted(name, (2, 2)) for name in PLANTED}
CASES |= {f"{name}, teams of one": lambda name=name: planted(name, (2, 1)) for name in PLANTED}
CASES |= {f"{name}, one team": lambda name=name: planted(name, (1, 2)) for name in PLANTED}


@case("both, files")
def _() -> dict[str, bool]:
    """Statistics of fixed values have the bytes of one process, and each process reads its part of them."""
    model, generator = both(llama(tie=True), (program.world // 2, 2)), torch.Generator().manual_seed(3)
    values = {name: torch.rand(one.shape, generator=generator) for name, one in llama(tie=True).named_parameters()}
    alone = program.folder / f"alone-{program.rank}"
    with patch.object(dist, "is_initialized", lambda: False):
        written = fk.Statistics(values, count=3).save(alone)
    parts = fk.Statistics.load(written, lazy=True).sharded_as(model)
    path = parts.save(program.folder / "both")
    named = dict(model.named_parameters())
    return {
        "bytes": path.read_bytes() == written.read_bytes(),
        "placed": all(parts[name].placements == named[name].placements for name in parts),
        "whole": all(torch.equal(parts.full(name), values[name]) for name in values),
        "selected": fk.select(parts, fk.GlobalTopK(density=0.3)).gathered()
        == fk.select(fk.Statistics(values, count=3), fk.GlobalTopK(density=0.3)),
    }


@case("both, refused")
def _() -> dict[str, str]:
    model, batches = both(llama()), own(data())
    strange = own(data()) if program.rank else in_batches(data(3))
    return {
        "groups": refusal(lambda: fk.estimate(model, batches, fk.GroupFisher())),
        "sketch": refusal(lambda: fk.estimate(model, batches, fk.SketchedFisher())),
        "checkpoint": refusal(lambda: fk.estimate(model, batches, checkpoint=program.folder / "part")),
        "prepare": refusal(lambda: fk.prepare(model, batches[0])),
        "batches": refusal(lambda: fk.estimate(model, iter(strange))),
        "verified batches": refusal(lambda: fk.verify(model, strange)),
        "max_examples": refusal(lambda: fk.verify(model, batches, max_examples=3)),
    }


@case("both, one team fails")
def _() -> dict[str, str]:
    """What the processes of one team find to differ among them ends the pass on those of the other, too."""
    model, batches = both(llama()), own(data())
    demand_equal = Ranks.demand_equal

    def differ(ranks: Ranks, value: Any, what: str) -> None:
        demand_equal(ranks, value, what)
        if what == "what is held back" and program.rank < 2:
            raise RuntimeError("team 0 is at odds")

    def unlike(*args: Any) -> None:
        if program.rank < 2:
            raise RuntimeError("team 0 has other gradients")

    report = {}
    for name, patched in {
        "held back": patch.object(Ranks, "demand_equal", differ),
        "other gradients": patch.object(sharded_team, "demand_alike", unlike),
    }.items():
        with patched:
            report[name] = refusal(lambda: fk.estimate(model, batches))
    return report


@case("both, by factors")
def by_factors(sizes: tuple[int, ...] = (2, 2)) -> dict[str, Any]:
    """Send factors wherever there are any, between the processes with the same part."""
    add_, sent = FactorExchange.add_, set()

    def noted(one: FactorExchange, *args: Any) -> None:
        sent.update(one.parts)
        add_(one, *args)

    with (
        patch.object(sharded_states, "cheaper", lambda parts, *_: [True] * len(parts)),
        patch.object(FactorExchange, "add_", noted),
    ):
        return of_teams(both(llama(), sizes), llama()) | {"sent": len(sent)}


CASES["both, replicas, by factors"] = lambda: by_factors((2, 1, 2))
