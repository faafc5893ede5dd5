"""The ways to a diagonal Fisher that people use today, written as they write them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

Batches = Iterable[dict[str, Tensor]]


def one_by_one(model: nn.Module, batches: Batches) -> dict[str, Tensor]:
    """Batch size 1; a hook squares each gradient as soon as it is there, so that one is alive at a time."""
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


def vmap_grad(model: nn.Module, batches: Batches) -> dict[str, Tensor]:
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


def per_layer_bmm(model: nn.Module, batches: Batches) -> dict[str, Tensor]:
    """Hooks on linears that store ``[N, O, I]`` for each and square it, as ``kronfluence`` and ``nngeometry`` do.

    Linears alone, no norms and no embeddings; the weights are frozen, so that no ordinary weight gradient is taken.
    """
    total: dict[str, Tensor] = {}
    handles = []
    inputs: dict[nn.Module, Tensor] = {}
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
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
            loss = model(**batch, use_cache=False).loss  # of full rows, so that the mean is one over examples too
            (len(batch["input_ids"]) * loss).backward()
    finally:
        for handle in handles:
            handle.remove()
        for parameter in wanted:
            parameter.requires_grad_(True)
    return total


def forward_backward(model: nn.Module, batches: Batches) -> None:
    """No rival but the yardstick: one ordinary forward and backward pass of each batch."""
    model.eval()
    for batch in batches:
        model(**batch, use_cache=False).loss.backward()
        for parameter in model.parameters():
            parameter.grad = None
