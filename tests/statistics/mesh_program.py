"""What each process of ``test_mesh_ranks.py`` runs: FSDP2 over one axis of a mesh, tensor parallel over the other."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fishkern as fk
from tests.statistics import tensor_program
from tests.statistics.tensor_program import CASES, case, compared, data, in_batches, llama, refusal, split

rank, world = 0, 1  # as of the program that this one adds its cases to


def mesh(*sizes: int) -> Any:
    names = ("replica", "data", "model")[-len(sizes) :]
    return init_device_mesh("cpu", sizes, mesh_dim_names=names)


def both(model: nn.Module, over: Any = None, **options: Any) -> nn.Module:
    """Split a LLaMA over the last axis of a mesh, and shard it over the others: its layers, and what is around them."""
    over = mesh(2, world // 2) if over is None else over
    split(model, mesh=over["model"], **options)
    rest = over[over.mesh_dim_names[:-1]] if over.ndim > 2 else over["data"]
    for layer in model.model.layers:
        fully_shard(layer, mesh=rest)
    return fully_shard(model, mesh=rest)


def own(batch: dict[str, Tensor], team: int, teams: int = 2) -> list[dict[str, Tensor]]:
    """Give a team its examples, of which the last may have fewer, in two batches."""
    return in_batches({key: value[team::teams].clone() for key, value in batch.items()})


def of_teams(model: nn.Module, whole: nn.Module, batch: dict[str, Tensor] | None = None, **options: Any) -> Any:
    batch = data() if batch is None else batch
    return compared(model, whole, batch, iter(own(batch, rank // 2)), **options)


CASES |= {
    "both": lambda: of_teams(both(llama()), llama()),
    "both, tied": lambda: of_teams(both(llama(tie=True)), llama(tie=True)),
}
