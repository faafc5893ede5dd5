"""What each process of ``test_sharded_trainer.py`` runs: LoRA under transformers' Trainer, sharded by accelerate."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import fishkern as fk
from fishkern.integrations.trainer import FILE, FisherCallback, FisherMixin

CASES: dict[str, Callable[[], Any]] = {}
rank, world, folder = 0, 1, Path()


def case(name: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    def listed(run: Callable[[], Any]) -> Callable[[], Any]:
        CASES[name] = run
        return run

    return listed


def adapted(dtype: torch.dtype = torch.float32) -> nn.Module:
    """A LoRA of which rows divide by no number of ranks."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16, attn_implementation="eager", use_cache=False,
    )  # fmt: skip
    lora = LoraConfig(r=3, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(LlamaForCausalLM(config), lora).to(dtype)


def rows() -> list[dict[str, Tensor]]:
    ids = torch.randint(1, 31, (8, 6), generator=torch.Generator().manual_seed(5))
    return [{"input_ids": one, "labels": one.clone()} for one in ids]


class Training(FisherMixin, Trainer):
    """A Trainer that shards on the CPU, which accelerate does on GPUs alone; it notes its batches."""

    def create_accelerator_and_postprocess(self) -> None:
        plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
        super().create_accelerator_and_postprocess()
        PartialState._shared_state["distributed_type"] = self.accelerator.state.distributed_type = DistributedType.FSDP
        self.accelerator.state.fsdp_plugin = plugin
        self.is_fsdp_enabled = True
        self.batches: list[Tensor] = []

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        self.batches.append(inputs["input_ids"])
        return super().training_step(model, inputs, *args, **kwargs)


def training(select: Any, where: str, **options: Any) -> Training:
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ |= {key: str(value) for key, value in own.items()}  # which accelerate looks for
    AcceleratorState._reset_state(reset_partial_state=True)
    config = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], **options.pop("config", {})}
    args = TrainingArguments(
        str(folder / where), use_cpu=True, ddp_backend="gloo", fsdp=True, fsdp_config=config,
        per_device_train_batch_size=1, max_steps=4, learning_rate=1e-2, lr_scheduler_type="constant", seed=1,
        max_grad_norm=0.05, logging_steps=1, report_to=[], disable_tqdm=True, dataloader_num_workers=0, **options,
    )  # fmt: skip
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    return Training(adapted(dtype), args, train_dataset=rows(), select=select)


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: (one.full_tensor() if hasattr(one, "full_tensor") else one).detach().clone()
        for name, one in model.named_parameters()
        if "lora_" in name
    }


def alone(selection: fk.Selection, batches: list[Tensor]) -> dict[str, Tensor]:
    """Train the whole model on the batches of all ranks, in one process."""
    every: list[Any] = [None] * world
    dist.all_gather_object(every, batches)
    model = adapted()
    optimizer = fk.MaskedAdamW(model, selection, lr=1e-2, betas=(0.9, 0.999), weight_decay=0.0, max_grad_norm=0.05)
    for step in range(len(batches)):
        ids = torch.cat([part[step] for part in every])
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return whole(model)


def farthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in other)


def some() -> fk.Selection:
    """Half of the entries of all adapter weights."""
    generator = torch.Generator().manual_seed(2)
    pool = {name: one for name, one in adapted().named_parameters() if one.requires_grad}
    indices = {
        name: (torch.rand(one.numel(), generator=generator) < 0.5).nonzero().view(-1) for name, one in pool.items()
    }
    return fk.Selection({name: one.shape for name, one in pool.items()}, indices)


@case("trained")
def trained(**options: Any) -> dict[str, Any]:
    """A selection that is there already; saved in the middle, and gone on with in another Trainer."""
    selection = some()
    one = training(lambda model, batches: selection, "trained", save_strategy="steps", save_steps=2, **options)
    start = whole(one.model)
    one.train()
    end = whole(one.model)
    expected = alone(selection, one.batches)
    again = training(lambda model, batches: selection, "trained", save_strategy="no", **options)
    again.train(resume_from_checkpoint=str(folder / "trained" / "checkpoint-2"))
    masks = {name: selection.mask(name) for name in selection.names}
    moved = {name: end[name] != start[name] for name in end}
    return {
        "sharded": all(hasattr(p, "device_mesh") for p in one.model.parameters()),
        "error": farthest(end, expected), "moved": farthest(end, start),
        "outside": any(bool((moved[name] & ~masks[name.replace("module.", "")]).any()) for name in moved),
        "resumed": farthest(whole(again.model), end), "steps": len(again.batches),
        "saved": fk.Selection.load(folder / "trained" / "checkpoint-2" / FILE) == selection,
        "logged": [log["grad_norm"] for log in one.state.log_history if "grad_norm" in log],
    }  # fmt: skip


CASES |= {
    "trained, sharded states": lambda: trained(config={"state_dict_type": "SHARDED_STATE_DICT"}),
    "trained, from one rank": lambda: trained(config={"cpu_ram_efficient_loading": True}),
    "trained, 16 bits": lambda: trained(bf16=True),
}


@case("selected")
def _() -> dict[str, Any]:
    """Selected inside train(), by the data of all ranks."""
    one = training(partial(fk.fish_tuning, density=0.2, max_examples=8), "selected", save_strategy="no")
    one.train()
    return {
        "error": farthest(whole(one.model), alone(one.selection, one.batches)), "count": one.selection.count,
    }  # fmt: skip


@case("saved by parts")
def _() -> dict[str, Any]:
    """A callback with a selection of which each rank has its own entries."""
    mesh = init_device_mesh("cpu", (world,))
    scores = {"a": torch.arange(12.0).view(6, 2), "b": torch.arange(5.0)}
    own = fk.select(
        {name: distribute_tensor(one, mesh, [Shard(0)]) for name, one in scores.items()}, fk.GlobalTopK(k=7)
    )
    into = folder / "parts" / "checkpoint-3"
    if rank == 0:
        into.mkdir(parents=True)
    dist.barrier()
    state = SimpleNamespace(global_step=3, is_world_process_zero=rank == 0)
    FisherCallback(own).on_save(SimpleNamespace(output_dir=str(folder / "parts")), state, None, model=nn.Linear(1, 1))
    dist.barrier()
    return {"sharded": own.is_sharded, "equal": fk.Selection.load(into / FILE) == fk.select(scores, fk.GlobalTopK(k=7))}
