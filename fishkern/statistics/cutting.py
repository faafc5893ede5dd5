"""Run a model on a part of a batch: an error that the whole batch does not raise comes from the cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from fishkern.layers import UnsupportedModuleError
from fishkern.statistics.batches import Examples, another_reading

Value = TypeVar("Value")


def answering_parts(
    answer: Callable[..., Value], whole: Callable[[Examples], object] | None = None
) -> Callable[..., Value]:
    """Make errors that come from cutting a batch say so.

    Args:
        answer: Runs the model on examples; it may take more arguments.
        whole: Runs it on a whole batch; ``None`` if ``answer`` does.

    Returns:
        The same function. It raises a ValueError with the names of the cut entries if the model accepts a batch but not
        a part of it; an error of the whole batch is raised unchanged.
    """

    def answered(batch: Examples, *more: Any) -> Value:
        try:
            return answer(batch, *more)
        except UnsupportedModuleError:
            raise
        except Exception as error:  # any error of a model whose rows belong together
            if batch.cut_from is None or _takes(answer, batch):  # not of the cut, or not reproducible
                raise
            (whole or answer)(batch.cut_from)
            raise _refusal(batch, batch.cut_from, error) from error

    return answered


def _takes(answer: Callable[..., Value], batch: Examples) -> bool:
    try:
        answer(batch)
    except Exception:  # the caller raises the first error, not this one
        return False
    return True


def _refusal(part: Examples, whole: Examples, error: Exception) -> ValueError:
    cut, left = whole.names
    lone = "alone" if part.num_examples == 1 else f"to {part.places[-1]} without the others"
    says = next(iter(str(error).strip().splitlines()), "without a message")
    return ValueError(
        f"the model takes a batch of {whole.num_examples}, and fails on example {part.places[0]} {lone} "
        f"({type(error).__name__}: {says}). Cut by rows was {', '.join(cut)}; left whole was "
        f"{', '.join(left) or 'nothing'}. Name in shared= what all examples share, put the example axis first in what "
        f"belongs to one, or give batches of one.{another_reading(whole.content)}"
    )
