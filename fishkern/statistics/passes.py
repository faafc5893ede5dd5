"""The two ways through a batch: capturing each example's gradients, or taking the objective's gradient as a whole."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import islice

import torch
from torch import Tensor, nn

from fishkern.layers import (
    Capture,
    Connection,
    DenseGrads,
    PerExampleGrads,
    Plan,
    Strays,
    UnsupportedModuleError,
    is_wrapped,
    leave_out,
    stored_weights,
    survey,
    without_gradient,
)
from fishkern.statistics.accumulators import Accumulators
from fishkern.statistics.autograd import backward, check_finite, first, only_trainable, take_grad, with_last
from fishkern.statistics.base import Estimator
from fishkern.statistics.batches import Examples
from fishkern.statistics.coverage import slowest_paths
from fishkern.statistics.independence import Independence
from fishkern.statistics.predictive import Predictive
from fishkern.statistics.self_check import disagreements

Answer = Callable[[Examples], Predictive | Tensor]


class GradientPass:
    """Ordinary autograd: the gradient of each objective as a whole, squared.

    Args:
        parameters: What to differentiate by, by canonical name.
        answer: Runs the model on a batch.
        estimator: The recipe.
        accumulators: Where the squares go.
        path: Name of this path in the coverage.
        independence: Whether the loss of an example is its own; ``None`` where no example is asked for.
        connection: Lets segments under reentrant checkpointing be reached.

    Attributes:
        paths: Path and reason for each parameter.
        connected: Whether a loss depends on what is differentiated by.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        answer: Answer,
        estimator: Estimator,
        accumulators: Accumulators,
        path: str,
        independence: Independence | None,
        connection: Connection,
    ) -> None:
        self._parameters = parameters
        self._answer = answer
        self._estimator = estimator
        self._accumulators = accumulators
        self._independence = independence
        self.paths = dict.fromkeys(parameters, (path, ""))
        self.connected = False
        self._connection = connection

    def run(self, batch: Examples) -> None:
        """Add one batch.

        Args:
            batch: The batch.

        Raises:
            UnsupportedModuleError: A parameter is of a tensor subclass to which autograd gives no gradient.
        """  # noqa: DOC501
        with only_trainable(self._parameters.values()):
            if self._independence is not None and self._independence.pending and batch.num_examples > 1:
                two = batch.take(0, 2)
                with self._independence.precision.noting():
                    self._independence.note_beside(self._answer(two))
                self._independence.settle(two)
            answer = self._connection.answered(lambda: self._answer(batch))
            for objective, last in with_last(self._estimator.objectives(answer, batch.places)):
                check_finite(objective, batch.places)
                self.connected |= objective.requires_grad
                backward(objective.sum(), retain_graph=not last)
                for key, parameter in self._parameters.items():
                    if (grad := take_grad(parameter)) is not None:
                        self._accumulators.add(key, DenseGrads(grad[None]))
                    elif is_wrapped(parameter):
                        raise without_gradient(key, parameter)


class PerExamplePass:
    """Capture: one forward and one backward for a batch, the squares of each example's gradient taken on the way.

    Args:
        model: In evaluation mode.
        parameters: What to differentiate by, by canonical name; the stored weights of quantised linears included.
        answer: Runs the model on a batch.
        estimator: The recipe.
        accumulators: Where the squares go.
        check: Compare with ordinary autograd on two examples before the first batch.
        independence: Whether the loss of an example is its own.
        connection: Lets segments under reentrant checkpointing be reached.

    Attributes:
        paths: Path and reason for each parameter.
        connected: Whether a loss depends on what is differentiated by.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        answer: Answer,
        estimator: Estimator,
        accumulators: Accumulators,
        check: bool,
        independence: Independence,
        connection: Connection,
    ) -> None:
        self._model = model
        self._parameters = parameters
        self._answer = answer
        self._estimator = estimator
        self._accumulators = accumulators
        self._check = check
        self._independence = independence
        self._plans: dict[bool, Plan] = {}  # for batches of one, and for all batches
        self._connection = connection
        self._begun = False
        self._distrusted: set[str] = set()
        self._strayed: dict[str, str] = {}
        self._announced: set[str] = set()
        self.paths: dict[str, tuple[str, str]] = {}
        self.connected = False
        stored = stored_weights(model)
        self._stored = {key for key in parameters.keys() & stored.keys() if not is_wrapped(parameters[key])}

    def run(self, batch: Examples) -> None:
        """Add one batch.

        Args:
            batch: The batch.
        """
        plan = self._plan_for(batch)
        self._begun = True
        add = self._accumulators.add
        withheld = self._captured(plan, batch, add)
        if withheld:  # a gradient has shown up where there was none: look again
            self._plans.clear()
            plan = self._plan_for(batch)
            withheld = self._captured(plan.only(withheld), batch, add, wanted=withheld)
        if withheld:
            self._refuse_stored(withheld)
            self._looped(withheld, batch, add)
            where = f"on examples {batch.places[0]} to {batch.places[-1]}, where its rows could not yet be told apart"
            self._note_paths(dict.fromkeys(withheld, ("loop", where)))
            self._plans.clear()

    def _plan_for(self, batch: Examples) -> Plan:
        """Take the plan that serves a batch: what two examples have shown serves one as well, not the other way."""
        lone = batch.num_examples == 1 and False not in self._plans
        if lone not in self._plans:
            self._plans[lone] = self._make_plan(batch.take(0, min(2, batch.num_examples)))
        return self._plans[lone]

    def _make_plan(self, few: Examples) -> Plan:
        """Survey two examples, or the one of a batch of one."""
        compared = few.num_examples > 1 and self._independence.pending

        def losses() -> Tensor:
            nonlocal place
            answer = self._answer(few)
            place, objective = first(self._estimator.objectives(answer, few.places))
            check_finite(objective, few.places)
            if compared:
                self._independence.note_beside(answer)
            return objective

        place = 0

        keys = {parameter: key for key, parameter in self._parameters.items()}
        with self._independence.precision.noting():
            plan = survey(self._model, keys, losses, self._distrusted, self._connection.answered, few.num_examples)
        self._refuse_stored(key for key, (path, _) in plan.paths.items() if path != "fused")
        found = self._disagreements(plan, few, place) if self._check else {}
        if compared:
            with only_trainable(self._reached().values()):
                self._independence.settle(few)
        plan = plan.with_loop({**found, **self._strayed})
        self._announce(plan)
        return plan

    def _disagreements(self, plan: Plan, few: Examples, place: int) -> dict[str, str]:
        """Find what disagrees with ordinary autograd, judged by the objective at ``place``."""

        def objective(batch: Examples) -> Tensor:
            answer = self._answer(batch)
            if batch.num_examples < few.num_examples and self._independence.pending:
                self._independence.note_alone(answer)
            objective = next(islice(self._estimator.objectives(answer, batch.places), place, None))
            return torch.zeros(batch.num_examples) if objective is None else objective

        squares = self._accumulators.empty_like() if self._begun else self._accumulators
        try:
            withheld = self._captured(plan, few, squares.add_squares, only_first=True)
            parameters = {
                key: parameter
                for key, parameter in self._reached().items()
                if key not in withheld and key not in plan.loop
            }
            half = self._independence.precision.half
            return disagreements(parameters, squares.states, objective, few, kept=plan.reused, half=half)
        finally:
            squares.zero_()

    def _reached(self) -> dict[str, nn.Parameter]:
        """List what autograd reaches: all but the stored weights of quantised linears."""
        return {key: parameter for key, parameter in self._parameters.items() if key not in self._stored}

    def _note_strays(self, strays: Mapping[str, str]) -> None:
        """Send parameters whose module is called from outside of its host through the loop, from this batch on."""
        self._refuse_stored(strays)
        self._strayed |= strays
        self._plans = {lone: plan.with_loop(strays) for lone, plan in self._plans.items()}
        self._announce(Plan((), strays))

    def _note_paths(self, paths: Mapping[str, tuple[str, str]]) -> None:
        """Keep the slowest path that each parameter has taken."""
        self.paths = slowest_paths([self.paths, paths])

    def _refuse_stored(self, keys: Iterable[str]) -> None:
        if lost := sorted(self._stored.intersection(keys)):
            raise UnsupportedModuleError(
                "autograd gives stored weights no gradient, and these quantised linears do not compute x W^T + b, or "
                f"their rows cannot be told apart by example: {lost}. {leave_out(lost, by_autograd=False)}"
            )

    def _refuse_positions(self, keys: Iterable[str]) -> None:
        if self._estimator.definition.get("unit") == "position" and (without := sorted(keys)):
            raise UnsupportedModuleError(
                f"unit='position' needs a rule for positions, and there is none for {without}. {leave_out(without)}"
            )

    def _announce(self, plan: Plan) -> None:
        self._note_paths(plan.paths)
        slow = {key: reason for key, (path, reason) in plan.paths.items() if path == "loop"}
        self._refuse_positions(key for key, (path, _) in plan.paths.items() if path != "fused")
        new = slow.keys() - self._announced
        self._announced |= new
        if new:
            shown = "; ".join(f"{key}: {slow[key]}" for key in sorted(new)[:8])
            more = f" and {len(new) - 8} more" if len(new) > 8 else ""
            warnings.warn(
                f"{len(new)} parameter(s) take the slow exact path, one pass over the model for each example: "
                f"{shown}{more}.",
                stacklevel=6,
            )

    def _captured(
        self,
        plan: Plan,
        batch: Examples,
        add: Callable[[str, PerExampleGrads], None],
        only_first: bool = False,
        wanted: Mapping[str, Collection[int]] | None = None,
    ) -> dict[str, set[int]]:
        """Run one batch by a plan.

        Args:
            plan: The plan.
            batch: The batch.
            add: Takes what was captured.
            only_first: Stop after the first objective, and leave out what is looped: that is autograd itself.
            wanted: Parameters, and which objectives, instead of all.

        Returns:
            What was withheld, and is still to be added: parameters, and of which objectives.
        """
        index = 0
        strays = Strays(plan.sites)

        def add_wanted(key: str, grads: PerExampleGrads) -> None:
            if key not in strays.found and (wanted is None or index in wanted[key]):
                add(key, grads)

        looped = {key: self._parameters[key] for key in plan.loop}
        withheld: dict[str, set[int]] = defaultdict(set)
        reached = set(looped)
        if plan.sites:
            capturing = Capture(plan.sites, add_wanted, squares=self._estimator.adds_squares)
            with only_trainable(looped.values()), capturing as capture:
                with capture.forward(batch.num_examples), strays.watched():
                    answer = self._answer(batch)
                for index, (objective, last) in enumerate(with_last(self._estimator.objectives(answer, batch.places))):
                    if objective is None:
                        continue
                    check_finite(objective, batch.places)
                    self.connected |= objective.requires_grad
                    capture.backward(objective, retain_graph=not (last or only_first))
                    for key in capture.unsettled - strays.found.keys():
                        if wanted is None or index in wanted[key]:
                            withheld[key].add(index)
                    self._distrusted |= capture.distrusted
                    if only_first:
                        break
                reached = {key for key, parameter in looped.items() if parameter.grad is not None} | strays.found.keys()
        if strays.found:
            self._note_strays(strays.found)
        if reached and not only_first:
            self._looped({key: wanted and wanted[key] for key in reached}, batch, add)
        return withheld

    def _looped(
        self,
        wanted: Mapping[str, Collection[int] | None],
        batch: Examples,
        add: Callable[[str, PerExampleGrads], None],
    ) -> None:
        """Run each example alone, by ordinary autograd, for some parameters and all or some of the objectives."""
        self._refuse_positions(wanted)
        parameters = {key: self._parameters[key] for key in wanted}
        with only_trainable(parameters.values()):
            for one in batch.singly():
                objectives = self._estimator.objectives(self._answer(one), one.places)
                for index, (objective, last) in enumerate(with_last(objectives)):
                    if objective is None:
                        continue
                    check_finite(objective, one.places)
                    self.connected |= objective.requires_grad
                    backward(objective.sum(), retain_graph=not last)
                    for key, parameter in parameters.items():
                        grad = take_grad(parameter)
                        if grad is None and is_wrapped(parameter):
                            raise without_gradient(key, parameter)
                        if grad is not None and (wanted[key] is None or index in wanted[key]):
                            add(key, DenseGrads(grad[None]))
