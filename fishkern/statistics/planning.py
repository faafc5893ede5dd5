"""Plan a captured pass: choose the path of each parameter, checked on two examples before anything is counted."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import nullcontext
from itertools import islice

import torch
from torch import Tensor, nn

from fishkern.layers import (
    Connection,
    PerExampleGrads,
    Plan,
    Strays,
    UnsupportedModuleError,
    Whole,
    capture_of,
    is_wrapped,
    leave_out,
    stored_weights,
    survey,
)
from fishkern.statistics.autograd import check_finite, only_trainable, summed, widest
from fishkern.statistics.base import Estimator
from fishkern.statistics.batches import Examples
from fishkern.statistics.coverage import slowest_paths
from fishkern.statistics.diagonal_fisher import DiagonalFisher
from fishkern.statistics.head_logits import Survey
from fishkern.statistics.independence import Independence
from fishkern.statistics.known import Kind, Known
from fishkern.statistics.predictive import Predictive
from fishkern.statistics.self_check import disagreements, replaced_disagreements
from fishkern.statistics.states import States, without_factors
from fishkern.statistics.surveyed import Added, Surveyed
from fishkern.warning import warn_caller

Answer = Callable[..., Predictive | Tensor]  # of examples, and of who looks on while the model runs

_BYTES_OF_SQUARES = 2**28
"""Without ``of_gradient``, the self-check needs the squares of the parameters: this many bytes of them at a time."""


class Planner:
    """Make the plans of a pass, and revise them when later batches contradict them.

    Args:
        model: In evaluation mode, frozen.
        parameters: The requested ones, by canonical name, including the stored weights of quantised linears.
        answer: Runs the model on a batch.
        estimator: The recipe.
        states: The states that the pass adds to; zero until its first batch is added.
        counted: Says which positions of a batch count, ``[N, T]``, or ``None``
            (:func:`fishkern.statistics.positions.counted_positions`).
        check: Compare with ordinary autograd on two examples.
        independence: Checks that the loss of an example is its own.
        connection: Lets gradients reach segments under reentrant checkpointing.
        known: What earlier passes have found out; ``None`` for nothing, and to keep nothing.
        whole: Lets a call run once more, see :data:`fishkern.layers.Whole`.
        unserved: Says which parameters of a plan take the loop in spite of it, and why.
        reuses: Whether the passes of the survey serve the self-check and the result as well. If not, each step runs the
            model for itself.

    Attributes:
        paths: The slowest path that each parameter has taken so far, and the reason.
        begun: Whether something has been added to the states.
        distrusted: Paths of modules whose row count turned out to depend on the data.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        answer: Answer,
        estimator: Estimator,
        states: States,
        *,
        counted: Callable[[Examples], Tensor | None],
        check: bool,
        independence: Independence,
        connection: Connection,
        known: Known | None = None,
        whole: Whole = nullcontext,
        unserved: Callable[[Plan], Mapping[str, str]] = lambda plan: {},
        reuses: bool = False,
    ) -> None:
        self._reuses = reuses
        self._added: Added | None = None
        self._whole = whole
        self._unserved = unserved
        self.counted = counted
        self._model = model
        self._parameters = parameters
        self._answer = answer
        self._estimator = estimator
        self._states = states
        self._check = check
        self._independence = independence
        self._connection = connection
        self._known = known
        self._contradicted = False
        self._first: dict[Kind, range] = {}  # places of the first batch that got a plan of each kind
        self._plans: dict[Kind, Plan] = {}
        self._strayed: dict[str, str] = {}
        self._revision = 0
        self._announced: set[str] = set() if known is None else known.announced
        stored = stored_weights(model)
        self._stored = {key for key in parameters.keys() & stored.keys() if not is_wrapped(parameters[key])}
        self.paths: dict[str, tuple[str, str]] = {}
        self.begun = False
        self.distrusted: set[str] = set() if known is None else set(known.distrusted)

    def plan_for(self, batch: Examples) -> Plan:
        """Return the plan for a batch; if there is none yet, make it from the batch's first two examples.

        Args:
            batch: The batch.

        Returns:
            The plan. One example does not show which rows belong to which example, so a plan from a batch of one is
            used for such batches only. A plan from two examples is used for batches of one as well. Packed rows have
            plans of their own, for each set of entries by which their documents may be kept apart.
        """
        kind = Kind(batch.num_examples == 1, batch.kind)
        if (several := kind._replace(lone=False)) in self._plans:  # a plan for all batches is the better one
            kind = several
        if kind not in self._plans:
            few = batch.few
            # what a later batch contradicts is not kept: it will be contradicted in every pass over the same data
            is_first = self._first.setdefault(kind, batch.places) == batch.places
            plan = self._known_plan(kind, few)
            if plan is None:
                plan = self._make_plan(kind, few)
                if self._known is not None and is_first:
                    # at once: the pass may end in an exception, and a plan holds for connected segments alone
                    self._known.keep(self._independence, self._connection)
                    self._known.learn(kind, few, plan, self.distrusted)
            self._plans[kind] = plan
            self._revision += 1
        return self._plans[kind]

    def take_added(self) -> Added | None:
        """Say once which examples of the first batch the states hold when its plan has been made.

        Returns:
            Its first examples, which are not to be added again; ``None`` if nothing has been added.
        """
        added, self._added = self._added, None
        return added

    @property
    def learned(self) -> Hashable:
        """What changes when a batch shows something on which the plans of later ones depend."""
        return self._revision, len(self.distrusted)

    def has_plan(self, kind: Kind) -> bool:
        """Tell whether batches of a kind have a plan.

        Args:
            kind: Of a batch.

        Returns:
            Whether they do, or use that of batches of several.
        """
        return kind in self._plans or kind._replace(lone=False) in self._plans

    def take(self, plan: Plan) -> None:
        """Take a plan as given, for all batches.

        Args:
            plan: The plan.
        """
        self._plans[Kind(lone=False)] = plan

    def forget(self) -> None:
        """Discard the plans, so that the next batch is surveyed again."""
        self._plans.clear()
        self._revision += 1
        self._contradicted = True

    @property
    def strayed(self) -> Mapping[str, str]:
        """Why parameters take the loop whose module was called from outside its host, by canonical name."""
        return self._strayed

    def note_strays(self, strays: Mapping[str, str]) -> None:
        """Move parameters whose module is called from outside its host to the loop, from this batch on.

        Args:
            strays: Why, by canonical name.
        """
        self.refuse_stored(strays)
        self._strayed |= strays
        self._revision += 1
        self._plans = {kind: plan.with_loop(strays) for kind, plan in self._plans.items()}
        self._announce(Plan((), strays))

    def note_looped(self, keys: Iterable[str], batch: Examples) -> None:
        """Note that a batch took the loop for some parameters, and survey the next one again.

        Args:
            keys: Their canonical names.
            batch: The batch.
        """
        where = f"on examples {batch.places[0]} to {batch.places[-1]}, where its rows could not yet be assigned"
        self._note_paths(dict.fromkeys(keys, ("loop", where)))
        self.forget()

    def refuse_stored(self, keys: Iterable[str]) -> None:
        """Refuse stored weights that only a slow path could compute.

        Args:
            keys: Canonical names of parameters that no rule computes.

        Raises:
            UnsupportedModuleError: A stored weight is among them.
        """
        if lost := sorted(self._stored.intersection(keys)):
            raise UnsupportedModuleError(
                "autograd gives stored weights no gradient, and these quantised linears do not compute x W^T + b, or "
                f"their rows cannot be assigned to examples: {lost}. {leave_out(lost, by_autograd=False)}"
            )

    def refuse_whole(self, keys: Iterable[str]) -> None:
        """Refuse the slow paths, which give whole gradients, if the estimator reads positions or factors.

        Args:
            keys: Canonical names of parameters on a slow path.

        Raises:
            UnsupportedModuleError: There is one, and the estimator needs more than whole gradients.
        """
        without = sorted(keys)
        if without and self._estimator.reads in ("positions", "factors or positions"):
            raise UnsupportedModuleError(
                f"unit='position' needs a rule for positions, and there is none for {without}. {leave_out(without)}"
            )
        if without and self._estimator.reads == "factors":
            raise UnsupportedModuleError(without_factors(without))

    def _known_plan(self, kind: Kind, few: Examples) -> Plan | None:
        """Take the plan that an earlier pass has made from the same examples, unless this pass has contradicted it."""
        plan = None if self._known is None or self._contradicted else self._known.plan_for(kind, few)
        if plan is not None:
            self._independence.take_for_granted(few)  # they were compared when it was made
            self._announce(plan)
        return plan

    def _make_plan(self, kind: Kind, few: Examples) -> Plan:
        """Survey two examples, or the one of a batch of one, and compare them with ordinary autograd."""
        compares = self._independence.awaits(few)
        surveying = Survey(self._parameters.values())
        seen = Surveyed(few)

        def losses() -> Tensor:
            answer = self._answer(few, surveying)
            seen.number, seen.objective = widest(seen.counting(self._estimator.objectives(answer, few.places)))
            check_finite(seen.objective, few.places)
            if compares:
                self._independence.note_together(answer)
            return seen.objective

        keys = {parameter: key for key, parameter in self._parameters.items()}
        with self._independence.precision.noting():
            plan, seen.replay = survey(
                self._model,
                keys,
                losses,
                distrusted=self.distrusted,
                answered=self._connection.answered,
                num_examples=few.num_examples,
                documents=few.documents,
                order=few.order,
                whole=self._whole,
                keep=self._reuses,
            )
        seen.end()
        if surveying.asked:  # a capture computes large logits otherwise
            seen.replay = None
        plan = plan.with_loop(self._unserved(plan))
        self.refuse_stored(key for key, (path, _) in plan.paths.items() if path != "fused")
        known, checks = self._known, self._check
        if known is not None:
            plan = plan.with_loop({key: reason for key, reason in known.reasons.items() if key not in plan.loop})
            checks = checks and not known.has_checked(kind, plan)
        # a pass begins with what is captured here; one that is prepared has nothing to capture before its first batch
        adds = seen.replay is not None and known is None and not self.begun and not plan.loop and seen.objectives == 1
        try:
            reasons = self.disagreements(plan, few, seen.number, seen, adds=adds) if checks else {}
            if compares:
                with only_trainable(self._differentiable().values()):
                    self._independence.settle(few)
            kept = seen.replay is not None and seen.replay.is_intact
            if adds and kept and not reasons and self._independence.note is None:
                self._refuse_paths(plan)
                if not (checks and self._estimator.has_of_gradient):  # else the states hold it
                    seen.add_to(self._states, plan.sites, self._estimator, self.counted(few))
                if not seen.held_back:
                    self._added = Added(few.num_examples, summed(seen.objective), seen.connected)
        finally:
            if adds and self._added is None:
                self._states.zero_()
        self.distrusted |= seen.distrusted
        if known is not None:
            known.reasons |= reasons
        plan = plan.with_loop({**reasons, **self._strayed})
        self._announce(plan)
        return plan

    def disagreements(
        self, plan: Plan, few: Examples, number: int, seen: Surveyed | None = None, *, adds: bool = False
    ) -> dict[str, str]:
        """Compare with ordinary autograd by one objective.

        Args:
            plan: A plan for these examples.
            few: Two examples, or the one of a batch of one.
            number: Number of the objective.
            seen: What a survey has seen of the examples; ``None`` for nothing.
            adds: Whether the states of the pass, which are zero, hold afterwards what was captured, as far as they are
                lent to compare.

        Returns:
            For each parameter that differs, why.
        """

        def objective(batch: Examples) -> Tensor:
            answer = self._answer(batch)
            if batch is not few and self._independence.awaits(few):
                self._independence.note_alone(answer)
            objective = next(islice(self._estimator.objectives(answer, batch.places), number, None))
            # an example alone may lack the position of this objective, which then adds nothing
            return torch.zeros(batch.num_examples) if objective is None else objective

        captured = [key for key in self._differentiable() if key not in plan.loop]
        common = (plan, few, objective, number)
        if self._estimator.has_of_gradient:
            # Lend the states of the pass while they are zero: a second set would double the memory of the pass.
            states = self._states.of_the_same_kind(self._estimator, captured) if self.begun else self._states
            try:
                return self._compared(*common, self._estimator, seen, states=states, keys=captured)
            finally:
                if not adds:
                    states.zero_()
        reasons = {}
        for keys in self._in_groups(captured):
            states = self._states.of_the_same_kind(DiagonalFisher(), keys)
            common = (plan.only(keys), few, objective, number)
            reasons |= self._compared(*common, DiagonalFisher(), seen, states=states, keys=keys)
        return reasons

    def _compared(
        self,
        plan: Plan,
        few: Examples,
        objective: Callable[[Examples], Tensor],
        number: int,
        estimator: Estimator,
        seen: Surveyed | None,
        *,
        states: States,
        keys: Iterable[str],
    ) -> dict[str, str]:
        """Capture the gradients of some parameters, and compare them with ordinary autograd."""
        more = {"reused": plan.reused if states.read_at_once else keys, "half": self._independence.precision.half}
        if seen is not None and seen.replay is not None:
            parameters = {key: self._parameters[key] for key in keys}
            captured = seen.states(plan.sites, states, estimator, self.counted(few))
            reasons = replaced_disagreements(parameters, states, estimator, objective, few, captured, **more)
            if seen.replay.is_intact:
                return reasons
            seen.replay = None  # the runs alone have written into it: a capture has to run the examples once more
        withheld = self._captured_once(plan, few, states, estimator, number)
        parameters = {key: self._parameters[key] for key in keys if key not in withheld}
        return disagreements(parameters, states, estimator, objective, few, **more)

    def _captured_once(
        self,
        plan: Plan,
        few: Examples,
        states: States,
        estimator: Estimator,
        number: int,
    ) -> set[str]:
        """Capture one objective of two examples by a plan; return the names whose gradients were held back."""
        strays = Strays(plan.sites, plan.idle)

        def add_own(key: str, grads: PerExampleGrads) -> None:
            if key not in strays.reasons and key not in self._stored:
                states.add(key, grads)

        if not plan.sites:
            return set()
        parts = {
            "squares": estimator.reads == "squares",
            "factors": estimator.reads_factors,
            "deferring": states.deferring,
        }
        with capture_of(plan.sites, add_own, few.documents, **parts) as capture:
            counted = self.counted(few)
            with capture.forward(few.num_examples, counted), strays.watched():
                answer = self._answer(few, capture)
            objective = next(islice(self._estimator.objectives(answer, few.places), number, None))
            check_finite(objective, few.places)
            capture.backward(objective)
            states.complete()
            self.distrusted |= capture.distrusted
            withheld = set(capture.withheld - strays.reasons.keys())
        if strays.reasons:
            self.note_strays(strays.reasons)
        return withheld

    def _in_groups(self, keys: Iterable[str]) -> list[list[str]]:
        """Split parameters into groups of at least one, with a bounded number of bytes of squares each."""
        groups: list[list[str]] = [[]]
        remaining = _BYTES_OF_SQUARES
        for key in keys:
            info = self._states.info(key)
            size = info.shape.numel() * info.dtype.itemsize
            if groups[-1] and size > remaining:
                groups.append([])
                remaining = _BYTES_OF_SQUARES
            groups[-1].append(key)
            remaining -= size
        return [group for group in groups if group]

    def _differentiable(self) -> dict[str, nn.Parameter]:
        """List the parameters with a gradient of autograd: all except the stored weights of quantised linears."""
        return {key: parameter for key, parameter in self._parameters.items() if key not in self._stored}

    def _note_paths(self, paths: Mapping[str, tuple[str, str]]) -> None:
        self.paths = slowest_paths([self.paths, paths])

    def _refuse_paths(self, plan: Plan) -> None:
        """Refuse the paths that the estimator cannot use."""
        # hosts give factors too, of the linear maps inside
        served = plan.keys_with_factors if self._estimator.reads_factors else frozenset()
        by_rule = {key for key, (path, _) in plan.paths.items() if path == "fused"}
        self.refuse_whole(plan.paths.keys() - (served if self._estimator.reads == "factors" else served | by_rule))

    def _announce(self, plan: Plan) -> None:
        """Note the paths of a plan, refuse those that the estimator cannot use, and warn about the loop."""
        self._note_paths(plan.paths)
        self._refuse_paths(plan)
        slow = {key: reason for key, (path, reason) in plan.paths.items() if path == "loop"}
        new = sorted(slow.keys() - self._announced)
        self._announced.update(slow)
        if new:
            warn_caller(
                f"{len(new)} parameter(s) take the slow exact path, one pass over the model for each example: "
                f"{_with_reasons(new, slow)}."
            )


def _with_reasons(keys: list[str], reasons: Mapping[str, str], most: int = 8) -> str:
    shown = "; ".join(f"{key}: {reasons[key]}" for key in keys[:most])
    return shown + (f" and {len(keys) - most} more" if len(keys) > most else "")
