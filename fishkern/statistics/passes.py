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
    DenseGrads,
    PerExampleGrads,
    Plan,
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
from fishkern.statistics.batches import Batch, num_examples, take
from fishkern.statistics.coverage import slowest_paths
from fishkern.statistics.predictive import Predictive
from fishkern.statistics.self_check import disagreements

Answer = Callable[[Batch], Predictive | Tensor]


class GradientPass:
    """Ordinary autograd: the gradient of each objective as a whole, squared.

    Args:
        parameters: What to differentiate by, by canonical name.
        answer: Runs the model on a batch.
        estimator: The recipe.
        accumulators: Where the squares go.
        path: Name of this path in the coverage.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        answer: Answer,
        estimator: Estimator,
        accumulators: Accumulators,
        path: str,
    ) -> None:
        self._parameters = parameters
        self._answer = answer
        self._estimator = estimator
        self._accumulators = accumulators
        self.paths = dict.fromkeys(parameters, (path, ""))

    def run(self, batch: Batch, examples: range) -> None:
        """Add one batch.

        Args:
            batch: The batch.
            examples: Places of its examples in the data.

        Raises:
            without_gradient: An :class:`UnsupportedModuleError`: a parameter is of a tensor subclass to which autograd
                gives no gradient.
        """
        with only_trainable(self._parameters.values()):
            for objective, last in with_last(self._estimator.objectives(self._answer(batch), examples)):
                check_finite(objective, examples)
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
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        answer: Answer,
        estimator: Estimator,
        accumulators: Accumulators,
        check: bool,
    ) -> None:
        self._model = model
        self._parameters = parameters
        self._answer = answer
        self._estimator = estimator
        self._accumulators = accumulators
        self._check = check
        self._plan: Plan | None = None
        self._begun = False
        self._distrusted: set[str] = set()
        self._announced: set[str] = set()
        self.paths: dict[str, tuple[str, str]] = {}
        stored = stored_weights(model)
        self._stored = {key for key in parameters.keys() & stored.keys() if not is_wrapped(parameters[key])}

    def run(self, batch: Batch, examples: range) -> None:
        """Add one batch.

        Args:
            batch: The batch.
            examples: Places of its examples in the data.
        """
        if self._plan is None:
            self._plan = self._make_plan(batch, examples)
        self._begun = True
        add = self._accumulators.add
        withheld = self._captured(self._plan, batch, examples, add)
        if withheld:  # a gradient has shown up where there was none: look again
            self._plan = self._make_plan(batch, examples)
            withheld = self._captured(self._plan.only(withheld), batch, examples, add, wanted=withheld)
        if withheld:
            self._refuse_stored(withheld)
            self._looped(withheld, batch, examples, add)
            where = f"on examples {examples[0]} to {examples[-1]}, where its rows could not yet be told apart"
            self._note_paths(dict.fromkeys(withheld, ("loop", where)))
            self._plan = None

    def _make_plan(self, batch: Batch, examples: range) -> Plan:
        two = take(batch, [0, 1] if num_examples(batch) > 1 else [0, 0])
        places = range(examples.start, examples.start + 2 * examples.step, examples.step)

        def losses() -> Tensor:
            nonlocal place
            place, objective = first(self._estimator.objectives(self._answer(two), places))
            check_finite(objective[: num_examples(batch)], places)  # a lone example stands there twice
            return objective

        place = 0

        keys = {parameter: key for key, parameter in self._parameters.items()}
        with only_trainable(()):
            plan = survey(self._model, keys, losses, self._distrusted)
        self._refuse_stored(key for key, (path, _) in plan.paths.items() if path != "fused")
        if self._check:
            plan = self._checked(plan, two, places, place)
        self._announce(plan)
        return plan

    def _checked(self, plan: Plan, two: Batch, places: range, place: int) -> Plan:
        """Send what disagrees with ordinary autograd through the loop, judged by the objective at ``place``."""

        def objective(batch: Batch, examples: range) -> Tensor:
            objective = next(islice(self._estimator.objectives(self._answer(batch), examples), place, None))
            return torch.zeros(len(examples)) if objective is None else objective

        squares = self._accumulators.empty_like() if self._begun else self._accumulators
        try:
            withheld = self._captured(plan, two, places, squares.add_squares, only_first=True)
            parameters = {
                key: parameter
                for key, parameter in self._parameters.items()
                if key not in self._stored and key not in withheld and key not in plan.loop
            }
            found = disagreements(parameters, squares.states, objective, two, places, kept=plan.reused)
        finally:
            squares.zero_()
        return plan.with_loop(found)

    def _note_paths(self, paths: Mapping[str, tuple[str, str]]) -> None:
        """Keep the slowest path that each parameter has taken."""
        self.paths = slowest_paths([self.paths, paths])

    def _refuse_stored(self, keys: Iterable[str]) -> None:
        if lost := sorted(self._stored.intersection(keys)):
            raise UnsupportedModuleError(
                "autograd gives stored weights no gradient, and these quantised linears do not compute x W^T + b, or "
                f"their rows cannot be told apart by example: {lost}. {leave_out(lost)}"
            )

    def _refuse_positions(self, keys: Iterable[str]) -> None:
        if self._estimator.definition["unit"] == "position" and (without := sorted(keys)):
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
                stacklevel=5,
            )

    def _captured(
        self,
        plan: Plan,
        batch: Batch,
        examples: range,
        add: Callable[[str, PerExampleGrads], None],
        only_first: bool = False,
        wanted: Mapping[str, Collection[int]] | None = None,
    ) -> dict[str, set[int]]:
        """Run one batch by a plan.

        Args:
            plan: The plan.
            batch: The batch.
            examples: Places of its examples in the data.
            add: Takes what was captured.
            only_first: Stop after the first objective, and leave out what is looped: that is autograd itself.
            wanted: Parameters, and which objectives, instead of all.

        Returns:
            What was withheld, and is still to be added: parameters, and of which objectives.
        """
        index = 0

        def add_wanted(key: str, grads: PerExampleGrads) -> None:
            if wanted is None or index in wanted[key]:
                add(key, grads)

        looped = {key: self._parameters[key] for key in plan.loop}
        withheld: dict[str, set[int]] = defaultdict(set)
        reached = set(looped)
        if plan.sites:
            with only_trainable(looped.values()), Capture(plan.sites, add_wanted) as capture:
                with capture.forward(len(examples)):
                    answer = self._answer(batch)
                for index, (objective, last) in enumerate(with_last(self._estimator.objectives(answer, examples))):
                    if objective is None:
                        continue
                    check_finite(objective, examples)
                    capture.backward(objective, retain_graph=not (last or only_first))
                    for key in capture.unsettled:
                        if wanted is None or index in wanted[key]:
                            withheld[key].add(index)
                    self._distrusted |= capture.distrusted
                    if only_first:
                        break
                reached = {key for key, parameter in looped.items() if parameter.grad is not None}
        if reached and not only_first:
            self._looped({key: wanted and wanted[key] for key in reached}, batch, examples, add)
        return withheld

    def _looped(
        self,
        wanted: Mapping[str, Collection[int] | None],
        batch: Batch,
        examples: range,
        add: Callable[[str, PerExampleGrads], None],
    ) -> None:
        """Run each example alone, by ordinary autograd, for some parameters and all or some of the objectives."""
        self._refuse_positions(wanted)
        parameters = {key: self._parameters[key] for key in wanted}
        with only_trainable(parameters.values()):
            for n, example in enumerate(examples):
                answer = self._answer(take(batch, slice(n, n + 1)))
                objectives = self._estimator.objectives(answer, range(example, example + 1))
                for index, (objective, last) in enumerate(with_last(objectives)):
                    if objective is None:
                        continue
                    check_finite(objective, range(example, example + 1))
                    backward(objective.sum(), retain_graph=not last)
                    for key, parameter in parameters.items():
                        grad = take_grad(parameter)
                        if grad is None and is_wrapped(parameter):
                            raise without_gradient(key, parameter)
                        if grad is not None and (wanted[key] is None or index in wanted[key]):
                            add(key, DenseGrads(grad[None]))
