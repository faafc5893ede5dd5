"""A call of a model, whose arguments are assigned to examples as the entries of a batch are."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fishkern.statistics.batches import Examples, Reader
from fishkern.statistics.borders import document_numbers


@dataclass(frozen=True)
class ModelCall:
    """The arguments of a call of a model, assigned to examples.

    Args:
        examples: The arguments by name, cut into examples.
        positional: Names of those that are passed by position, in order.
    """

    examples: Examples
    positional: tuple[str, ...]

    @property
    def num_examples(self) -> int:
        """The number of examples, ``N``."""
        return self.examples.num_examples

    def few(self, device: torch.device) -> ModelCall:
        """Take the first two examples, or the only one.

        Args:
            device: Where the tensors are moved to.

        Returns:
            The smaller call.
        """
        return ModelCall(self.examples.take(0, min(2, self.num_examples)).to(device), self.positional)

    def run(self, model: nn.Module) -> Any:
        """Call a model with copies of the arguments.

        Args:
            model: The model.

        Returns:
            What it returns.
        """
        named = dict(self.examples.copied())
        args = [named.pop(name) for name in self.positional]
        return model(*args, **named)


def read_call(model: nn.Module, args: tuple, kwargs: Mapping[str, Any], reader: Reader, number: int) -> ModelCall:
    """Count the examples of a call of a model.

    Args:
        model: The model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        reader: Reads them as it reads the batches of a loader: ``N`` is that of ``input_ids``, ``labels`` or the first.
        number: Number of the call, for messages.

    Returns:
        The call.

    Raises:
        ValueError: Its rows are packed.
    """
    own = inspect.signature(model.forward).parameters.values()
    names = [one.name for one in own if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    positional = tuple(names[n] if n < len(names) else f"argument {n}" for n in range(len(args)))
    content = dict(zip(positional, args, strict=True)) | dict(kwargs)
    if document_numbers(content) is not None:
        raise ValueError(
            "this batch is packed: its rows hold several documents, and the loss of a training step does not say which "
            "share of it each has. Train with one example in each row, or estimate on the packed batches with "
            "fishkern.estimate, which takes documents for examples."
        )
    return ModelCall(reader(content, number), positional)


def read_batch(model: nn.Module, batch: Any, reader: Reader) -> ModelCall:
    """Read a batch of a loader as the call that a training step makes of it.

    Args:
        model: The model.
        batch: A mapping of keyword arguments, or a pair ``(inputs, labels)``, of which the model gets the inputs.
        reader: As for :func:`read_call`.

    Returns:
        The call.

    Raises:
        TypeError: It is neither.
    """
    if isinstance(batch, tuple | list) and len(batch) == 2:
        batch = batch[0]
    elif not isinstance(batch, Mapping):
        raise TypeError(
            f"batch must be a mapping of keyword arguments for the model or a pair (inputs, labels), as a DataLoader "
            f"yields them, got {type(batch).__name__}."
        )
    named = isinstance(batch, Mapping)
    return read_call(model, () if named else (batch,), dict(batch) if named else {}, reader, 0)
