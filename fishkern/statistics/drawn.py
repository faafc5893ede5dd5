"""Losses that draw random numbers (diffusion, variational autoencoders): each example has its own stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fishkern.arguments import integer
from fishkern.statistics.batches import Batch, Examples
from fishkern.statistics.streams import stream
from fishkern.statistics.token_losses import TokenLosses

LossFunction = Callable[[nn.Module, Batch], Tensor]


class Draws:
    """Random numbers for the examples of a batch, each from the example's own stream.

    A stream depends on the seed and on the example's index in the data, not on the batch or the device. Each call
    continues it.

    Args:
        seed: Seed of all streams.
        places: Indices of the examples in the whole data.
        device: Device of the numbers.
    """

    def __init__(self, seed: int, places: range, device: torch.device) -> None:
        self._streams = [stream("loss", seed, place) for place in places]
        self._device = device

    def randn(self, *shape: int) -> Tensor:
        """Draw normal numbers.

        Args:
            shape: For each example.

        Returns:
            ``[N, *shape]``, float32.
        """
        return self._stacked(lambda generator: torch.randn(shape, generator=generator, dtype=torch.float32))

    def rand(self, *shape: int) -> Tensor:
        """Draw uniform numbers in [0, 1).

        Args:
            shape: For each example.

        Returns:
            ``[N, *shape]``, float32.
        """
        return self._stacked(lambda generator: torch.rand(shape, generator=generator, dtype=torch.float32))

    def randint(self, high: int, *shape: int) -> Tensor:
        """Draw integers from 0 to ``high - 1``, such as time steps.

        Args:
            high: One more than the largest integer.
            shape: For each example.

        Returns:
            ``[N, *shape]``, int64.
        """
        return self._stacked(lambda generator: torch.randint(high, shape, generator=generator))

    def _stacked(self, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        return torch.stack([draw(generator) for generator in self._streams]).to(self._device)


@dataclass(frozen=True)
class Drawn:
    """A loss function that draws random numbers, one stream for each example.

    The statistic is that of one draw for each example; for several, estimate with several seeds and merge.

    Args:
        function: ``(model, batch, draws) -> losses [N]``; all randomness comes from ``draws``, see :class:`Draws`.
        seed: Seed of the draws.

    Raises:
        TypeError: ``function`` is not callable, or ``seed`` is not an integer.
    """

    function: Callable[[nn.Module, Batch, Draws], Tensor]
    seed: int = 0

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TypeError(f"function must be (model, batch, draws) -> losses [N], got {self.function!r}.")
        object.__setattr__(self, "seed", integer(self.seed, "seed"))

    def __call__(self, model: nn.Module, batch: Examples) -> Tensor:
        """Compute the losses of a batch.

        Args:
            model: The model.
            batch: The examples.

        Returns:
            ``[N]``.
        """
        device = next(model.parameters()).device
        return self.function(model, batch.copied(), Draws(self.seed, batch.places, device))


def losses_by_function(function: LossFunction | Drawn | TokenLosses, model: nn.Module, batch: Examples) -> Any:
    """Call a loss function.

    Args:
        function: ``(model, batch) -> losses [N]``, one that draws, or one of tokens.
        model: The model.
        batch: The examples.

    Returns:
        The function's result, unchecked.
    """
    return function(model, batch if isinstance(function, Drawn | TokenLosses) else batch.copied())
