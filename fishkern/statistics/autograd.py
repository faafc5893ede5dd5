"""Steps of a backward pass: choose what requires a gradient, check the losses, collect the gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import Tensor, nn

from fishkern import hosts
from fishkern.ops.dtypes import accumulates_in

Value = TypeVar("Value")


@contextmanager
def only_trainable(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let only these parameters require a gradient; the caller has frozen all others.

    Args:
        parameters: The parameters; their ``grad`` is emptied before and after. A loss function that switches adapters
            off and on lets them require gradients, so that an earlier backward pass may have left some.

    Yields:
        Nothing.
    """
    parameters = list(parameters)
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
            parameter.grad = None
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None


def backward(loss: Tensor, *, retain_graph: bool = False) -> None:
    """Run backward, if the loss requires a gradient: it does not if, say, an expert got no tokens.

    Args:
        loss: A scalar.
        retain_graph: Keep the graph for another backward.
    """
    if loss.requires_grad:
        loss.backward(retain_graph=retain_graph)


def take_grad(parameter: nn.Parameter) -> Tensor | None:
    """Return the gradient of a parameter, and clear it.

    Args:
        parameter: A leaf after backward; its ``grad`` is empty afterwards.

    Returns:
        The gradient, dense, or ``None`` if none arrived; of a sharded parameter, the local shard.
    """
    grad, parameter.grad = parameter.grad, None
    if grad is None:
        return None
    return grad.to_dense() if grad.is_sparse else hosts.own_part(grad, parameter)


def check_finite(objective: Tensor, examples: range) -> None:
    """Refuse a loss that is NaN or infinite.

    Args:
        objective: ``[N]``.
        examples: Indices of the examples in the data.

    Raises:
        ValueError: One of the values is not finite.
    """
    bad = (~objective.detach().isfinite()).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"the loss of example {examples[bad[0]]} (row {bad[0]} of its batch) is {objective[bad[0]].item()}"
            f"{f', and {len(bad) - 1} more of the batch' if len(bad) > 1 else ''}: a row without a label, a fully "
            "masked row, or an overflow gives that. Drop such examples or correct their labels."
        )


def summed(objective: Tensor) -> Tensor:
    """Add up the losses of a batch, to compare the data of several passes.

    Args:
        objective: ``[N]``.

    Returns:
        The sum on the objective's device, float32 (float64 for a float64 objective). Nothing waits for it.
    """
    return objective.detach().sum(dtype=accumulates_in(objective.dtype))


def first(values: Iterator[Value | None]) -> tuple[int, Value]:
    """Find the first value that is not ``None``.

    Args:
        values: An iterator with at least one such value.

    Returns:
        Its index and the value.
    """
    return next((place, value) for place, value in enumerate(values) if value is not None)


def widest(objectives: Iterator[Tensor | None]) -> tuple[int, Tensor]:
    """Find the objective that says most about the paths of gradients: the last of those with most examples in it.

    At the first position of a text attention has one key to attend to, so that queries and keys get no gradient, and an
    example without a label at some position has none there.

    Args:
        objectives: An iterator with at least one that is not ``None``, ``[N]`` each.

    Returns:
        Its index and the objective.
    """
    best, most = None, -1
    for place, objective in enumerate(objectives):
        if objective is not None and (examples := int(objective.detach().count_nonzero())) >= most:
            best, most = (place, objective), examples
    return best


def with_last(values: Iterator[Value]) -> Iterator[tuple[Value, bool]]:
    """Mark the last of some values.

    Args:
        values: Any iterator.

    Yields:
        Each value, and whether it is the last.
    """
    for previous in values:
        for value in values:
            yield previous, False
            previous = value
        yield previous, True
