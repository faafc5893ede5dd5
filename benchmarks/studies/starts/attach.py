"""From a start to a PEFT model that trains it: one way for all arms, so that nothing else differs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.studies.starts.tasks import Task


class Factors(NamedTuple):
    """The start of one module: the adapter adds ``scaling * B A``. A ``fishkern.ModuleInit`` has the same parts.

    Attributes:
        A: ``[R, I]``.
        B: ``[O, R]``.
        scaling: alpha / rank.
    """

    A: Tensor
    B: Tensor
    scaling: float = 1.0


def lora_config(task: Task, **options):
    """PEFT's config of rank ``rank`` on the task's modules, alpha equal to the rank, without dropout."""
    import peft

    rank = task.setting.rank
    settings = {"r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "target_modules": list(task.targets), **options}
    return peft.LoraConfig(task_type="CAUSAL_LM" if task.language else "SEQ_CLS", **settings)


@torch.no_grad()
def attach(model: nn.Module, start: Mapping[str, Factors], task: Task) -> nn.Module:
    """Give each module its factors, and take the same product out of its frozen weight.

    Args:
        model: Without adapters; changed in place.
        start: For every adapted module, by its path.
        task: Which modules those are.

    Returns:
        The PEFT model. Its output is that of ``model``, up to the rounding of one subtraction.

    Raises:
        ValueError: A path is no adapted module of the task, or the start lacks one.
    """
    import peft

    exact = {path: f"^{re.escape(path)}" for path in start}  # a pattern of PEFT matches ends of paths, too
    ranks = {exact[path]: len(factors.A) for path, factors in start.items()}
    alphas = {exact[path]: factors.scaling * len(factors.A) for path, factors in start.items()}
    config = lora_config(task, rank_pattern=ranks, alpha_pattern=alphas)
    adapted = peft.get_peft_model(model, config)
    layers = adapters_of(adapted)
    if differing := layers.keys() ^ start.keys():
        raise ValueError(f"a start for each adapted module is needed; these differ: {', '.join(sorted(differing))}.")
    for path, layer in layers.items():
        factors, weight = start[path], layer.base_layer.weight
        scaling = layer.scaling["default"]
        layer.lora_A["default"].weight.copy_(factors.A)
        layer.lora_B["default"].weight.copy_(factors.B)
        weight -= scaling * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight)
    return adapted


def adapters_of(adapted: nn.Module) -> dict[str, nn.Module]:
    """The adapted modules of a PEFT model by the path that each has in the model below."""
    below = adapted.get_base_model()
    return {path: module for path, module in below.named_modules() if hasattr(module, "lora_A")}


def targets_of(model: nn.Module, task: Task) -> dict[str, nn.Linear]:
    """The modules of a model that the task adapts, by path."""
    ends = tuple(f".{target}" for target in task.targets)
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and f".{path}".endswith(ends)
    }


def layer_of(path: str) -> int:
    """The number of the transformer layer that a module is in."""
    return int(re.search(r"\.layers?\.(\d+)\.", path)[1])
