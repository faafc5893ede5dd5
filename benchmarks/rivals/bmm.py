"""The core of what ``kronfluence`` and ``nngeometry`` do to a linear."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.rivals.loops import Batches


def per_layer_bmm(model: nn.Module, batches: Batches) -> dict[str, Tensor]:
    """Hooks on linears that store ``[N, O, I]`` for each and square it, as ``kronfluence`` and ``nngeometry`` do.

    Linears alone, no norms and no embeddings; the weights are frozen, which saves the ordinary weight gradient.
    """
    total: dict[str, Tensor] = {}
    handles = []
    inputs: dict[nn.Module, Tensor] = {}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval().requires_grad_(False)
    try:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                total[name] = torch.zeros_like(module.weight, dtype=torch.float32)

                def keep(module: nn.Module, args: tuple[Tensor]) -> None:
                    inputs[module] = args[0]

                def square(module: nn.Module, _: object, grads: tuple[Tensor], into: Tensor = total[name]) -> None:
                    per_example = torch.bmm(grads[0].mT, inputs.pop(module))
                    into.add_(per_example.float().square_().sum(0))

                handles += [module.register_forward_pre_hook(keep), module.register_full_backward_hook(square)]
        embedding = model.get_input_embeddings()
        handles.append(embedding.register_forward_hook(lambda module, args, output: output.requires_grad_()))
        for batch in batches:
            loss = model(**batch, use_cache=False).loss  # of full rows: the mean over tokens is one over examples, too
            (len(batch["input_ids"]) * loss).backward()
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trained:
            parameter.requires_grad_(True)
    return total
