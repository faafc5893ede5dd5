"""Practices of published code that belong to no library: squares of something else, or in too few bits."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.rivals.loops import Batches


def batch_gradient(model: nn.Module, batches: Batches) -> dict[str, Tensor]:
    """The square of the gradient of a batch's mean loss, for each of its examples."""
    total: dict[str, Tensor] = {}
    for batch in batches:
        grads = torch.autograd.grad(model(**batch).loss, list(model.parameters()))
        for (name, _), grad in zip(model.named_parameters(), grads, strict=True):
            total[name] = total.get(name, 0) + len(batch["input_ids"]) * grad.square()
    return total


def each_position(model: nn.Module, batches: Batches) -> dict[str, Tensor]:
    """``(g^2)^T x^2`` over flattened positions of every linear."""
    total: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        inputs = args[0].detach().flatten(0, -2)

        def square(grad: Tensor) -> None:
            total[name] = total.get(name, 0) + grad.flatten(0, -2).square().mT @ inputs.square()

        output.register_hook(square)

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(partial(keep, f"{name}.weight"))
    for batch in batches:
        (len(batch["input_ids"]) * model(**batch).loss).backward()
    return total


def squared_in_model_dtype(model: nn.Module, batches: Batches, into: torch.dtype | None, losses) -> dict[str, Tensor]:
    """Batch size 1; ``.grad`` is squared as it is and added to a tensor of ``into``, or of the model's own dtype."""
    total = {name: torch.zeros_like(parameter, dtype=into) for name, parameter in model.named_parameters()}
    for batch in batches:
        for n in range(len(batch["labels"])):
            model.zero_grad()
            losses(model, {key: value[n : n + 1] for key, value in batch.items()}).sum().backward()
            for name, parameter in model.named_parameters():
                total[name] += parameter.grad.square()
    return total
