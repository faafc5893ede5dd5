"""Accumulators: where the squares of a pass over data are added up."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fishkern.backend import Backend
from fishkern.layers import PerExampleGrads
from fishkern.statistics.base import Estimator

_KINDS = ("shape", "device", "dtype")


class Accumulators:
    """One accumulator for each parameter, on the parameter's device or another.

    Args:
        shapes: Shape of each parameter's statistic, by canonical name.
        devices: Where each accumulator lies.
        dtypes: float64 for float64 parameters, else float32.
        estimator: Says what is added.
        backend: Passed on to the operations.

    Attributes:
        states: The accumulators, by canonical name.
    """

    def __init__(
        self,
        shapes: Mapping[str, torch.Size],
        devices: Mapping[str, torch.device],
        dtypes: Mapping[str, torch.dtype],
        estimator: Estimator,
        backend: Backend | None,
    ) -> None:
        self._estimator = estimator
        self._backend = backend
        self.states = {key: estimator.init(shape, dtypes[key], devices[key]) for key, shape in shapes.items()}

    def empty_like(self) -> Accumulators:
        """Make accumulators of the same kind that hold nothing.

        Returns:
            The new accumulators.
        """
        kinds = [{key: getattr(state, kind) for key, state in self.states.items()} for kind in _KINDS]
        return Accumulators(*kinds, self._estimator, self._backend)

    def add(self, key: str, grads: PerExampleGrads) -> None:
        """Add the gradients of one parameter.

        Args:
            key: Its canonical name.
            grads: Its gradients.
        """
        self._add(key, grads.device, lambda state: self._estimator.update_(state, grads, self._backend))

    def add_squares(self, key: str, grads: PerExampleGrads) -> None:
        """Add the squares of one parameter's per-example gradients, whatever the estimator.

        Args:
            key: Its canonical name.
            grads: Its gradients.
        """
        self._add(key, grads.device, lambda state: grads.add_squares_(state, self._backend))

    def _add(self, key: str, device: torch.device, update: Callable[[Tensor], None]) -> None:
        state = self.states[key]
        if state.device == device:
            update(state)
            return
        here = torch.zeros_like(state, device=device)
        update(here)
        state += here.to(state.device)

    def zero_(self) -> None:
        """Set every accumulator to zero."""
        for state in self.states.values():
            state.zero_()
