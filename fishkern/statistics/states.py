"""The states of a pass over data: for each parameter, the sums of its estimator."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fishkern.backend import Backend
from fishkern.layers import OuterProductGrads, PerExampleGrads, UnsupportedModuleError, leave_out
from fishkern.statistics.base import Constant, Estimator, ParameterInfo, State, sums
from fishkern.statistics.shards import Ranks
from fishkern.statistics.staging import Staging
from fishkern.statistics.storage import in_file


class States:
    """One state for each parameter, on the parameter's device or another.

    Args:
        parameters: The parameters, by canonical name.
        estimator: Makes the states, and adds to them.
        backend: Passed on to the operations.

    Attributes:
        read_at_once: Whether autograd's gradient of a parameter may be read as soon as it arrives.
        deferring: Makes a context for what is computed during backward; an error in it may be raised by
            :meth:`complete` only.

    Raises:
        ValueError: An initial state is not all zeros, or has a dtype or device that it must not have.
        TypeError: The estimator's definition is not JSON, or a state contains something else than tensors.
    """

    read_at_once = True
    deferring: Callable[[], AbstractContextManager[Any]] = nullcontext

    def __init__(
        self, parameters: Mapping[str, ParameterInfo], estimator: Estimator, backend: Backend | None = None
    ) -> None:
        _check_plain(estimator)
        _check_signature(estimator)
        self._parameters = parameters
        self._estimator = estimator
        self._backend = backend
        self._staging: dict[torch.device, Staging] = {}
        self._states = {name: self._begin(parameter) for name, parameter in parameters.items()}

    def __getitem__(self, name: str) -> State:
        self._arrive()
        return self._states[name]

    def __contains__(self, name: str) -> bool:
        return name in self._states

    @property
    def names(self) -> list[str]:
        """Canonical names of the parameters that have a state, in order."""
        return list(self._states)

    def info(self, name: str) -> ParameterInfo:
        """Return the parameter that a state belongs to.

        Args:
            name: Its canonical name.

        Returns:
            Name, value, shape, dtype and device.
        """
        return self._parameters[name]

    def numel(self, name: str) -> int:
        """Count the entries of a state, of all ranks that hold parts of it together.

        Args:
            name: Canonical name of its parameter.

        Returns:
            The number of entries of a state that is one tensor.
        """
        return self._states[name].numel()

    def held(self, name: str, indices: Tensor) -> tuple[slice | Tensor, Tensor]:
        """Find entries of a state that is one tensor.

        Args:
            name: Canonical name of its parameter.
            indices: Flat indices in the whole state, ascending.

        Returns:
            Which of them are in this process, and their flat indices in its state, on the device of that.
        """
        return slice(0, len(indices)), indices.to(self._states[name].device)

    def of_the_same_kind(self, estimator: Estimator, names: Collection[str]) -> States:
        """Make new states for some of these parameters.

        Args:
            estimator: The same estimator, or another one.
            names: Canonical names of the parameters.

        Returns:
            The new states.
        """
        return States({name: self._parameters[name] for name in names}, estimator, self._backend)

    def like(self, name: str, device: torch.device) -> State:
        """Make a state of zeros beside that of a parameter, with the same constants.

        Args:
            name: Canonical name of the parameter.
            device: Where it is.

        Returns:
            The new state.
        """
        return tree_map(
            lambda leaf: torch.zeros_like(leaf, device=device) if isinstance(leaf, Tensor) else leaf, self._states[name]
        )

    def add(self, name: str, grads: PerExampleGrads, to: State | None = None) -> None:
        """Add gradients of one parameter.

        Args:
            name: Its canonical name.
            grads: Its gradients.
            to: A state beside its own, on the device of the gradients; ``None`` for its own.

        Raises:
            UnsupportedModuleError: The estimator reads factors of this parameter, and these gradients have none.
        """
        parameter = self._parameters[name]
        reads_factors = self._estimator.reads_factors and parameter.linear is not None
        if reads_factors and not isinstance(grads, OuterProductGrads):
            raise UnsupportedModuleError(without_factors([name]))

        def update(state: State) -> None:
            returned = self._estimator.update_(state, grads, parameter, self._backend)
            if returned is not None and returned is not state:
                raise TypeError(
                    f"{type(self._estimator).__name__}.update_ must change the state in place, as by state += ..., and "
                    "return nothing; it returned another object."
                )

        if to is None:
            self._add(name, grads.device, update)
        else:
            update(to)

    def add_single(self, name: str, grad: Tensor) -> None:
        """Add the whole gradient of a single example.

        Args:
            name: Canonical name of its parameter.
            grad: Of the parameter's shape.
        """
        parameter = self._parameters[name]
        self._add(name, grad.device, lambda state: self._estimator.add_single_(state, grad, parameter))

    def gradient(self, name: str, grad: Tensor) -> Tensor:
        """Give the part of a gradient of autograd that the state is a function of.

        Args:
            name: Canonical name of its parameter.
            grad: The gradient, of a sharded parameter this rank's part.

        Returns:
            The same one.
        """
        return grad

    def complete(self) -> None:
        """End a backward pass: what was added is in the states from here on."""
        self._arrive()

    def largest(self, values: Tensor) -> float:
        """Find the largest magnitude of something of a state's shape, without a tensor of magnitudes.

        Args:
            values: Any tensor.

        Returns:
            The magnitude; 0 where there are no entries.
        """
        if not values.numel():
            return 0.0
        low, high = values.aminmax()
        return torch.maximum(-low, high).item()

    def result(self, name: str, ranks: Ranks, count: int) -> Any:
        """Remove a state, and turn its sum over all ranks into the statistic.

        Args:
            name: Canonical name of its parameter.
            ranks: All ranks.
            count: Number of units of all ranks together.

        Returns:
            What the estimator gives.
        """
        state = self.pop(name)
        for total in sums(state):
            ranks.sum_(total)
        return self._estimator.result(state, count)

    def zero_(self) -> None:
        """Set every sum to zero."""
        self._arrive()
        for state in self._states.values():
            for total in sums(state):
                total.zero_()

    def pop(self, name: str) -> State:
        """Remove a state and what the estimator kept of its parameter, and return the state.

        Args:
            name: Canonical name of its parameter.

        Returns:
            The state.
        """
        self._arrive()
        self._parameters[name].kept.clear()
        return self._states.pop(name)

    def _arrive(self) -> None:
        """Wait for what is on its way from other devices."""
        for staging in self._staging.values():
            staging.drain()

    def _begin(self, parameter: ParameterInfo) -> State:
        """Make the state of one parameter, where it is kept."""
        state = _begun(self._estimator, parameter)
        if (folder := parameter.folder) is None:
            return state
        return tree_map(lambda leaf: in_file(folder, leaf) if isinstance(leaf, Tensor) else leaf, state)

    def _add(self, name: str, device: torch.device, update: Callable[[State], None]) -> None:
        """Add on the gradients' device; a state on another device then gets the sum of this call."""
        state = self._states[name]
        # most states are one tensor, and the walk through a nest takes time
        devices = {state.device} if isinstance(state, Tensor) else {total.device for total in sums(state)}
        if devices == {device}:
            update(state)
            return
        # one transfer of a sum, instead of one for each example's factors
        here = self.like(name, device)
        update(here)
        for total, added in zip(sums(state), sums(here), strict=True):
            if total.device.type == "cpu":
                self._staging.setdefault(device, Staging(device)).send(added, total)
            else:
                total += added.to(total.device)


def without_factors(names: Collection[str]) -> str:
    """Say that an estimator reads factors, which some parameters do not have.

    Args:
        names: Their canonical names.

    Returns:
        A message.
    """
    return (
        "the estimator reads activations and output gradients, which only the weights of linear maps have (not biases, "
        f"norms, embeddings, weights that an embedding shares, or slow paths): {sorted(names)}. {leave_out(names)}"
    )


def _check_plain(estimator: Estimator) -> None:
    """Check before a pass that the header of a file can describe its result."""
    for name, values in (("definition", estimator.definition), ("settings", estimator.settings)):
        what = f"{type(estimator).__name__}.{name} must be a dict of plain values, for the header of a file"
        if not isinstance(values, Mapping):
            raise TypeError(f"{what}; got {type(values).__name__}.")
        try:
            json.dumps(dict(values), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise TypeError(f"{what}: {error}.") from None


def _check_signature(estimator: Estimator) -> None:
    try:
        inspect.signature(estimator.update_).bind(None, None, None, None)
    except TypeError:
        raise TypeError(
            f"{type(estimator).__name__}.update_ must take (state, grads, parameter, backend=None), of which parameter "
            f"says name, value and shape; it takes {inspect.signature(estimator.update_)}."
        ) from None


def _begun(estimator: Estimator, parameter: ParameterInfo) -> State:
    """Make the state of one parameter; if the estimator defines ``init``, check what a pass relies on."""
    state = estimator.init(parameter)
    if type(estimator).init is Estimator.init:
        return state
    what = f"{type(estimator).__name__}.init must give zeros"
    for leaf in tree_leaves(state):
        if isinstance(leaf, Constant):
            continue
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"{what} that are tensors, to which parts of the data are added; got {type(leaf).__name__} for "
                f"{parameter.name}: wrap something that is no sum in Constant."
            )
        dtypes = {parameter.dtype, torch.float64, torch.int64}
        if leaf.dtype not in dtypes or leaf.device.type != parameter.device.type:
            raise ValueError(
                f"{what} of {' or '.join(sorted(map(str, dtypes)))} on {parameter.device}; got {leaf.dtype} on "
                f"{leaf.device} for {parameter.name}."
            )
        if bool(leaf.any()):
            raise ValueError(f"{what}, to which parts of the data are added; got others for {parameter.name}.")
    return state
