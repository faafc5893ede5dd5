"""Operations that a plan takes as one step: what each takes of memory and FLOPs stands beside it, and it does not run.

A plan rehearses a pass on tensors without values (:func:`fishkern.plan`). An operation that works through many tiles
would cost it seconds for each call, and all tiles take what the first one takes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar

from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


class Step(NamedTuple):
    """What a call of an operation takes, from the shapes and dtypes of its arguments.

    Args:
        result: What the call returns, of the right shapes; its values do not matter.
        scratch: The most bytes that are alive at once during the call, without those of its arguments and result.
        flops: FLOPs of its matrix products.
    """

    result: Any
    scratch: int
    flops: int


def in_one_step(describe: Callable[P, Step]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a plan take an operation as one step.

    Tensors without values say whom to tell: their ``fake_mode`` has a function ``take`` then. The first tensor of a
    call is asked, since tensors with and without values do not mix; with values the operation runs.

    Args:
        describe: Takes the arguments of the operation, and describes what a call of it takes.

    Returns:
        What decorates the operation.
    """

    def decorate(operation: Callable[P, R]) -> Callable[P, R]:
        @wraps(operation)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            first = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            take = getattr(getattr(first, "fake_mode", None), "take", None)
            if take is None:
                return operation(*args, **kwargs)
            step = describe(*args, **kwargs)
            take(step)
            return step.result

        run.describe = describe
        return run

    return decorate


def copied(tensor: Tensor, dtype: Any, entries: int) -> int:
    """Bytes of a cast of some entries of a tensor; none where it has the dtype already.

    Args:
        tensor: Any.
        dtype: Of the cast.
        entries: How many.

    Returns:
        The bytes.
    """
    return 0 if tensor.dtype == dtype else entries * dtype.itemsize
