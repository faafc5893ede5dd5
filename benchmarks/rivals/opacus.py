"""Opacus: hooks keep ``[N, *shape]`` on every parameter until the backward pass is over."""

from __future__ import annotations

from torch import Tensor, nn

from benchmarks.rivals.loops import Batches

SETTINGS = "GradSampleHooks, training mode without dropout, position ids for each example, squared in place"


def opacus(model: nn.Module, batches: Batches, *, own_positions: bool = True) -> dict[str, Tensor]:
    """The squares of ``grad_sample``; the model's mean loss over the batch is scaled by the library.

    Args:
        model: Its hooks need training mode, so dropouts are set to zero.
        batches: Their loss must be a mean over examples.
        own_positions: Whether positions are given for each example: a position embedding looked up once for the whole
            batch is wrong (opacus#841).
    """
    from opacus.grad_sample import GradSampleHooks

    total: dict[str, Tensor] = {}
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    hooks = GradSampleHooks(model, loss_reduction="mean")
    try:
        for batch in batches:
            model(**(with_positions(batch) if own_positions else batch)).loss.backward()
            for name, parameter in model.named_parameters():
                if parameter.grad_sample is not None:
                    squares = parameter.grad_sample.float().square_().sum(0)
                    total[name] = total[name].add_(squares) if name in total else squares
                parameter.grad_sample = parameter.grad = None
    finally:
        hooks.cleanup()
    return total


def with_positions(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch with a row of position ids for each example."""
    ids = batch["input_ids"]
    positions = ids.new_ones(ids.shape).cumsum(1) - 1
    return {**batch, "position_ids": positions}
