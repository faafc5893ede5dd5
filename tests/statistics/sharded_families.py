"""What each process of ``test_sharded_families.py`` runs: models of many families, accelerate, and unusual models."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

import fishkern as fk
from tests.statistics import sharded_program as program
from tests.statistics.sharded_program import CASES, case, data, dealt, like_whole, llama, mesh, sharded
from tests.support import zoo
from tests.support.oracle import next_token, squares_one_by_one, worst_error


def in_units(model: nn.Module) -> nn.Module:
    """Shard each module of the outermost lists, which are the layers of a transformer, and the rest."""
    lists = [path for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    for path in lists:
        if not any(path.startswith(f"{other}.") for other in lists):
            for layer in model.get_submodule(path):
                fully_shard(layer, mesh=mesh())
    return fully_shard(model, mesh=mesh())


def family(make: Callable[[], zoo.Specimen], *, reentrant: bool | None = None) -> Callable[[], dict[str, Any]]:
    """Compare a model with the loop over all examples of the whole one."""

    def specimen() -> zoo.Specimen:
        torch.manual_seed(0)
        made = make()
        made.model.double().eval()
        return made

    def run() -> dict[str, Any]:
        one, whole = specimen(), specimen()
        batch = {
            key: value.double() if value.is_floating_point() else value
            for key, value in one.batch(2 * program.world + 1, 7).items()
        }
        model = in_units(one.model)
        if reentrant is not None:
            model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
        with warnings.catch_warnings(record=True) as noted:
            warnings.simplefilter("always")
            statistics = fk.estimate(model, dealt(batch))
        truth = squares_one_by_one(whole.model, [batch], whole.loss)
        error, where = worst_error({name: statistics.full(name) for name in statistics}, truth)
        looped = [name for name, covered in statistics.coverage.items() if covered.path == "loop"]
        notes = [str(one.message) for one in noted if "slow exact path" in str(one.message)]
        return {"error": error, "where": where, "looped": looped, "notes": notes, "count": statistics.count}

    return run


def adapted(use_dora: bool) -> zoo.Specimen:
    base = zoo.llama()
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], use_dora=use_dora)
    model = get_peft_model(base.model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return zoo.Specimen(model, base.batch, base.loss)


CASES |= {f"family {kind}": family(getattr(zoo, kind)) for kind in (
    "llama", "qwen3", "gemma3", "gpt2", "opt", "bert", "modernbert", "deberta", "t5", "vit", "swin", "mixtral",
)}  # fmt: skip
CASES |= {f"family {kind}": family(lambda kind=kind: zoo.experts(kind)) for kind in ("Qwen3Moe", "GptOss")}
CASES |= {
    "family lora": family(lambda: adapted(False)),
    "family dora": family(lambda: adapted(True)),
    "family t5, checkpointed reentrantly": family(zoo.t5, reentrant=True),
    "family mixtral, checkpointed": family(zoo.mixtral, reentrant=False),
}


@case("accelerate")
def accelerated(tie: bool = False, **options: Any) -> dict[str, Any]:
    """Estimate with a model, an optimizer and a loader that accelerate has prepared, and train afterwards."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    rank, world = program.rank, program.world
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ |= {key: str(value) for key, value in own.items()}  # which accelerate looks for
    AcceleratorState._reset_state(reset_partial_state=True)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        **options,
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    # accelerate shards on GPUs alone; everything else of it works on a CPU too
    PartialState._shared_state["distributed_type"] = accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    batch = data()
    rows = [{key: value[n] for key, value in batch.items()} for n in range(len(batch["labels"]))]
    loader = accelerator.prepare(DataLoader(rows, 2))

    def prepared() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = llama(tie=tie)
        model.config.use_cache = False  # which checkpointed layers would fill twice
        return accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))

    def trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        for part in list(loader)[:2]:
            optimizer.zero_grad()
            accelerator.backward(model(**part).loss)
            optimizer.step()
        return {name: one.full_tensor().detach() for name, one in model.named_parameters()}

    model, optimizer = prepared()
    statistics = fk.estimate(model, loader)
    truth = squares_one_by_one(llama(tie=tie), [batch], next_token)
    error, _ = worst_error({name: statistics.full(name) for name in statistics}, truth)
    after, expected = trained(model, optimizer), trained(*prepared())
    return {
        "error": error, "count": statistics.count, "examples": len(rows),
        "trained alike": all(torch.equal(after[name], expected[name]) for name in expected),
    }  # fmt: skip


CASES |= {
    "accelerate, tied": lambda: accelerated(tie=True),
    "accelerate, checkpointed": lambda: accelerated(activation_checkpointing=True),
    "accelerate, kept": lambda: accelerated(reshard_after_forward=False),
    "accelerate, from one rank": lambda: accelerated(cpu_ram_efficient_loading=True),
}


class Queries(nn.Module):
    """A table of queries, which all examples share, is the input of a module as it is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.queries = nn.Parameter(torch.randn(3, 4))
        self.mix, self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.mix(self.queries.expand(len(x), 3, 4)).tanh()
        return self.head((mixed + self.first(x)[:, None]).tanh().mean(1))


class Twice(nn.Module):
    """A unit that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.inner(x).tanh()).tanh())


def classes() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(program.rank)
    x = torch.randn(2, 2, 4, dtype=torch.float64, generator=generator)
    return [(rows, torch.randint(3, (2,), generator=generator)) for rows in x]


@case("parameter as input")
def _() -> dict[str, Any]:
    options = {"likelihood": fk.Classification(), "parameters": ["mix*", "first*", "head*"]}
    return like_whole(sharded(Queries().eval()), Queries().eval(), classes(), **options)


@case("unit that runs twice")
def _() -> dict[str, Any]:
    model = sharded(Twice().eval(), own=("inner",))
    return like_whole(model, Twice().eval(), classes(), likelihood=fk.Classification())


@case("one rank without data")
def _() -> dict[str, Any]:
    own = {key: value[0 :: program.world] for key, value in data().items()}
    batches = iter(dealt(data()) if program.rank == 0 else [])
    return program.compared(sharded(llama()), llama(), own, batches)


@case("ignored parameters")
def _() -> dict[str, Any]:
    model = llama()
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh())
    fully_shard(model, mesh=mesh(), ignored_params={model.model.norm.weight, model.lm_head.weight})
    return like_whole(model, llama(), dealt(data()))


@case("without the rest")
def _() -> dict[str, Any]:
    """The layers are sharded, and the model around them is not."""
    model = llama()
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh())
    return like_whole(model, llama(), dealt(data()))


@case("entries of other names and orders")
def _() -> dict[str, Any]:
    batches = dealt(data())
    if program.rank == 1:
        batches = [
            {"labels": one["labels"], "attention_mask": torch.ones_like(one["labels"]), "input_ids": one["input_ids"]}
            for one in batches
        ]
    return program.compared(sharded(llama()), llama(), batches=batches)


@case("compiled layers")
def _() -> dict[str, Any]:
    model = llama(dtype=torch.float32)
    for layer in model.model.layers:
        layer.compile(backend="eager")
    return like_whole(sharded(model), llama(dtype=torch.float32), dealt(data()))


@case("gradients in progress")
def _() -> dict[str, Any]:
    """The model holds the gradients of one batch when the estimate begins, and the next one is added afterwards."""
    model, batch = sharded(llama()), dealt(data())[0]
    model(**batch).loss.backward()
    before = {name: one.grad.full_tensor().clone() for name, one in model.named_parameters()}
    error = program.compared(model, llama())["error"]
    model(**batch).loss.backward()
    twice = {name: one.grad.full_tensor() for name, one in model.named_parameters()}
    return {"error": error, "twice": all(torch.equal(twice[name], 2 * before[name]) for name in before)}


@case("token losses")
def _() -> dict[str, Any]:
    def losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
        return nn.functional.cross_entropy(logits.mT, batch["labels"][:, 1:], reduction="none")

    return like_whole(sharded(llama()), llama(), dealt(data()), likelihood=fk.TokenLosses(losses))
