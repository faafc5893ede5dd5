"""Batches as a ``DataLoader`` yields them: their size, their rows, their device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

Batch = Mapping[str, Any] | tuple[Any, ...]


def checked_batch(batch: Any, number: int) -> Batch:
    """Refuse what is no batch.

    Args:
        batch: What the iterable yielded.
        number: Its place in the iterable, for the message.

    Returns:
        The batch; a list becomes a tuple.

    Raises:
        TypeError: It is neither a mapping nor ``(inputs, labels)``.
        ValueError: It holds no example, or tensors of different numbers of rows.
    """
    if isinstance(batch, list):
        batch = tuple(batch)
    if not isinstance(batch, Mapping | tuple) or (isinstance(batch, tuple) and len(batch) != 2):
        raise TypeError(
            f"batch {number} is a {type(batch).__name__}: expected a mapping of keyword arguments for the model, "
            "or a pair (inputs, labels), as a DataLoader yields them."
        )
    rows = {name: tensor.shape[0] for name, tensor in _named_tensors(batch) if tensor.ndim and tensor.shape[0] != 1}
    for name, value in _named(batch):
        if not isinstance(value, Tensor) and any(isinstance(leaf, Tensor) for leaf in tree_leaves(value)):
            raise TypeError(
                f"batch {number} holds {name!r} as a {type(value).__name__} of tensors: whose rows they are cannot be "
                "told. Every entry must be a tensor with the example axis first, or hold no tensor."
            )
    if not any(tensor.ndim for _, tensor in _named_tensors(batch)):
        raise ValueError(
            f"batch {number} holds no tensor with an example axis: let the collator return tensors "
            "(return_tensors='pt')."
        )
    if len(set(rows.values())) > 1:
        raise ValueError(
            f"batch {number} does not say which rows belong to which example: the leading sizes of its tensors differ, "
            f"{rows}. Every tensor needs the example axis first, or a leading size of 1 to be shared."
        )
    if 0 in rows.values():
        raise ValueError(f"batch {number} holds no example (size 0). Drop empty batches before estimating.")
    return batch


def num_examples(batch: Batch) -> int:
    """Count the examples of a batch.

    Args:
        batch: A checked batch.

    Returns:
        ``N``.
    """
    return max(tensor.shape[0] for _, tensor in _named_tensors(batch) if tensor.ndim)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move every tensor of a batch, and cut it off from where it was computed.

    Args:
        batch: A batch.
        device: Where to.

    Returns:
        The moved batch.
    """
    return _mapped(batch, lambda tensor: tensor.detach().to(device, non_blocking=True))


def take(batch: Batch, rows: slice | list[int]) -> Batch:
    """Take some examples of a batch as they stand in it, padding included.

    Args:
        batch: A checked batch.
        rows: Which examples.

    Returns:
        A batch of these examples; tensors of leading size 1 are shared by all and stay.
    """
    N = num_examples(batch)
    return _mapped(batch, lambda tensor: tensor[rows] if tensor.ndim and tensor.shape[0] == N else tensor)


def _mapped(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    def each(value: Any) -> Any:
        return change(value) if isinstance(value, Tensor) else value

    if isinstance(batch, Mapping):
        return {name: each(value) for name, value in batch.items()}
    return tuple(each(value) for value in batch)


def _named(batch: Batch) -> list[tuple[str, Any]]:
    return list(batch.items() if isinstance(batch, Mapping) else zip(("inputs", "labels"), batch, strict=True))


def _named_tensors(batch: Batch) -> list[tuple[str, Tensor]]:
    return [(name, value) for name, value in _named(batch) if isinstance(value, Tensor)]
