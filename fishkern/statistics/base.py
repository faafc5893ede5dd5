"""What an estimator is: a recipe that turns gradients into one accumulated tensor for each parameter."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from fishkern.backend import Backend
from fishkern.layers import DenseGrads, PerExampleGrads
from fishkern.statistics.predictive import Predictive


class Estimator(ABC):
    """Recipe of a statistic.

    A pass over data asks for :meth:`objectives` of each batch, back-propagates each of them, and hands the gradients of
    every parameter to :meth:`update_`. One of your own needs :attr:`definition` and :meth:`update_`; the rest is that
    of a mean over examples at the data's labels.

    Attributes:
        adds_squares: Whether :meth:`update_` asks nothing of the gradients but to add their squares, which then may
            come in parts (of a tied weight the head's before the embedding's), and may miss zero by rounding. False for
            a class that defines ``update_`` and does not say.
    """

    adds_squares: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "update_" in vars(cls) and "adds_squares" not in vars(cls):  # what it inherits speaks of another update_
            cls.adds_squares = False

    @property
    def per_example(self) -> bool:
        """Whether the gradients of single examples are needed, or those of the objectives as a whole will do."""
        return True

    @property
    @abstractmethod
    def definition(self) -> dict[str, Any]:
        """What is estimated, as plain values: statistics merge only if these are equal."""

    @property
    def settings(self) -> dict[str, Any]:
        """What may differ between statistics that merge, as plain values."""
        return {}

    def objectives(self, answer: Predictive | Tensor, examples: range) -> Iterator[Tensor | None]:
        """Say what to back-propagate for a batch.

        Args:
            answer: The model's predictive distribution for the batch, or its losses ``[N]``.
            examples: Places of the batch's examples in the whole data, so that random draws do not depend on batching.

        Yields:
            ``[N]``; entry ``n`` depends on example ``n`` alone, and the sum is back-propagated. ``None`` where there is
            nothing to back-propagate for these examples, so that the places of the others are those of the whole batch.
        """
        yield losses_of(answer)

    def units(self, num_examples: int) -> int:
        """Count what one batch adds to the number that the result is a mean over.

        Args:
            num_examples: ``N`` of the batch.

        Returns:
            The number of units.
        """
        return num_examples

    def init(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Make the accumulator of one parameter.

        Args:
            shape: Shape of the parameter.
            dtype: float32 or float64.
            device: Where it lies.

        Returns:
            Zeros of this shape, dtype and device.
        """
        return torch.zeros(shape, dtype=dtype, device=device)

    @abstractmethod
    def update_(self, state: Tensor, grads: PerExampleGrads, backend: Backend | None = None) -> None:
        """Add the gradients of one objective; parts of the data may be added up elsewhere and be summed.

        Args:
            state: Accumulator, changed in place.
            grads: Gradients of the parameter: ``grads.example(n)`` for ``n`` below ``grads.num_examples``, or the sum
                of their squares by ``grads.add_squares_(state, backend)``. All examples of a batch, or some of them.
            backend: Passed on to the operation behind it.
        """

    def add_single_(self, state: Tensor, grad: Tensor) -> None:
        """Add the gradient of a single example, whole: the statistic's definition, for a loop to compare with.

        Args:
            state: Accumulator, changed in place.
            grad: Of the parameter's shape.
        """
        self.update_(state, DenseGrads(grad[None]))

    def result(self, state: Tensor, count: int) -> Tensor:
        """Turn an accumulator into the statistic.

        Args:
            state: Accumulator; may be changed.
            count: Number of units.

        Returns:
            The mean over units, float32.
        """
        return state.div_(count).float()


def losses_of(answer: Predictive | Tensor) -> Tensor:
    """Read the losses at the data's labels.

    Args:
        answer: A predictive distribution or the losses themselves.

    Returns:
        ``[N]``.
    """
    return answer if isinstance(answer, Tensor) else answer.losses()


def stream(*key: Any) -> torch.Generator:
    """Start the stream of random numbers that a key stands for, the same on every machine.

    Args:
        key: What the numbers belong to, such as a seed and an example's place in the data.

    Returns:
        The generator, on the CPU.
    """
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big", signed=True))


def uniform(seed: int, draw: int, examples: range, size: int) -> Tensor:
    """Draw numbers that belong to an example, whatever batch it comes in and whatever device it lies on.

    Args:
        seed: Seed of the estimator.
        draw: Which draw.
        examples: Places of the examples in the whole data.
        size: How many numbers for each example; a longer row of numbers begins with a shorter one.

    Returns:
        Uniform in [0, 1), ``[N, size]``, float64 on the CPU.
    """
    rows = []
    for example in examples:
        rows.append(torch.rand(size, generator=stream(seed, draw, example), dtype=torch.float64))
    return torch.stack(rows)
