"""Evaluation mode that keeps activation checkpointing, and inputs through which gradients reach its segments."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fishkern.hosts.wrappers import base_model


@contextmanager
def evaluation_mode(model: nn.Module, *, checkpointing: bool = True) -> Iterator[None]:
    """Switch every module to evaluation mode, but keep activation checkpointing where it is on.

    transformers checkpoints a layer only if the layer's own ``training`` is true. A checkpointed layer therefore keeps
    it true, and has it set to false only while its body runs: no dropout is drawn.

    Args:
        model: A module. Its modes are restored on exit, also after an exception.
        checkpointing: Whether activation checkpointing stays on; if not, every module evaluates.

    Yields:
        Nothing.
    """
    modes = {module: module.training for module in model.modules()}
    checkpointed = [module for module in modes if checkpointing and modes[module] and checkpoints_itself(module)]
    functions = {module: module.__dict__.get("_gradient_checkpointing_func") for module in checkpointed}
    try:
        for module in modes:
            module.training = False  # not eval(), which may do more: loralib's layers merge their weights in it
        for module in checkpointed:
            module.training = True
            module._gradient_checkpointing_func = _with_body_in_evaluation(module, functions[module])
        yield
    finally:
        for module, function in functions.items():
            module._gradient_checkpointing_func = function
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def connected_inputs(model: nn.Module) -> Iterator[None]:
    """Make the embedded inputs of a model with activation checkpointing require gradients.

    Reentrant checkpointing computes no gradients in a segment if none of its inputs requires one, which is the case
    while the weights are frozen.

    Args:
        model: A module.

    Yields:
        Nothing.
    """
    base = base_model(model)
    checkpointed = any(checkpoints_itself(module) for module in model.modules())
    embeddings = base.get_input_embeddings() if checkpointed and hasattr(base, "get_input_embeddings") else None
    if embeddings is None:
        yield
        return

    def connect(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, Tensor) and torch.is_grad_enabled() and not output.requires_grad:
            return output.detach().requires_grad_().clone()  # no leaf: the model may write into it
        return None

    handle = embeddings.register_forward_hook(connect)
    try:
        yield
    finally:
        handle.remove()


def checkpoints_itself(module: nn.Module) -> bool:
    """Check whether a module is a layer of transformers with activation checkpointing switched on.

    Args:
        module: Any module.

    Returns:
        ``True`` if the layer checkpoints its own forward pass.
    """
    by_name = any(base.__name__ == "GradientCheckpointingLayer" for base in type(module).__mro__)
    return by_name and module.__dict__.get("gradient_checkpointing", False)


# layers/reentrant.py recognises the inner function by its module: this one.
def _with_body_in_evaluation(module: nn.Module, checkpoint: Any) -> Any:
    def run(body: Any, *args: Any, **kwargs: Any) -> Any:
        def body_in_evaluation(*inner: Any, **named: Any) -> Any:
            module.training = False
            try:
                return body(*inner, **named)
            finally:
                module.training = True

        return checkpoint(body_in_evaluation, *args, **kwargs)

    return run
