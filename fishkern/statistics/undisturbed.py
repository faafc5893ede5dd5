"""Run a model and leave it as found, also after an exception. Every pass and loop runs the model inside this."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from fishkern import hosts
from fishkern.layers import Connection, as_found, gradient_kept


@dataclass(frozen=True)
class Entered:
    """A model that is being run.

    Args:
        restore: Restores its buffers; called before each run, it makes every example see the same model.
        connection: Lets gradients reach segments under reentrant checkpointing.
    """

    restore: Callable[[], None]
    connection: Connection


@contextmanager
def undisturbed(
    model: nn.Module, parameters: Collection[nn.Parameter], *, checkpointing: bool = True
) -> Iterator[Entered]:
    """Freeze a model in evaluation mode, and restore everything that a pass changes.

    Compiled parts run eagerly meanwhile, because hooks that are added after a compiled run never fire.

    Args:
        model: Without running wrappers.
        parameters: The parameters that the caller differentiates by.
        checkpointing: Whether activation checkpointing stays on. Single examples do not need it.

    Yields:
        What the caller needs to run it.
    """
    with ExitStack() as stack:
        stack.enter_context(hosts.evaluation_mode(model, checkpointing=checkpointing))
        if checkpointing:
            stack.enter_context(hosts.connected_inputs(model))
        stack.enter_context(hosts.demanding_positions(model))
        stack.enter_context(gradient_kept(model))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.enable_grad())
        restore = stack.enter_context(as_found(model))
        yield Entered(restore, stack.enter_context(Connection(model, parameters)))
