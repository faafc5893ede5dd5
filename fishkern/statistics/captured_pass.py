"""The pass of most estimators: each example's gradients, captured in one forward and one backward of the batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping

from torch import Tensor, nn

from fishkern.layers import (
    DenseGrads,
    PerExampleGrads,
    Plan,
    Strays,
    capture_of,
    is_wrapped,
    without_gradient,
)
from fishkern.statistics.autograd import backward, check_finite, only_trainable, summed, take_grad, with_last
from fishkern.statistics.base import Estimator
from fishkern.statistics.batches import Examples
from fishkern.statistics.planning import Answer, Planner
from fishkern.statistics.predictive import Predictive
from fishkern.statistics.states import States

Objectives = Mapping[str, Collection[int]]
"""For each parameter, the numbers of some objectives of a batch, counted from 0."""


class CapturedPass:
    """Capture by a plan, and loop over the examples for parameters that no rule and no module can compute.

    Args:
        parameters: The parameters to differentiate by, by canonical name.
        answer: Runs the model on a batch.
        estimator: The recipe.
        states: The states that it adds to.
        planner: Plans the batches.

    Attributes:
        connected: Whether a loss depends on these parameters.
        loss: Sum of the losses of all captured examples.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        answer: Answer,
        estimator: Estimator,
        states: States,
        planner: Planner,
    ) -> None:
        self._parameters = parameters
        self._answer = answer
        self._estimator = estimator
        self._states = states
        self._planner = planner
        self.connected = False
        self.loss: Tensor | float = 0.0

    @property
    def paths(self) -> Mapping[str, tuple[str, str]]:
        """Path and reason for each parameter."""
        return self._planner.paths

    @property
    def learned(self) -> Hashable:
        """What changes when a batch shows something on which later ones depend."""
        return self._planner.learned

    def prepare(self, batch: Examples) -> None:
        """Do what comes before the first batch.

        Args:
            batch: A batch, of which nothing is added.
        """
        self._planner.plan_for(batch)

    def run(self, batch: Examples) -> None:
        """Add one batch.

        Args:
            batch: The batch.
        """
        planner = self._planner
        plan = planner.plan_for(batch)
        planner.begun = True
        if (added := planner.take_added()) is not None:
            self.loss, self.connected = self.loss + added.loss, self.connected | added.connected
            if added.examples == batch.num_examples:
                return
            batch = batch.take(added.examples, batch.num_examples)
        withheld = self._capture(plan, batch)
        if withheld:  # a gradient arrived where the survey saw none, or its rows are unknown: survey this batch
            planner.forget()
            withheld = self._capture(planner.plan_for(batch).only(withheld), batch, only=withheld)
        if withheld:
            planner.refuse_stored(withheld)
            self._loop(batch, withheld, only=withheld)
            planner.note_looped(withheld, batch)

    def _capture(self, plan: Plan, batch: Examples, only: Objectives | None = None) -> dict[str, set[int]]:
        """Add one batch by a plan.

        Args:
            plan: The plan.
            batch: The batch.
            only: The objectives to add for each parameter; ``None`` for all.

        Returns:
            The parameters whose gradients were held back, with the objectives that are still to be added.
        """
        strays = Strays(plan.sites, plan.idle)
        number = 0  # of the objective that is being back-propagated; the loop below moves it on for add

        def add(key: str, grads: PerExampleGrads) -> None:
            if key not in strays.reasons and (only is None or number in only[key]):
                self._states.add(key, grads)

        looped = {key: self._parameters[key] for key in plan.loop}
        withheld: dict[str, set[int]] = defaultdict(set)
        reached = set(looped)
        if plan.sites:
            parts = {
                "squares": self._estimator.reads == "squares",
                "factors": self._estimator.reads_factors,
                "deferring": self._states.deferring,
            }
            capturing = capture_of(plan.sites, add, batch.documents, **parts)
            with only_trainable(looped.values()), capturing as capture:
                with capture.forward(batch.num_examples, self._planner.counted(batch)), strays.watched():
                    answer = self._answer(batch, capture)
                for number, (objective, last) in enumerate(self._noted(answer, batch)):
                    if objective is None:
                        continue
                    self.loss = self.loss + summed(objective)  # read once, at the end
                    capture.backward(objective, retain_graph=not last)
                    self._states.complete()
                    for key in capture.withheld - strays.reasons.keys():
                        if only is None or number in only[key]:
                            withheld[key].add(number)
                    self._planner.distrusted |= capture.distrusted
                # The looped parameters require a gradient in this pass as well: one that gets none is reached by no
                # example of the batch, and needs no loop.
                with_grad = {key for key, parameter in looped.items() if parameter.grad is not None}
                reached = with_grad | strays.reasons.keys()
        if strays.reasons:
            self._planner.note_strays(strays.reasons)
        if reached:
            self._loop(batch, reached, only)
        return withheld

    def _loop(self, batch: Examples, keys: Iterable[str], only: Objectives | None) -> None:
        """Run each example alone, by ordinary autograd, for some parameters and all or some of the objectives."""
        self._planner.refuse_whole(keys)
        parameters = {key: self._parameters[key] for key in keys}
        with only_trainable(parameters.values()):
            for one in batch.singly():
                objectives = self._estimator.objectives(self._answer(one), one.places)
                for number, (objective, last) in enumerate(with_last(objectives)):
                    if objective is None:
                        continue
                    self._note(objective, one)
                    backward(objective.sum(), retain_graph=not last)
                    for key, parameter in parameters.items():
                        grad = take_grad(parameter)
                        if grad is None and is_wrapped(parameter):
                            raise without_gradient(key, parameter)
                        if grad is not None and (only is None or number in only[key]):
                            self._states.add(key, DenseGrads(grad[None]))

    def _noted(self, answer: Predictive | Tensor, batch: Examples) -> Iterator[tuple[Tensor | None, bool]]:
        """Give the objectives of a batch, checked, and whether each is the last."""
        for objective, last in with_last(self._estimator.objectives(answer, batch.places)):
            if objective is not None:
                self._note(objective, batch)
            yield objective, last

    def _note(self, objective: Tensor, batch: Examples) -> None:
        check_finite(objective, batch.places)
        self.connected |= objective.requires_grad
