"""The loop over single examples, eager and as a CUDA graph, and the yardstick of one ordinary pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

Batches = Iterable[dict[str, Tensor]]


def one_by_one(model: nn.Module, batches: Batches) -> dict[str, Tensor]:
    """Batch size 1; a hook squares each gradient as soon as it is complete, and frees it."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    total = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in trained.items()}
    handles = []
    for name, parameter in trained.items():

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


def graphed_one_by_one(model: nn.Module, T: int) -> Callable[[Batches], dict[str, Tensor]]:
    """The same loop as a CUDA graph, which is captured here once, for rows of ``T`` full positions."""
    total = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in model.named_parameters()}
    ids = torch.zeros(1, T, dtype=torch.long, device=next(model.parameters()).device)
    model.eval()

    def one_example() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        for name, parameter in model.named_parameters():
            total[name].addcmul_(parameter.grad, parameter.grad)
            parameter.grad = None

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            one_example()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        one_example()

    def loop(batches: Batches) -> dict[str, Tensor]:
        for values in total.values():
            values.zero_()
        for batch in batches:
            for row in batch["input_ids"]:
                ids[0].copy_(row)
                graph.replay()
        return total

    return loop


def forward_backward(model: nn.Module, batches: Batches) -> None:
    """The yardstick: one ordinary forward and backward pass of each batch."""
    model.eval()
    for batch in batches:
        model(**batch, use_cache=False).loss.backward()
        for parameter in model.parameters():
            parameter.grad = None
