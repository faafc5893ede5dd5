"""The truth for all comparisons: batch size 1, in float64, by plain autograd."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.rivals.loops import Batches

# A parameter whose squares are smaller than this fraction of the largest in the model has no gradient except for
# rounding: a bias of attention keys, which cancels in the softmax.
NO_GRADIENT = 1e-8
# Beyond this a result is wrong, not inexact.
RIGHT = 1e-3


def model_loss(model: nn.Module, row: dict[str, Tensor]) -> Tensor:
    return model(**row).loss


def float64_loop(
    model: nn.Module, batches: Batches, loss: Callable[[nn.Module, dict[str, Tensor]], Tensor] = model_loss
) -> dict[str, Tensor]:
    """The sum over examples of squared gradients, of a copy of the model in float64."""
    model = copy.deepcopy(model).double().eval()
    parameters = dict(model.named_parameters())
    total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for batch in batches:
        for n in range(len(next(iter(batch.values())))):
            row = {key: value[n : n + 1] for key, value in batch.items()}
            row = {key: value.double() if value.is_floating_point() else value for key, value in row.items()}
            grads = torch.autograd.grad(loss(model, row), list(parameters.values()), allow_unused=True)
            for name, grad in zip(parameters, grads, strict=True):
                if grad is not None:
                    total[name] += grad.square()
    return total


def coverage(model: nn.Module, squares: Mapping[str, Tensor]) -> dict[str, Any]:
    """Which share of the parameters' entries was computed, and the kinds of modules that were missed."""
    parameters = dict(model.named_parameters())
    missed = parameters.keys() - squares.keys()
    entries = sum(parameter.numel() for parameter in parameters.values())
    return {
        "entries": round(1 - sum(parameters[name].numel() for name in missed) / entries, 6),
        "parameters": f"{len(parameters) - len(missed)} of {len(parameters)}",
        "missed": sorted({type(model.get_submodule(name.rpartition(".")[0])).__name__ for name in missed}),
    }


def largest_error(squares: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> dict[str, Any]:
    """``|squares - truth| / |truth|`` of the parameter where it is largest, and which parameters are wrong."""
    floor = NO_GRADIENT * max(values.norm().item() for values in truth.values())
    errors = {
        name: ((values.double() - truth[name]).norm() / max(truth[name].norm().item(), floor)).item()
        for name, values in squares.items()
        if name in truth
    }
    worst = max(errors, key=errors.get)
    return {"error": errors[worst], "worst": worst, "wrong": sorted(name for name in errors if errors[name] > RIGHT)}
