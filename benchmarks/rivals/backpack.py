"""BackPACK: ``SumGradSquared``, by rules for linears and embeddings; norms have none."""

from __future__ import annotations

from torch import Tensor, nn

from benchmarks.rivals.loops import Batches
from benchmarks.rivals.opacus import with_positions

SETTINGS = "SumGradSquared on linears and embeddings, no padding index, position ids for each example, opt_einsum there"


def backpack(
    model: nn.Module, batches: Batches, *, own_positions: bool = True, whole: bool = False
) -> dict[str, Tensor]:
    """The library's attribute ``sum_grad_squared`` of every parameter that has one after a backward pass.

    Args:
        model: Its embeddings lose their padding index, which the library refuses.
        batches: Their loss must be a mean over examples.
        own_positions: Whether positions are given for each example.
        whole: Extend the model, as the documentation does, instead of those modules that have a rule. The library sets
            an attribute ``output`` on each, which is a child of BERT's layers.
    """
    from backpack import backpack, extend
    from backpack.extensions import SumGradSquared

    total: dict[str, Tensor] = {}
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None
        if isinstance(module, (nn.Linear, nn.Embedding)) and not whole:
            extend(module)
    if whole:
        extend(model)
    model.eval()
    for batch in batches:
        with backpack(SumGradSquared()):
            loss = model(**(with_positions(batch) if own_positions else batch)).loss
            (len(batch["input_ids"]) * loss).backward()
        for name, parameter in model.named_parameters():
            if hasattr(parameter, "sum_grad_squared"):
                squares = parameter.sum_grad_squared.float()
                total[name] = total[name].add_(squares) if name in total else squares
                del parameter.sum_grad_squared
            parameter.grad = None
    return total
