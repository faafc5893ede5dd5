"""Adam's second moment, read out of an optimizer."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fishkern import hosts
from fishkern.names import listed, without_wrappers
from fishkern.statistics.coverage import Covered


class SecondMoment(NamedTuple):
    """The arguments of :class:`fishkern.Statistics` that it is."""

    tensors: dict[str, Tensor]
    count: int
    provenance: dict[str, Any]
    coverage: dict[str, Covered]


def second_moment(optimizer: torch.optim.Optimizer, model: nn.Module | None) -> SecondMoment:
    """Read the second moment of an optimizer of Adam's kind.

    Args:
        optimizer: Such as ``torch.optim.AdamW``; one in accelerate's wrapper as well.
        model: For the names of the parameters, where the optimizer was not given them.

    Returns:
        For each parameter with a state ``exp_avg_sq / (1 - beta2^step)``, float32.

    Raises:
        TypeError: It is no optimizer.
        ValueError: See :meth:`fishkern.Statistics.from_optimizer`.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}.")
    kind = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise ValueError(f"{kind} keeps no running mean: the rows that a batch leaves out keep theirs as it was.")
    decays, l2 = _betas(optimizer, kind), _l2(optimizer)
    tensors: dict[str, Tensor] = {}
    coverage: dict[str, Covered] = {}
    steps: set[int] = set()
    for name, parameter in _named(optimizer, model).items():
        state = optimizer.state.get(parameter, {})
        if not state:
            coverage[name] = Covered("left out", parameter.numel(), f"{kind} has no state for it")
            continue
        moment = state.get("exp_avg_sq")
        if not isinstance(moment, Tensor) or "step" not in state:
            raise ValueError(
                f"{kind} keeps no exp_avg_sq for {name}, but {listed(state)}: give an Adam of torch, such as AdamW."
            )
        if moment.shape != parameter.shape or not moment.is_floating_point() or hasattr(moment, "device_mesh"):
            raise ValueError(
                f"{kind} keeps the second moment of {name} as {tuple(moment.shape)} of {moment.dtype}, and not for "
                f"each entry of {tuple(parameter.shape)}: it is masked, sharded or quantised."
            )
        step = int(state["step"])
        steps.add(step)
        correction = 1 - decays**step
        tensors[name] = moment.detach().to(torch.promote_types(moment.dtype, torch.float32)) / correction
        coverage[name] = Covered("batch", parameter.numel())
    if not tensors:
        raise ValueError(f"{kind} has no state yet: take a step first.")
    definition = {"estimator": "AdamSecondMoment", "unit": "batch", "decay": decays, **({"l2": l2} if l2 else {})}
    run = {"optimizer": kind, "steps": sorted(steps), "dtypes": sorted({str(one.dtype) for one in tensors.values()})}
    return SecondMoment(tensors, max(steps), {"definition": definition, "runs": [run]}, coverage)


def _betas(optimizer: torch.optim.Optimizer, kind: str) -> float:
    if not all("betas" in group for group in optimizer.param_groups):
        raise ValueError(f"{kind} has no betas, so it is none of Adam's kind: give an Adam of torch, such as AdamW.")
    decays = {float(group["betas"][1]) for group in optimizer.param_groups}
    if len(decays) > 1:
        raise ValueError(f"the groups of {kind} have the decays {sorted(decays)}: statistics have one.")
    return decays.pop()


def _l2(optimizer: torch.optim.Optimizer) -> float:
    """Give the weight decay that the gradients contain, as in Adam, where it is not AdamW's."""
    added = {
        float(group.get("weight_decay", 0.0))
        for group in optimizer.param_groups
        if not group.get("decoupled_weight_decay", "AdamW" in type(optimizer).__name__)
    }
    if len(added) > 1:
        raise ValueError(f"the groups add weight decays of {sorted(added)} to the gradients: statistics have one.")
    return added.pop() if added else 0.0


def _named(optimizer: torch.optim.Optimizer, model: nn.Module | None) -> dict[str, Tensor]:
    """Give all parameters of the model in its order, or else those of the optimizer, by name."""
    given = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if model is not None:
        named = hosts.named_parameters(model)
        own = set(named.values())
        if foreign := [parameter for parameter in given if parameter not in own]:
            raise ValueError(f"a parameter {tuple(foreign[0].shape)} of the optimizer is none of the model's.")
        return named
    names = [name for group in optimizer.param_groups for name in group.get("param_names", ())]
    if len(names) != len(given):
        raise ValueError(
            "the optimizer does not know the names of its parameters: pass model=, or make the optimizer with "
            "model.named_parameters()."
        )
    named = dict(zip(map(without_wrappers, names), given, strict=True))
    if len(named) < len(given):
        raise ValueError("the optimizer has two parameters of one name, as of two models: statistics are of one model.")
    return named
