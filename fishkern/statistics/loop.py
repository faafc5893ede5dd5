"""The batch-size-1 loop by ordinary autograd: a recipe applied to the whole gradients of single examples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from fishkern import hosts
from fishkern.ops.dtypes import accumulates_in
from fishkern.statistics.answering import Answering
from fishkern.statistics.autograd import backward, check_finite, take_grad, with_last
from fishkern.statistics.base import Estimator, ParameterInfo
from fishkern.statistics.batches import Batch, Examples
from fishkern.statistics.computed_dtypes import ComputedDtypes
from fishkern.statistics.diagonal_fisher import DiagonalFisher
from fishkern.statistics.drawn import Drawn, LossFunction
from fishkern.statistics.labels import UnknownLabelError
from fishkern.statistics.likelihood import Likelihood, recognise_likelihood, task_of
from fishkern.statistics.outputs import own_loss
from fishkern.statistics.predictive import Predictive
from fishkern.statistics.sharding import Sharding
from fishkern.statistics.states import States
from fishkern.statistics.undisturbed import Entered, undisturbed


class Loop:
    """Pass the gradients of single losses to a recipe as they arrive, with one gradient in memory at a time.

    Args:
        model: Without running wrappers; changed only inside :meth:`collecting`.
        parameters: The parameters to differentiate by, by canonical name.
        likelihood: As for :func:`fishkern.estimate`.
        estimator: A recipe of single examples.
        sharding: How FSDP2 shards the model; ``None`` where it does not. All ranks then run the same examples.
        in_parts: Whether tensor parallel splits the model. All processes then run the same examples, too.

    Attributes:
        likelihood: As given.
        estimator: The recipe.
        device: Where the model runs.
        arrived: Names of the parameters that a gradient has reached.
        precision: The dtypes that the model computes in.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        likelihood: Likelihood | LossFunction | Drawn | None,
        estimator: Estimator,
        sharding: Sharding | None = None,
        *,
        in_parts: bool = False,
    ) -> None:
        self._sharding = sharding
        # FSDP2's gradients, and some of transformers' plans, are complete after the backward pass
        self._afterwards = in_parts or sharding is not None
        self._model = model
        self._parameters = parameters
        self.likelihood = likelihood
        self.estimator = estimator
        self._answering: Answering | None = None
        self._entered: Entered | None = None
        self._totals: States | None = None
        self.device = hosts.runs_on(next(iter(parameters.values())))
        self.precision = ComputedDtypes(model)
        self.arrived: set[str] = set()

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Add hooks to the parameters, and leave the model as found at the end."""
        names = {parameter: name for name, parameter in self._parameters.items()}
        devices = [self.device] if self.device.type == "cuda" else []
        differentiating = nullcontext() if self._sharding is None else self._sharding.differentiating(self._parameters)
        with (
            torch.random.fork_rng(devices),
            differentiating,
            undisturbed(self._model, self._parameters.values(), checkpointing=False) as self._entered,
            self.precision.noting(),
        ):
            handles = []
            try:
                for parameter in names:
                    parameter.requires_grad_(True)
                    if self._afterwards:
                        continue
                    handles.append(parameter.register_post_accumulate_grad_hook(lambda p: self._add(names[p], p)))
                yield
            finally:
                for handle in handles:
                    handle.remove()

    def results(self, examples: int) -> dict[str, Tensor]:
        """Turn the states into statistics, and begin anew.

        Args:
            examples: How many examples were added.

        Returns:
            The statistic of each parameter, by name; zeros if no gradient arrived.
        """
        states, self._totals = self._states(), None
        units = examples * self.estimator.units(1)
        results = {name: self.estimator.result(states.pop(name), units) for name in self._parameters}
        return {name: hosts.joined(one, self._parameters[name]) for name, one in results.items()}

    def add_alone(self, row: Examples) -> None:
        """Add one example. For the empirical Fisher, use the loss that the model itself returns, if it returns one."""
        self._restore()
        try:
            answer = self._entered.connection.answered(lambda: self._answer_alone(row))
        except UnknownLabelError as error:
            raise error.at(f"example {row.places[0]}") from None
        self._add_objectives(answer, row.places)

    def add_in_batch(self, batch: Examples) -> None:
        """Add each example, its loss back-propagated through the whole batch."""
        self._restore()
        self._add_objectives(self._answer(batch), batch.places)

    def _add_objectives(self, answer: Predictive | Tensor, places: range) -> None:
        for objective, last in with_last(self.estimator.objectives(answer, places)):
            if objective is None:
                continue
            check_finite(objective, places)
            for n, value in enumerate(objective):
                backward(value, retain_graph=not last or n + 1 < len(objective))
                if self._afterwards:
                    for name, parameter in self._parameters.items():
                        self._add(name, parameter)

    def _answer_alone(self, row: Examples) -> Predictive | Tensor:
        losses = self._own_loss(row.copied())
        return self._answer(row) if losses is None else losses

    def _own_loss(self, row: Batch) -> Tensor | None:
        empirical = isinstance(self.estimator, DiagonalFisher) and self.estimator.fisher_type == "empirical"
        if self.likelihood is not None or not empirical:
            return None
        numbers = task_of(self._model, row) in ("regression", "multi-label")
        loss = own_loss(self._model, row, numbers=numbers)
        return None if loss is None else loss[None]

    def _answer(self, batch: Examples) -> Predictive | Tensor:
        if self._answering is None:  # settling a likelihood may run the model, which must be frozen by then
            content = batch.copied()
            likelihood = recognise_likelihood(self._model, content) if self.likelihood is None else self.likelihood
            if isinstance(likelihood, Likelihood):
                likelihood = likelihood.settled(self._model, content)
            self._answering = Answering(self._model, likelihood)
        return self._answering(batch)

    def _states(self) -> States:
        """Return the current states; they are made only when needed, to save memory."""
        if self._totals is None:
            infos = {
                name: ParameterInfo(
                    name, value, hosts.local_part(value).shape, accumulates_in(value.dtype), value.device
                )
                for name, value in self._parameters.items()
            }
            self._totals = States(infos, self.estimator)
        return self._totals

    def _restore(self) -> None:
        self._entered.restore()
        if self._sharding is not None:
            self._sharding.units.reshard()

    def _add(self, name: str, parameter: nn.Parameter) -> None:
        grad = take_grad(parameter)
        if grad is not None:  # torch also runs this hook for a gradient that the user's own backward left undefined
            self.arrived.add(name)
            self._states().add_single(name, grad)
