"""``torch.func``: the gradients of a whole batch at once, ``[N, *shape]`` for every parameter."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.rivals.loops import Batches


def vmap_grad(model: nn.Module, batches: Batches, *, keep_mask: bool = False) -> dict[str, Tensor]:
    """``torch.func``: the gradients of a whole batch at once, ``[N, *shape]`` for every parameter.

    Args:
        model: A model of transformers.
        batches: Of full rows: transformers reads an attention mask, which vmap does not allow.
        keep_mask: Pass the mask to the model nevertheless.
    """
    model.eval()
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    total = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in parameters.items()}

    def loss(parameters: dict[str, Tensor], row: dict[str, Tensor]) -> Tensor:
        row = {key: value[None] for key, value in row.items() if keep_mask or key != "attention_mask"}
        return torch.func.functional_call(model, parameters, kwargs={**row, "use_cache": False}).loss

    per_example = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
    for batch in batches:
        for name, grads in per_example(parameters, batch).items():
            total[name] += grads.float().square_().sum(0)
    return total
