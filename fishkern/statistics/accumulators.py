"""Accumulators: where the squares of a pass over data are added up."""

from __future__ import annotations

import json
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

    Raises:
        ValueError: The estimator begins with something else than zeros of these kinds.
        TypeError: What it says of itself is not JSON.
    """

    def __init__(
        self,
        shapes: Mapping[str, torch.Size],
        devices: Mapping[str, torch.device],
        dtypes: Mapping[str, torch.dtype],
        estimator: Estimator,
        backend: Backend | None,
    ) -> None:
        _check_plain(estimator)
        self._estimator = estimator
        self._backend = backend
        self.states = {key: _begun(estimator, key, shape, dtypes[key], devices[key]) for key, shape in shapes.items()}

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

        def update(state: Tensor) -> None:
            returned = self._estimator.update_(state, grads, self._backend)
            if returned is not None and returned is not state:
                raise TypeError(
                    f"{type(self._estimator).__name__}.update_ must change the state in place, as by state += ..., and "
                    "return nothing; it returned another tensor."
                )

        self._add(key, grads.device, update)

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


def _check_plain(estimator: Estimator) -> None:
    """Demand before a pass what the header of a file can hold after it."""
    for name, values in (("definition", estimator.definition), ("settings", estimator.settings)):
        what = f"{type(estimator).__name__}.{name} must be a dict of plain values, for the header of a file"
        if not isinstance(values, Mapping):
            raise TypeError(f"{what}; got {type(values).__name__}.")
        try:
            json.dumps(dict(values), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise TypeError(f"{what}: {error}.") from None


def _begun(estimator: Estimator, key: str, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Make the accumulator of one parameter; where it is not the usual one, demand what a pass relies on."""
    state = estimator.init(shape, dtype, device)
    if type(estimator).init is Estimator.init:
        return state
    name = type(estimator).__name__
    if not isinstance(state, Tensor) or (state.shape, state.dtype, state.device.type) != (shape, dtype, device.type):
        found = f"{state.dtype}, {tuple(state.shape)}" if isinstance(state, Tensor) else type(state).__name__
        raise ValueError(
            f"{name}.init must give {dtype} of the parameter's shape, {tuple(shape)} for {key}, on {device}; got "
            f"{found}: accumulate every entry, and sum over axes or groups in what estimate returns."
        )
    if bool(state.any()):
        raise ValueError(f"{name}.init must give zeros, which parts of the data are added to; got others for {key}.")
    return state
