"""The ways to a diagonal Fisher that people use today, written as they write them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def one_by_one(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Batch size 1; a hook squares each gradient as soon as it is there, so that one is alive at a time."""
    total = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    handles = []
    for name, parameter in model.named_parameters():

        def square(parameter: nn.Parameter, into: Tensor = total[name]) -> None:
            into.addcmul_(parameter.grad, parameter.grad)
            parameter.grad = None

        handles.append(parameter.register_post_accumulate_grad_hook(square))
    model.eval()
    try:
        for batch in batches:
            for n in range(len(batch["input_ids"])):
                row = {key: value[n : n + 1] for key, value in batch.items()}
                model(**row, use_cache=False).loss.backward()
    finally:
        for handle in handles:
            handle.remove()
    return total


def vmap_grad(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """``torch.func``: the gradients of a whole batch at once, ``[N, *shape]`` for every parameter.

    The rows must be full: transformers looks into an attention mask, which vmap does not allow.
    """
    model.eval()
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}

    def loss(parameters: dict[str, Tensor], row: dict[str, Tensor]) -> Tensor:
        row = {key: value[None] for key, value in row.items() if key != "attention_mask"}
        return torch.func.functional_call(model, parameters, kwargs={**row, "use_cache": False}).loss

    per_example = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
    for batch in batches:
        for name, grads in per_example(parameters, batch).items():
            total[name] += grads.square().sum(0)
    return total
