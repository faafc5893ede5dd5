"""The order of the published code: readings of the training batch and decisions before the update of the same step."""

from __future__ import annotations

from typing import Any

from torch.utils.hooks import RemovableHandle

from fishkern.freezing.event import Freezing
from fishkern.freezing.freezer import Freezer
from fishkern.freezing.readings import is_zero
from fishkern.freezing.sources import Source
from fishkern.optim import MaskedOptimizer


class PublishedFreezer(Freezer):
    """Reads and decides as FisherAdapTune's own code does, inside ``optimizer.step()`` and before the update.

    With ``n`` updates done, it reads where ``n % read_every == 0``, ``n = 0`` included, and decides where
    ``n % every == 0``, but for ``n = 0``. There it freezes every slice of which the reading is zero everywhere, which
    are those of modules that the published code does not know. :meth:`step` returns the event of the update before it.

    Args:
        source: Gives the readings, of the last backward pass.
        optimizer: As for :class:`Freezer`.
        options: As for :class:`Freezer`.
    """

    def __init__(self, source: Source, optimizer: MaskedOptimizer, **options: Any) -> None:
        super().__init__(source, optimizer, **options)
        self._event_before_update: Freezing | None = None
        self._hook: RemovableHandle | None = self.optimizer.register_step_pre_hook(self._before_update)

    def step(self) -> Freezing | None:
        """Count a step of the optimizer.

        Returns:
            The event that came before the update of this step; else ``None``.
        """
        self.count += 1
        event, self._event_before_update = self._event_before_update, None
        return event

    def close(self) -> None:
        """Take the hooks off the model and the optimizer."""
        super().close()
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _before_update(self, optimizer: MaskedOptimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(value is not None for value in (*args[1:], *kwargs.values())):
            raise ValueError(
                "compat='reference' reads the gradients before step(), and a closure computes them inside: call "
                "backward() first, and step() without a closure."
            )
        if self.count == 0:
            self._event_before_update = self._stop_zeros()
        elif self.count % self.read_every == 0:
            self.read()
        if self.count and self.count % self.every == 0:
            self._event_before_update = self._decide()

    def _stop_zeros(self) -> Freezing:
        """Take the first reading, and freeze what is zero everywhere in it."""
        readings = self._readings(self._source.read())
        zeros = frozenset(key for key, reading in readings.items() if is_zero(reading))
        if zeros == readings.keys():
            raise ValueError(
                "every slice reads zero, so that compat='reference' would freeze all of them: it reads the modules "
                "Linear, Conv2d, BatchNorm2d and LayerNorm only."
            )
        self._follow(readings)
        event = self._event(zeros, dict.fromkeys(readings, 0.0), frozenset(readings.keys() - zeros))
        self._apply(event)
        return event
