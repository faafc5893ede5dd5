"""What each process of ``test_mesh.py`` runs: the trainings of ``sharded_program.py`` on models that are split."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

import fishkern as fk
from fishkern import hosts
from fishkern.optim import clipping
from tests.optim import sharded_program as program
from tests.optim.sharded_program import CASES, NESTEROV, compared, ranges

PLAN = {
    "0": ColwiseParallel(output_layouts=Replicate()),
    "2": RowwiseParallel(input_layouts=Replicate()),
    "4": ColwiseParallel(output_layouts=Replicate()),  # of one row
}


def normed() -> nn.Module:
    """One with a norm that runs on some of the rows, so that each process finds a summand of its gradient."""
    torch.manual_seed(3)
    layers = nn.Linear(12, 11), nn.LayerNorm(11), nn.Tanh(), nn.Linear(11, 4)
    return nn.Sequential(*layers).double()


NORMED = {
    "0": ColwiseParallel(output_layouts=Shard(0)),
    "1": SequenceParallel(sequence_dim=0),
    "3": ColwiseParallel(input_layouts=Shard(0), output_layouts=Replicate()),
}


def split(model: nn.Module, *, replicas: int = 1, **options: Any) -> nn.Module:
    """Split over all processes."""
    return parallelize_module(model, init_device_mesh("cpu", (program.world,)), dict(_plan(model)))


def both(model: nn.Module, *, replicas: int = 1, **options: Any) -> nn.Module:
    """Split over teams of two, and shard over the teams; the last layer of one row is left to FSDP2 alone."""
    mesh = init_device_mesh("cpu", (program.world // 2, 2), mesh_dim_names=("data", "model"))
    parallelize_module(model, mesh["model"], {name: style for name, style in _plan(model).items() if name != "4"})
    fully_shard(model[0], mesh=mesh["data"], **options)
    return fully_shard(model, mesh=mesh["data"], **options)


def _plan(model: nn.Module) -> dict[str, Any]:
    return dict(NORMED if isinstance(model[1], nn.LayerNorm) else PLAN)


@contextmanager
def laid_out(how: Callable[..., nn.Module]) -> Any:
    """Let the cases of the other program split models in this way, and give teams rows of their own."""
    teams = 1 if how is split else program.world // 2
    rows = slice(program.rank // 2 if teams > 1 else 0, None, teams)
    with patch.object(program, "sharded", how), patch.object(program, "own_rows", lambda: rows):
        yield


def on(how: Callable[..., nn.Module], run: Callable[[], Any]) -> Callable[[], Any]:
    def case() -> Any:
        with laid_out(how):
            return run()

    return case


LAYOUTS = {"split": split, "both": both}
RUNS: dict[str, Callable[[], Any]] = {
    "adamw": compared,
    "adamw, ranges": lambda: compared(select=ranges),
    "sgd": program.by_sgd,
    "nesterov, ranges": lambda: compared(select=ranges, kind=fk.MaskedSGD, options=NESTEROV),
    "norm": lambda: compared(normed, some),
    **{name: CASES[name] for name in ("resumed", "state", "groups", "delta", "start", "selected on ranks", "16 bits")},
}
CASES |= {f"{run}, {name}": on(how, RUNS[run]) for name, how in LAYOUTS.items() for run in RUNS}


def some(model: nn.Module) -> fk.Selection:
    """Entries of every parameter."""
    generator = torch.Generator().manual_seed(1)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    masks = {name: torch.rand(shape.numel(), generator=generator) < 0.6 for name, shape in shapes.items()}
    return fk.Selection(shapes, {name: mask.nonzero().view(-1) for name, mask in masks.items()})


def summands(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return hosts.local_part(tensor)


def planted(of: Any, name: str, wrong: Callable[..., Any], run: Callable[[], Any]) -> Callable[[], Any]:
    def case() -> Any:
        with patch.object(of, name, wrong):
            return run()

    return case


for _name, _how in LAYOUTS.items():
    own_norm, all_norm = program._of_own_part, program._over_all
    CASES |= {
        f"norm of the own part, {_name}": on(_how, planted(clipping, "_norm_of_all", own_norm, program.by_sgd)),
        f"replicas counted, {_name}": on(_how, planted(hosts.Share, "_exchanged", all_norm, program.by_sgd)),
        f"summands, {_name}": on(_how, planted(hosts, "own_part", summands, lambda: compared(normed, some))),
    }
for _steps, _how in {"steps 0 to 8": both, "steps 8 to 14": split}.items():
    CASES[f"{_steps}, handed on"] = on(_how, CASES[_steps])
