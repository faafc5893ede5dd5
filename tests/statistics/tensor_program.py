"""What each process of ``test_tensor_parallel_ranks.py`` runs."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.distributed.expert_parallel import ExpertParallelLayer

import fishkern as fk
from fishkern.layers import tensor_parallel as layers
from fishkern.statistics.states import States
from fishkern.statistics.tensor_parallel import TensorParallelStates
from tests.support import pairs, zoo
from tests.support.oracle import next_token, squares_one_by_one, worst_error

CASES: dict[str, Callable[[], Any]] = {}
rank, world, folder = 0, 1, Path()
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def case(name: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    def listed(run: Callable[[], Any]) -> Callable[[], Any]:
        CASES[name] = run
        return run

    return listed


def llama(tie: bool = False, heads: int = 4, attention: str = "eager") -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=heads, max_position_embeddings=16, tie_word_embeddings=tie,
        attn_implementation=attention,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


def mesh_of(size: int) -> Any:
    if size == world:
        return init_device_mesh("cpu", (world,))
    return init_device_mesh("cpu", (world // size, size), mesh_dim_names=("data", "model"))["model"]


def split(model: nn.Module, *, mesh: Any = None, gathered: tuple[str, ...] = (), sequence: bool = False) -> nn.Module:
    """Split a LLaMA by torch's styles, its vocabulary as well."""
    plan: dict[str, Any] = {}
    rows = {"output_layouts": Shard(1)} if sequence else {}
    for n in range(len(model.model.layers)):
        layer = f"model.layers.{n}"
        for name in (*ATTENTION, "mlp.gate_proj", "mlp.up_proj"):
            inside = ".base_layer" if hasattr(model.get_submodule(f"{layer}.{name}"), "base_layer") else ""
            plan[f"{layer}.{name}{inside}"] = ColwiseParallel(output_layouts=Replicate() if name in gathered else None)
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            inputs = {"input_layouts": Replicate()} if name in gathered else {}
            plan[f"{layer}.{name}"] = RowwiseParallel(**inputs, **rows)
        if sequence:
            plan |= {f"{layer}.{name}": SequenceParallel() for name in ("input_layernorm", "post_attention_layernorm")}
            whole = {"input_layouts": (Shard(1),), "desired_input_layouts": (Replicate(),)}
            plan[f"{layer}.mlp"] = PrepareModuleInput(**whole)
            kwargs = {"input_kwarg_layouts": {"hidden_states": Shard(1)}}
            kwargs |= {"desired_input_kwarg_layouts": {"hidden_states": Replicate()}}
            plan[f"{layer}.self_attn"] = PrepareModuleInput(**kwargs)
    plan["model.embed_tokens"] = RowwiseParallel(input_layouts=Replicate(), **rows)
    if sequence:
        plan["model.norm"] = SequenceParallel()
    plan["lm_head"] = ColwiseParallel(output_layouts=Replicate(), **({"input_layouts": Shard(1)} if sequence else {}))
    tied = model.config.tie_word_embeddings
    parallelize_module(model, mesh_of(world) if mesh is None else mesh, plan)
    if tied:  # parallelize_module makes a new parameter for each of the two modules
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def data(count: int = 5, length: int = 6) -> dict[str, Tensor]:
    ids = torch.randint(1, 31, (count, length), generator=torch.Generator().manual_seed(5))
    labels = ids.clone()
    labels[1:2, :3] = -100
    return {"input_ids": ids, "labels": labels}


def in_batches(batch: dict[str, Tensor], size: int = 2) -> list[dict[str, Tensor]]:
    starts = range(0, len(batch["labels"]), size)
    return [{key: value[start : start + size] for key, value in batch.items()} for start in starts]


def compared(
    model: nn.Module, whole: nn.Module, batch: dict[str, Tensor] | None = None, batches: Any = None, **options: Any
) -> dict[str, Any]:
    """Compare an estimate with the loop over all examples in one process."""
    batch = data() if batch is None else batch
    statistics = fk.estimate(model, in_batches(batch) if batches is None else batches, **options)
    truth = squares_one_by_one(whole, [batch], next_token)
    error, worst = worst_error({name: statistics.full(name) for name in statistics}, truth)
    parameters = dict(model.named_parameters())
    paths = {covered.path for covered in statistics.coverage.values()} - {"left out"}
    return {
        "error": error, "worst": worst, "count": statistics.count, "examples": len(batch["labels"]),
        "paths": sorted(paths),
        "placed": all(
            getattr(statistics[name], "placements", None) == getattr(parameters[name], "placements", None)
            and getattr(statistics[name], "_local_tensor", statistics[name]).shape
            == getattr(parameters[name], "_local_tensor", parameters[name]).shape
            for name in statistics
        ),
    }  # fmt: skip


CASES |= {
    "whole": lambda: compared(split(llama()), llama()),
    "tied": lambda: compared(split(llama(tie=True)), llama(tie=True)),
}


@case("few heads")
def _() -> dict[str, Any]:
    """Fewer heads of keys than processes: the outputs of the projections are gathered, and all run the attention."""
    options = {"gathered": (*ATTENTION, "self_attn.o_proj")}
    return compared(split(llama(heads=1), **options), llama(heads=1))


@case("sequence")
def sequence() -> dict[str, Any]:
    """Norms run on the positions that each process has.

    LLaMA would number these from 0, and mask their number squared: so the batch says them, and sdpa needs no mask.
    """
    batch = data()
    batch["position_ids"] = torch.arange(6).expand(5, 6).contiguous()
    return compared(split(llama(attention="sdpa"), sequence=True), llama(attention="sdpa"), batch)


@case("few positions")
def _() -> dict[str, str]:
    """One for two processes, and three; also where the batch before had six."""
    model = split(llama(attention="sdpa"), sequence=True)

    def of(length: int) -> dict[str, Tensor]:
        batch = data(2, length)
        positions = torch.arange(length).expand(2, length).contiguous()
        return batch | {"labels": batch["input_ids"].clone(), "position_ids": positions}

    return {
        "one": refusal(lambda: fk.estimate(model, [of(1)])),
        "three": refusal(lambda: fk.estimate(model, [of(6), of(3)], check=False)),
        "verified": refusal(lambda: fk.verify(model, [of(3)])),
    }


def like_whole(
    model: nn.Module, whole: nn.Module, recipe: Any, batches: Any = None, whole_batches: Any = None, **options: Any
) -> dict[str, Any]:
    """Compare with an estimate of the whole model by one process."""
    batches = in_batches(data()) if batches is None else batches
    statistics = fk.estimate(model, batches, recipe, **options)
    with patch.object(dist, "is_initialized", lambda: False):
        expected = fk.estimate(whole, batches if whole_batches is None else whole_batches, recipe, **options)
    full = {name: statistics.full(name) for name in expected}
    error, worst = worst_error(full, {name: expected[name].double() for name in expected})
    paths = sorted({covered.path for covered in statistics.coverage.values()})
    return {"error": error, "worst": worst, "paths": paths, "count": statistics.count, "examples": expected.count}


CASES |= {
    "positions": lambda: like_whole(split(llama()), llama(), fk.DiagonalFisher(unit="position")),
    "mc": lambda: like_whole(split(llama()), llama(), fk.DiagonalFisher("mc", seed=3)),
    "type-2": lambda: like_whole(split(llama()), llama(), fk.DiagonalFisher("type-2"), in_batches(data(1, 3))),
}


@case("looped")
def _() -> dict[str, Any]:
    """A hook on a gradient sends its parameter to the loop."""
    model = split(llama())
    for name in ("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.o_proj", "model.embed_tokens"):
        model.get_submodule(name).weight.register_hook(lambda grad: grad)
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        found = compared(model, llama())
    return found | {"noted": sum("slow exact path" in str(one.message) for one in noted)}


@case("replicas")
def _() -> dict[str, Any]:
    """Two teams, each of which has examples of its own."""
    batch, team = data(), rank // (world // 2)
    own = [{key: value[team::2].clone() for key, value in batch.items()}]
    return compared(split(llama(tie=True), mesh=mesh_of(world // 2)), llama(tie=True), batch, iter(own))


@case("sampled")
def _() -> dict[str, Any]:
    """A sampler of two teams, which repeats an example to even them out."""
    sampler = DistributedSampler(Rows(), num_replicas=2, rank=rank // (world // 2), shuffle=False)
    loader = DataLoader(Rows(), batch_size=2, sampler=sampler)
    return compared(split(llama(), mesh=mesh_of(world // 2)), llama(), batches=loader)


def refusal(run: Callable[[], Any]) -> str:
    try:
        run()
    except (ValueError, RuntimeError) as error:  # an UnsupportedModuleError is a RuntimeError or a ValueError
        return str(error)
    return "nothing"


@case("examples of each process")
def _() -> dict[str, Any]:
    """What ranks with examples of their own would get, is refused; so is another number of batches."""
    batches = in_batches(data())
    model = split(llama())

    sampled = DataLoader(Rows(), batch_size=2, sampler=DistributedSampler(Rows(), shuffle=False))
    return {
        "other": refusal(lambda: fk.estimate(model, batches[rank : rank + 1])),
        "fewer": refusal(lambda: fk.estimate(model, batches[: 1 + rank])),
        "sampled": refusal(lambda: fk.estimate(model, sampled)),
        "alike": refusal(lambda: fk.estimate(model, DataLoader(Rows(), batch_size=2))),
    }


class Rows(Dataset):
    def __len__(self) -> int:
        return len(data()["labels"])

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        return {key: value[place] for key, value in data().items()}


@case("files")
def _() -> dict[str, bool]:
    statistics = fk.estimate(split(llama()), in_batches(data()), check=False)
    path = statistics.save(folder / "split")
    with patch.object(dist, "is_initialized", lambda: False):
        alone = fk.estimate(llama(), in_batches(data()), check=False)
    loaded = fk.Statistics.load(path)
    runs = [dict(one.provenance["runs"][0]) for one in (alone, loaded)]
    return {
        "alike": all(torch.allclose(loaded[name], alone[name], rtol=1e-5, atol=1e-12) for name in alone),
        "provenance": runs[0] == runs[1],
        "equal": statistics == loaded,
    }


def loaded(model: nn.Module, name: str, **options: Any) -> nn.Module:
    """Save a model, and load it as transformers splits it under torchrun."""
    path, options = folder / name, {"attn_implementation": "eager", **options}
    if rank == 0:
        model.save_pretrained(path)
    dist.barrier()
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    with patch.dict(os.environ, ranks):
        return type(model).from_pretrained(path, tp_plan="auto", dtype=torch.float64, **options).eval()


def qwen3() -> nn.Module:
    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, head_dim=4,
        num_key_value_heads=2, max_position_embeddings=16, attn_implementation="eager",
    )  # fmt: skip
    return Qwen3ForCausalLM(config).double().eval()


CASES |= {
    "plan of transformers": lambda: compared(loaded(llama(), "llama"), llama()),
    "plan of transformers, tied": lambda: compared(loaded(llama(tie=True), "tied"), llama(tie=True)),
}


@case("norms of own heads")
def _() -> dict[str, Any]:
    """Also after a pass, in which transformers has added the hooks that sum their gradients."""
    model = loaded(qwen3(), "qwen3")
    fk.estimate(model, in_batches(data(2)))
    return compared(model, qwen3())


class Net(nn.Module):
    """Every kind of module that torch's styles split, with biases, on tokens of which one is padding."""

    def __init__(self, linear: type[nn.Linear] = nn.Linear) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.rows, self.columns = nn.Embedding(9, 6, padding_idx=7), nn.Embedding(9, 6)
        self.norm, self.up, self.down = nn.LayerNorm(6), linear(6, 8), linear(8, 6)
        self.last, self.head = nn.LayerNorm(6), nn.Linear(6, 3)
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.rows(tokens) + self.columns(tokens)
        x = x + self.down(self.up(self.norm(x)).tanh())
        return self.head(self.last(x).mean(1))


NET = {
    "rows": RowwiseParallel(input_layouts=Replicate()), "columns": ColwiseParallel(output_layouts=Replicate()),
    "norm": SequenceParallel(), "up": ColwiseParallel(input_layouts=Shard(1)), "down": RowwiseParallel(),
}  # fmt: skip


def net(linear: type[nn.Linear] = nn.Linear) -> nn.Module:
    """Split the net; positions are split before its first norm and gathered after it."""
    model = Net(linear).eval()
    model.norm.register_forward_pre_hook(lambda module, args: (_own_positions(args[0]),), prepend=True)
    return parallelize_module(model, mesh_of(world), NET)


def _own_positions(x: Tensor) -> Tensor:
    return DTensor.from_local(x, mesh_of(world), [Replicate()], run_check=False).redistribute(placements=[Shard(1)])


def tokens() -> list[tuple[Tensor, Tensor]]:
    ids = torch.randint(9, (5, 4), generator=torch.Generator().manual_seed(2))
    ids[0, 0] = ids[1, 3] = 7
    labels = torch.tensor([0, 2, 1, 1, 0])
    return [(ids[:3], labels[:3]), (ids[3:], labels[3:])]


def of_net(linear: type[nn.Linear] = nn.Linear, **options: Any) -> dict[str, Any]:
    whole = Net(linear).eval()
    return like_whole(net(linear), whole, None, tokens(), likelihood=fk.Classification(), **options)


class Doubled(nn.Linear):
    """A linear that no rule knows."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


CASES |= {"every style": of_net, "generic": lambda: of_net(Doubled)}


def _planted(run: Callable[[], dict[str, Any]], of: Any, name: str, wrong: Any) -> dict[str, Any]:
    with patch.object(of, name, wrong), warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        found = run()
    return found | {"noted": any("disagrees with its captured gradient" in str(one.message) for one in noted)}


def unsummed(grads: Any, group: Any) -> Any:
    return grads


def first_rows(module: nn.Module) -> range:
    return range(len(module.weight.to_local()))


def over_all(states: Any, name: str, ranks: Any, count: int) -> Any:
    return States.result(states, name, ranks, count)


CASES |= {
    "squared first": lambda: _planted(of_net, layers, "_summed", unsummed),
    "squared first, unchecked": lambda: _planted(lambda: of_net(check=False), layers, "_summed", unsummed),
    "rows of another": lambda: _planted(of_net, layers, "_own_rows", first_rows),
    "rows of another, unchecked": lambda: _planted(lambda: of_net(check=False), layers, "_own_rows", first_rows),
    "counted by all, unchecked": lambda: _planted(
        lambda: like_whole(split(llama()), llama(), None, check=False, parameters="*norm*"),
        TensorParallelStates, "result", over_all,
    ),
}  # fmt: skip


@case("verified")
def _() -> dict[str, Any]:
    model, batches = split(llama(tie=True)), in_batches(data())
    statistics = fk.estimate(model, batches)
    whole = {name: statistics.full(name) for name in statistics}
    verified = fk.verify(model, batches, statistics)
    placed = [one | {"position_ids": torch.arange(6).expand(len(one["labels"]), 6).contiguous()} for one in batches]
    return {
        "ok": verified.ok, "examples": verified.examples,
        "wrong": fk.verify(model, batches, {name: 1.1 * one for name, one in whole.items()}).ok,
        "sequence": fk.verify(split(llama(attention="sdpa"), sequence=True), placed).ok,
        "gradients of own heads": fk.verify(loaded(qwen3(), "verified"), batches).ok,
        "other": refusal(lambda: fk.verify(model, batches[rank : rank + 1])),
    }  # fmt: skip


@case("partial gradients")
def _() -> str:
    """Norms of own heads that no style sums: each process finds a part of the gradient, which autograd calls whole."""
    model = loaded(qwen3(), "partial")
    for layer in model.model.layers:
        for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
            del norm.forward
    return refusal(lambda: fk.estimate(model, in_batches(data())))


@case("packed")
def _() -> dict[str, Any]:
    """Rows of three documents, and of two."""

    def packed(*lengths: int) -> dict[str, Tensor]:
        places = torch.cat([torch.arange(length) for length in lengths])[None]
        ids = torch.randint(1, 31, places.shape, generator=torch.Generator().manual_seed(len(lengths)))
        return {"input_ids": ids, "labels": ids.clone(), "position_ids": places}

    return like_whole(split(llama(tie=True)), llama(tie=True), None, [packed(4, 3, 2), packed(3, 5)])


@case("pairs")
def _() -> dict[str, Any]:
    """Each example has two rows, the chosen ones before the rejected ones."""
    every = pairs.pairs()
    batches = [pairs.collated(every[:2]), pairs.collated(every[2:])]

    def net() -> nn.Module:
        torch.manual_seed(0)
        return zoo.llama().model.double().eval()

    return like_whole(split(net()), net(), None, batches, likelihood=fk.Preference())


@case("checkpointed")
def _() -> dict[str, Any]:
    model = split(llama()).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return compared(model, llama())


@case("refused")
def _() -> dict[str, str]:
    batches, position = in_batches(data()), fk.DiagonalFisher(unit="position")

    def estimate(model: nn.Module, *args: Any, **options: Any) -> str:
        return refusal(lambda: fk.estimate(model, batches, *args, **options))

    def placed(placement: Any) -> nn.Module:
        model = llama()
        up = model.model.layers[0].mlp.up_proj
        up.weight = nn.Parameter(distribute_tensor(up.weight.detach(), mesh_of(world), [placement]))
        return model

    packed = placed(_StridedShard(0, split_factor=2))
    parallelize_module(packed.model.layers[0].mlp, mesh_of(world), {"up_proj": Distributed()})
    staged, experts = llama(), llama()
    staged._pp_stage = SimpleNamespace(pp_size=2)
    ExpertParallelLayer().install_forward(experts.model.layers[0].mlp, mesh_of(world))
    with context_parallel(mesh_of(world), buffers=[torch.zeros(2 * world)], buffer_seq_dims=[0]):
        in_context = estimate(llama())
    of_net = refusal(lambda: fk.estimate(net(), tokens(), position, likelihood=fk.Classification()))
    head = parallelize_module(llama(), mesh_of(world), {"lm_head": ColwiseParallel()})
    return {
        "positions of norms": of_net,
        "another recipe": estimate(split(llama()), fk.SketchedFisher()),
        "checkpoint": estimate(split(llama()), checkpoint=folder / "part"),
        "until": estimate(split(llama()), until=(0.9, 0.2)),
        "packed": estimate(packed),
        "experts": estimate(experts),
        "bare parameter": estimate(placed(Shard(0))),
        "context": in_context,
        "pipeline": estimate(staged),
        "logits in parts": estimate(head),
    }


class Distributed(ParallelStyle):
    """Marks a module as distributed, whose parameters are."""

    def _apply(self, module: nn.Module, device_mesh: Any) -> nn.Module:
        return distribute_module(module, device_mesh, lambda *_: None)


def bytes_of(model: nn.Module, batch: dict[str, Tensor]) -> list[int]:
    """Bytes of numbers that a batch of two sends, and those of an ordinary backward pass of the same batch."""
    batches = in_batches(batch)

    def estimate(count: int) -> int:
        with _Sent() as sent:
            fk.estimate(model, batches[:count], check=False)
        return sent.bytes

    with _Sent() as sent:
        model(**batches[1], use_cache=False).loss.backward()
    return [estimate(2) - estimate(1), sent.bytes]


class _Sent(TorchDispatchMode):
    """Counts the bytes of numbers that this process hands over to collective operations."""

    bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(one, DTensor) for one in types):
            return NotImplemented  # which sends by operations of its own, seen here next
        if "c10d" in function.namespace and "wait" not in function.__name__:
            tensors = args[1:2] if "allgather" in function.__name__ else args[:1]  # of c10d's own after the results
            leaves = [one for one in tree_leaves(tensors) if isinstance(one, Tensor) and one.is_floating_point()]
            self.bytes += sum(one.nbytes for one in leaves)
        return function(*args, **(kwargs or {}))


CASES["bytes"] = lambda: bytes_of(split(llama()), data(4))


@case("bytes of sequences")
def _() -> dict[str, Any]:
    batch = data(4) | {"position_ids": torch.arange(6).expand(4, 6).contiguous()}
    model = split(llama(attention="sdpa"), sequence=True)
    norms = [one for name, one in model.named_parameters() if "norm" in name]
    return {"sent": bytes_of(model, batch), "sums": sum(2 * one.numel() * one.itemsize for one in norms)}


def mixtral() -> nn.Module:
    torch.manual_seed(2)
    config = MixtralConfig(
        vocab_size=31, hidden_size=16, intermediate_size=12, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=16, num_local_experts=3, num_experts_per_tok=2,
        attn_implementation="eager", experts_implementation="eager",
    )  # fmt: skip
    return MixtralForCausalLM(config).double().eval()


@case("experts")
def _() -> dict[str, Any]:
    """Every process has some features of every expert; the router is whole."""
    return compared(loaded(mixtral(), "mixtral", experts_implementation="eager"), mixtral())


@case("experts elsewhere")
def _() -> dict[str, Any]:
    """The features of an expert's gate are interleaved, which files are not."""
    model = loaded(mixtral(), "more experts", experts_implementation="eager")
    statistics = fk.estimate(model, in_batches(data()))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    path = statistics.save(folder / "experts")
    alone = fk.select(fk.Statistics.load(path), fk.GlobalTopK(density=0.1))
    return {
        "interleaved": dict(model.named_parameters())[name].placements[0].split_factor,
        "verified": fk.verify(model, in_batches(data()), statistics).ok,
        "selected": refusal(lambda: fk.select(statistics, fk.GlobalTopK(density=0.1))),
        "of a file": alone == fk.select(statistics.whole(), fk.GlobalTopK(density=0.1)),
        "trained": refusal(lambda: fk.MaskedAdamW(model, alone)),
        "trained without": refusal(lambda: fk.MaskedAdamW(model, alone.restrict("*proj.weight"), outside="freeze")),
    }
