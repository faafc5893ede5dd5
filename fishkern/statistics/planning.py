"""The plan of a captured pass: which path each parameter takes, checked on two examples before anything is counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import islice

import torch
from torch import Tensor, nn

from fishkern.layers import (
    Capture,
    Connection,
    PerExampleGrads,
    Plan,
    Strays,
    UnsupportedModuleError,
    is_wrapped,
    leave_out,
    stored_weights,
    survey,
)
from fishkern.statistics.autograd import check_finite, first, only_trainable
from fishkern.statistics.base import Estimator
from fishkern.statistics.batches import Examples
from fishkern.statistics.coverage import slowest_paths
from fishkern.statistics.diagonal_fisher import DiagonalFisher
from fishkern.statistics.independence import Independence
from fishkern.statistics.predictive import Predictive
from fishkern.statistics.self_check import disagreements
from fishkern.statistics.states import States, without_factors
from fishkern.warning import warn_caller

Answer = Callable[[Examples], Predictive | Tensor]

_BYTES_OF_SQUARES = 2**28
"""The self-check of an estimator that does not say what a gradient adds squares parameters of so many bytes at once."""


class Planner:
    """Makes the plans of a pass, and keeps what later batches show against them.

    Args:
        model: In evaluation mode, frozen.
        parameters: Those asked for, by canonical name; the stored weights of quantised linears included.
        answer: Runs the model on a batch.
        estimator: The recipe.
        states: Where the pass adds up; empty until its first batch is added.
        check: Compare with ordinary autograd on two examples.
        independence: Whether the loss of an example is its own.
        connection: Lets segments under reentrant checkpointing be reached.

    Attributes:
        paths: The slowest path that each parameter has taken so far, and the reason.
        begun: Whether something has been added to the states.
        distrusted: Paths of modules whose rows have been seen to follow the data.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        answer: Answer,
        estimator: Estimator,
        states: States,
        *,
        check: bool,
        independence: Independence,
        connection: Connection,
    ) -> None:
        self._model = model
        self._parameters = parameters
        self._answer = answer
        self._estimator = estimator
        self._states = states
        self._check = check
        self._independence = independence
        self._connection = connection
        self._plans: dict[bool, Plan] = {}  # for batches of one, and for all batches
        self._strayed: dict[str, str] = {}
        self._announced: set[str] = set()
        stored = stored_weights(model)
        self._stored = {key for key in parameters.keys() & stored.keys() if not is_wrapped(parameters[key])}
        self.paths: dict[str, tuple[str, str]] = {}
        self.begun = False
        self.distrusted: set[str] = set()

    def plan_for(self, batch: Examples) -> Plan:
        """Take the plan that serves a batch, made of its first two examples where there is none yet.

        Args:
            batch: The batch.

        Returns:
            The plan. One example does not show which rows are whose, so a plan of a batch of one serves such batches
            alone; what two examples have shown serves one as well.
        """
        lone = batch.num_examples == 1 and False not in self._plans
        if lone not in self._plans:
            self._plans[lone] = self._make_plan(batch.take(0, min(2, batch.num_examples)))
        return self._plans[lone]

    def forget(self) -> None:
        """Survey the next batch anew."""
        self._plans.clear()

    def note_strays(self, strays: Mapping[str, str]) -> None:
        """Send parameters whose module is called from outside of its host through the loop, from this batch on.

        Args:
            strays: Why, by canonical name.
        """
        self.refuse_stored(strays)
        self._strayed |= strays
        self._plans = {lone: plan.with_loop(strays) for lone, plan in self._plans.items()}
        self._announce(Plan((), strays))

    def note_looped(self, keys: Iterable[str], batch: Examples) -> None:
        """Note that a batch went through the loop for some parameters, and survey the next one anew.

        Args:
            keys: Their canonical names.
            batch: The batch.
        """
        where = f"on examples {batch.places[0]} to {batch.places[-1]}, where its rows could not yet be told apart"
        self._note_paths(dict.fromkeys(keys, ("loop", where)))
        self.forget()

    def refuse_stored(self, keys: Iterable[str]) -> None:
        """Refuse stored weights that a slow path would have to serve.

        Args:
            keys: Canonical names of what no rule serves.

        Raises:
            UnsupportedModuleError: A stored weight is among them.
        """
        if lost := sorted(self._stored.intersection(keys)):
            raise UnsupportedModuleError(
                "autograd gives stored weights no gradient, and these quantised linears do not compute x W^T + b, or "
                f"their rows cannot be told apart by example: {lost}. {leave_out(lost, by_autograd=False)}"
            )

    def refuse_whole(self, keys: Iterable[str]) -> None:
        """Refuse the slow paths, which bring whole gradients, to an estimator that reads positions or factors.

        Args:
            keys: Canonical names of what a slow path serves.

        Raises:
            UnsupportedModuleError: There is one, and the estimator reads more than whole gradients.
        """
        without = sorted(keys)
        if without and self._estimator.reads == "positions":
            raise UnsupportedModuleError(
                f"unit='position' needs a rule for positions, and there is none for {without}. {leave_out(without)}"
            )
        if without and self._estimator.reads == "factors":
            raise UnsupportedModuleError(without_factors(without))

    def _make_plan(self, few: Examples) -> Plan:
        """Survey two examples, or the one of a batch of one, and compare them with ordinary autograd."""
        compared = few.num_examples > 1 and self._independence.pending
        place = 0  # of the first objective that there is: type-2 has none for a position without a label

        def losses() -> Tensor:
            nonlocal place
            answer = self._answer(few)
            place, objective = first(self._estimator.objectives(answer, few.places))
            check_finite(objective, few.places)
            if compared:
                self._independence.note_beside(answer)
            return objective

        keys = {parameter: key for key, parameter in self._parameters.items()}
        with self._independence.precision.noting():
            plan = survey(self._model, keys, losses, self.distrusted, self._connection.answered, few.num_examples)
        self.refuse_stored(key for key, (path, _) in plan.paths.items() if path != "fused")
        reasons = self._disagreements(plan, few, place) if self._check else {}
        if compared:
            with only_trainable(self._reached().values()):
                self._independence.settle(few)
        plan = plan.with_loop({**reasons, **self._strayed})
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

        reached = [key for key in self._reached() if key not in plan.loop]
        if self._estimator.has_of_gradient:
            # the states of the pass, as long as they are empty: a second set would double the memory
            states = self._states.of_the_same_kind(self._estimator, reached) if self.begun else self._states
            try:
                return self._compared(plan, few, objective, self._estimator, states, reached)
            finally:
                states.zero_()
        reasons = {}
        for keys in self._in_groups(reached):
            states = self._states.of_the_same_kind(DiagonalFisher(), keys)
            reasons |= self._compared(plan.only(keys), few, objective, DiagonalFisher(), states, keys)
        return reasons

    def _compared(
        self,
        plan: Plan,
        few: Examples,
        objective: Callable[[Examples], Tensor],
        estimator: Estimator,
        states: States,
        keys: Iterable[str],
    ) -> dict[str, str]:
        """Capture the gradients of some parameters, and compare them with those of ordinary autograd."""
        withheld = self._captured_once(plan, few, states.add, squares=estimator.reads == "squares")
        return disagreements(
            {key: self._parameters[key] for key in keys if key not in withheld},
            states,
            estimator,
            objective,
            few,
            reused=plan.reused,
            half=self._independence.precision.half,
        )

    def _captured_once(
        self, plan: Plan, few: Examples, add: Callable[[str, PerExampleGrads], None], *, squares: bool
    ) -> set[str]:
        """Capture the first objective of two examples by the sites of a plan; name the parameters withheld."""
        strays = Strays(plan.sites)

        def add_own(key: str, grads: PerExampleGrads) -> None:
            if key not in strays.reasons and key not in self._stored:
                add(key, grads)

        if not plan.sites:
            return set()
        with Capture(plan.sites, add_own, squares=squares) as capture:
            counted = few.attended if self._estimator.reads == "factors" else None
            with capture.forward(few.num_examples, counted), strays.watched():
                answer = self._answer(few)
            _, objective = first(self._estimator.objectives(answer, few.places))
            check_finite(objective, few.places)
            capture.backward(objective)
            self.distrusted |= capture.distrusted
            withheld = set(capture.unsettled - strays.reasons.keys())
        if strays.reasons:
            self.note_strays(strays.reasons)
        return withheld

    def _in_groups(self, keys: Iterable[str]) -> list[list[str]]:
        """Cut parameters into groups whose squares take a bounded number of bytes, at least one parameter each."""
        groups: list[list[str]] = [[]]
        room = _BYTES_OF_SQUARES
        for key in keys:
            info = self._states.info(key)
            size = info.shape.numel() * info.dtype.itemsize
            if groups[-1] and size > room:
                groups.append([])
                room = _BYTES_OF_SQUARES
            groups[-1].append(key)
            room -= size
        return [group for group in groups if group]

    def _reached(self) -> dict[str, nn.Parameter]:
        """List what autograd reaches: all but the stored weights of quantised linears."""
        return {key: parameter for key, parameter in self._parameters.items() if key not in self._stored}

    def _note_paths(self, paths: Mapping[str, tuple[str, str]]) -> None:
        self.paths = slowest_paths([self.paths, paths])

    def _announce(self, plan: Plan) -> None:
        """Note the paths of a plan, refuse those that the estimator cannot use, and warn of the slow one."""
        self._note_paths(plan.paths)
        self.refuse_whole(key for key, (path, _) in plan.paths.items() if path != "fused")
        if self._estimator.reads == "factors":
            served = {key for site in plan.sites for key in site.keys.values()}
            self.refuse_whole(served - plan.with_factors)
        slow = {key: reason for key, (path, reason) in plan.paths.items() if path == "loop"}
        new = sorted(slow.keys() - self._announced)
        self._announced |= slow.keys()
        if new:
            warn_caller(
                f"{len(new)} parameter(s) take the slow exact path, one pass over the model for each example: "
                f"{_with_reasons(new, slow)}."
            )


def _with_reasons(keys: list[str], reasons: Mapping[str, str], most: int = 8) -> str:
    shown = "; ".join(f"{key}: {reasons[key]}" for key in keys[:most])
    return shown + (f" and {len(keys) - most} more" if len(keys) > most else "")
