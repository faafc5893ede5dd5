"""Factors of gradients inside a host: run it once more for an example, and report the linear maps inside."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fishkern.layers.base import Call, Layer
from fishkern.layers.generic import host_outputs
from fishkern.layers.grads import OuterProductGrads


def module_factors(
    call: Call, output_grads: Sequence[Tensor | None], inside: Mapping[str, tuple[nn.Module, Layer]]
) -> dict[str, OuterProductGrads]:
    """Run a module once more, and collect activations and output gradients of linear maps in it.

    Args:
        call: The call of one example.
        output_grads: Gradient of the example's loss by each floating tensor of the output, or ``None``.
        inside: Module and rule of each weight, by the weight's name in the host.

    Returns:
        Gradients by name in the host, of one example: all rows of all calls of the linear map are its positions.
        Without weights that the example does not reach.
    """
    calls: dict[nn.Module, list[tuple[Call, Tensor]]] = defaultdict(list)
    recomputing = False

    def note(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        # the gradient at the output is that of zeros which are added to it; the graph through it stays whole
        zeros = torch.zeros_like(output, requires_grad=True)
        if not recomputing:  # a checkpointed segment runs once more in backward, and its calls are noted already
            calls[module].append((replace(call, module=module, args=args, kwargs=kwargs), zeros))
        return output + zeros

    def back_propagated(output: Any) -> list[Tensor | None]:
        nonlocal recomputing
        recomputing = True
        pairs = host_outputs(output, output_grads)
        zeros = [added for noted in calls.values() for _, added in noted]
        if not pairs or not zeros:
            return [None] * len(zeros)
        outputs, grads = zip(*pairs, strict=True)
        with torch.autocast(call.autocast[0], enabled=False):
            return torch.autograd.grad(outputs, zeros, grads, allow_unused=True)

    modules = {module for module, _ in inside.values()}
    handles = [module.register_forward_hook(note, with_kwargs=True) for module in modules]
    try:
        with torch.enable_grad():
            grads = iter(call.run(then=back_propagated))
    finally:
        for handle in handles:
            handle.remove()
    by_module = {module: [(one, next(grads)) for one, _ in noted] for module, noted in calls.items()}
    return _joined(by_module, inside)


@torch.no_grad()
def _joined(
    by_module: Mapping[nn.Module, Sequence[tuple[Call, Tensor | None]]], inside: Mapping[str, tuple[nn.Module, Layer]]
) -> dict[str, OuterProductGrads]:
    """Apply each weight's rule to the calls of its module, and join their rows as positions of one example."""
    found = {}
    for name, (module, layer) in inside.items():
        own = name.rpartition(".")[2]
        uses = [
            grads.unflattened(1)
            for one, grad in by_module.get(module, ())
            if grad is not None and grad.numel()
            for _, grads in layer.per_example_grads(one, grad, frozenset({own}))
        ]
        if uses:
            found[name] = OuterProductGrads.joined(uses)
    return found
