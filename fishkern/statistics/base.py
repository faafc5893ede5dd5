"""Estimators: recipes that add up gradients in a state of their own for each parameter."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fishkern.backend import Backend
from fishkern.layers import DenseGrads, LinearMap, PerExampleGrads
from fishkern.statistics.coverage import Covered
from fishkern.statistics.held import Held
from fishkern.statistics.predictive import Predictive
from fishkern.statistics.result import Statistics

Reads = Literal["squares", "examples", "positions", "factors", "factors or positions", "sums", "batches"]
Positions = Literal["attended", "labelled", "all"]
State = Any
"""A nest (tuples, lists, dicts) of tensors, each a sum over examples; or a single one. See :meth:`Estimator.init`."""

# Attributes of an earlier design, which :attr:`Estimator.reads` has replaced: without an error, a subclass that still
# defines one would be read otherwise than it means.
_REPLACED = {
    "adds_squares": "say reads = 'squares' where update_ asks for squares alone",
    "per_example": "say reads = 'sums' or 'batches' where the gradient of an objective as a whole will do",
}


@dataclass(frozen=True, eq=False)
class ParameterInfo:
    """The parameter that a state belongs to.

    Args:
        name: Its canonical name.
        value: The parameter; for a weight that a quantised linear stores in another form, the stored tensor.
        shape: Shape of its gradients: the parameter's, or ``[O, I]`` for a stored weight.
        dtype: The dtype of its sums: float64 for a float64 parameter, else float32.
        device: The device of its state.
        linear: For an estimator that reads factors: the linear map whose weight it is.
        kept: For the estimator: what it computes once of the parameter, such as a basis, by names of its own.
        folder: Where its sums are kept in files that are mapped into memory; ``None`` for memory itself.
    """

    name: str
    value: Tensor
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    linear: LinearMap | None = None
    kept: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None


@dataclass(frozen=True, eq=False)
class Constant:
    """An entry of a state that is not a sum, such as a basis: it is neither reduced over ranks nor set to zero.

    Args:
        value: Anything.
    """

    value: Any


class Estimator(ABC):
    """Recipe of a statistic.

    A pass over data calls :meth:`objectives` for each batch, back-propagates each of them, and passes the gradients of
    every parameter to :meth:`update_`, which adds them to the state that :meth:`init` made. An estimator of your own
    needs :attr:`definition` and :meth:`update_`; the defaults are those of a mean over examples at the data's labels.

    Attributes:
        reads: What :meth:`update_` reads of the gradients. ``"examples"``, the default of a subclass that defines
            ``update_``: anything, such as the whole gradient of each example (``grads.example(n)``). ``"squares"``:
            only their squares (``add_squares_``, ``add_group_squares_``), which may then arrive in parts (for a tied
            weight the head's before the embedding's) and may be below zero by rounding. ``"positions"``: the squares of
            each position's term (``add_position_squares_``). ``"factors"``: activations, output gradients and which
            positions count (:class:`fishkern.layers.OuterProductGrads`). A parameter without positions, or without
            factors, is refused by name. ``"factors or positions"``: factors of the weight of a linear map, which
            ``parameter.linear`` then is, and of every other parameter the squares of each position's term.
            ``"sums"``: one gradient of a weighted sum of the examples' losses, as ordinary autograd gives it.
            ``"batches"``: one gradient of the loss of a batch as a whole.
        positions: Where factors are read, which positions count (``grads.counted``, ``grads.num_terms()``): those that
            ``attention_mask`` marks (``"attended"``, the default), those whose output the loss is of (``"labelled"``),
            or ``"all"``.
        by_default: Which parameters ``parameters=None`` of ``estimate`` takes: all that require a gradient
            (``"trainable"``), or of these the weights of linear maps (``"linear"``), which have factors.
    """

    reads: ClassVar[Reads] = "examples"
    positions: Positions = "attended"
    by_default: ClassVar[Literal["trainable", "linear"]] = "trainable"

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        defined = vars(cls)
        for name, remedy in _REPLACED.items():
            if name in defined:
                raise TypeError(f"{cls.__name__}.{name} has been replaced: {remedy}.")
        if "update_" in defined:  # an inherited reads or of_gradient describes another update_
            if "reads" not in defined:
                cls.reads = "examples"
            if "of_gradient" not in defined:
                cls.of_gradient = Estimator.of_gradient

    @property
    def reads_factors(self) -> bool:
        """Whether factors are read, of all parameters or of those that have them."""
        return self.reads in ("factors", "factors or positions")

    @property
    def has_of_gradient(self) -> bool:
        """Whether :meth:`of_gradient` is defined."""
        return self.reads != "positions" and type(self).of_gradient is not Estimator.of_gradient

    @property
    @abstractmethod
    def definition(self) -> dict[str, Any]:
        """What is estimated, as plain values: statistics merge only if their definitions are equal."""

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that may differ between statistics that merge, as plain values."""
        return {}

    def passes(self, names: Sequence[str]) -> list[list[str]]:
        """Split the parameters into groups, for each of which there is a pass over all data, to bound the memory.

        Args:
            names: Canonical names of all requested parameters, in the model's order.

        Returns:
            Groups, by default one. The data must then be the same in every pass.
        """
        return [list(names)]

    def objectives(self, answer: Predictive | Tensor, examples: range) -> Iterator[Tensor | None]:
        """Give the values to back-propagate for a batch.

        Args:
            answer: The model's predictive distribution for the batch, or its losses ``[N]``.
            examples: Indices of the batch's examples in the whole data, so that random draws do not depend on batching.

        Yields:
            ``[N]``; entry ``n`` depends on example ``n`` alone, and the sum is back-propagated. ``None`` if there is
            nothing to back-propagate for these examples: the objectives of a part of a batch then have the same indices
            as those of the whole batch.
        """
        yield losses_of(answer)

    def units(self, num_examples: int) -> int:
        """Count the units in one batch; the result is a mean over units.

        Args:
            num_examples: ``N`` of the batch.

        Returns:
            The number of units.
        """
        return num_examples

    def init(self, parameter: ParameterInfo) -> State:
        """Make the state of one parameter.

        Args:
            parameter: Its name, value and shape.

        Returns:
            Zeros of any shapes, in a nest of any kind: tensors of ``parameter.dtype``, float64 or int64 on
            ``parameter.device``. Everything else in it is a :class:`Constant`. By default zeros of the parameter's
            shape.
        """
        return torch.zeros(parameter.shape, dtype=parameter.dtype, device=parameter.device)

    @abstractmethod
    def update_(
        self, state: State, grads: PerExampleGrads, parameter: ParameterInfo, backend: Backend | None = None
    ) -> None:
        """Add the gradients of one objective. States of different parts of the data are summed later.

        Args:
            state: Changed in place.
            grads: Gradients of the parameter, of all examples of a batch or of some of them: ``grads.example(n)`` for
                ``n`` below ``grads.num_examples``, or the sum of their squares by ``grads.add_squares_(state,
                backend)``. A gradient of zeros must add nothing, since none arrives where an example does not reach a
                parameter.
            parameter: The parameter.
            backend: Passed on to the operation.
        """

    def of_gradient(self, grad: Tensor, parameter: ParameterInfo) -> State:
        """Compute what the gradient of a single example adds to a state. Optional.

        The self-check compares with it, in the memory of one state and one gradient. Without it the check compares the
        squares of the gradients, some parameters at a time.

        Args:
            grad: Of ``parameter.shape``, in the model's dtype.
            parameter: The parameter.

        Returns:
            A nest like the state, with ``None`` for constants and for sums that are not a function of the gradient.

        Raises:
            NotImplementedError: The estimator does not define it.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what a single gradient adds.")

    def add_single_(self, state: State, grad: Tensor, parameter: ParameterInfo) -> None:
        """Add the whole gradient of a single example: the statistic's definition, which a loop compares with.

        Args:
            state: Changed in place.
            grad: Of the parameter's shape.
            parameter: The parameter.
        """
        if not self.has_of_gradient:
            self.update_(state, DenseGrads(grad[None]), parameter)
            return
        for total, added in zip(sums(state), added_to(state, self.of_gradient(grad, parameter)), strict=True):
            if added is None:
                raise NotImplementedError(f"{type(self).__name__} has sums that are not functions of a gradient.")
            total += added.to(total)

    def result(self, state: State, count: int) -> Tensor:
        """Turn a state into the statistic.

        Args:
            state: May be changed.
            count: Number of units.

        Returns:
            By default the mean over units, float32, of a state that is one tensor.
        """
        return state.div_(count).float()

    def collect(
        self,
        model: nn.Module,
        results: Mapping[str, Any],
        *,
        count: int,
        provenance: Mapping[str, Any],
        coverage: Mapping[str, Covered],
    ) -> Held:
        """Combine the results of all parameters into what ``estimate`` returns.

        Args:
            model: The model, without wrappers.
            results: Results of :meth:`result`, by parameter name.
            count: Number of units.
            provenance: Definition and run of the pass.
            coverage: How each parameter was computed.

        Returns:
            By default :class:`fishkern.Statistics` of the same names.
        """
        return Statistics(results, count=count, provenance=provenance, coverage=coverage)


def check_estimator(estimator: Any) -> None:
    """Refuse anything but an estimator.

    Args:
        estimator: The argument of the caller.

    Raises:
        TypeError: It is something else, such as a class or the name of one.
    """
    if isinstance(estimator, Estimator):
        return
    if isinstance(estimator, type) and issubclass(estimator, Estimator):
        name = estimator.__name__
        raise TypeError(f"estimator must be an Estimator, got the class {name}: call it, {name}().")
    if isinstance(estimator, str):
        raise TypeError(
            f"estimator must be an Estimator such as fishkern.DiagonalFisher(), got {estimator!r}: the labels are an "
            "argument of it, fishkern.DiagonalFisher('type-2')."
        )
    raise TypeError(f"estimator must be an Estimator such as fishkern.DiagonalFisher(), got {estimator!r:.80}.")


def sums(state: State) -> list[Tensor]:
    """List the tensors of a state, which are all sums.

    Args:
        state: Any nest.

    Returns:
        The tensors, in order, without constants.
    """
    return [leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor)]


def added_to(state: State, added: State) -> list[Tensor | None]:
    """List what a gradient adds to each of the sums in a state.

    Args:
        state: The state.
        added: From :meth:`Estimator.of_gradient`.

    Returns:
        In the order of :func:`sums`; ``None`` for sums that are not a function of the gradient.

    Raises:
        ValueError: The nests differ.
    """
    leaves, others = tree_leaves(state), tree_leaves(added)
    if len(leaves) != len(others):
        raise ValueError(
            f"of_gradient must give a nest like the state, of {len(leaves)} entries; it has {len(others)}."
        )
    return [other for leaf, other in zip(leaves, others, strict=True) if isinstance(leaf, Tensor)]


def losses_of(answer: Predictive | Tensor) -> Tensor:
    """Read the losses at the data's labels.

    Args:
        answer: A predictive distribution or the losses themselves.

    Returns:
        ``[N]``.
    """
    return answer if isinstance(answer, Tensor) else answer.losses()
