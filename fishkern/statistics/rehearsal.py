"""Rehearse a pass on tensors without values: the code of the pass itself runs, part by part, and its bytes are counted.

What depends on values is missing: whose rows a gradient has is read off sizes (:func:`fishkern.layers.foresee`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from itertools import islice
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
from torch.utils._pytree import tree_leaves

from fishkern.layers import PerExampleGrads, foresee, served_by_rule, stored_weights
from fishkern.statistics.answering import Answering
from fishkern.statistics.autograd import first
from fishkern.statistics.autograd_pass import AutogradPass
from fishkern.statistics.base import Estimator, ParameterInfo, State, sums
from fishkern.statistics.batches import Examples
from fishkern.statistics.captured_pass import CapturedPass
from fishkern.statistics.computed_dtypes import ComputedDtypes
from fishkern.statistics.coverage import ONLY_A_RUN
from fishkern.statistics.head_logits import Onlooker, Survey
from fishkern.statistics.independence import Independence
from fishkern.statistics.planning import Answer, Planner
from fishkern.statistics.positions import counted_positions
from fishkern.statistics.predictive import Predictive
from fishkern.statistics.states import States
from fishkern.statistics.undisturbed import Entered, undisturbed
from fishkern.statistics.valueless import Phase, Valueless

_NEEDS_VALUES = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
_OBJECTIVES = 2  # of a batch: any more are like the second


@dataclass
class Rehearsal:
    """A pass to rehearse.

    Args:
        mode: Counts bytes and FLOPs.
        model: From :meth:`fishkern.statistics.valueless.Valueless.model_like`.
        requested: Its requested parameters, by canonical name.
        infos: What their states get to know of them.
        estimator: The recipe.
        answering: Runs the model on a batch.
        check: As for :func:`fishkern.estimate`.
        keeps_results: Whether results stay beside the states that are left.

    Attributes:
        sums_of: Bytes of the sums of each parameter.
        bases_of: Bytes of the constants of each parameter's state.
        workspace: The most bytes that making one state takes beside it.
        states: Bytes that are alive once they are made.
        phases: The parts of the pass, in order.
        paths: Path and reason for each parameter, as far as they can be foreseen.
        estimating: FLOPs of the estimator's own operations on a batch.
        unknown: What only a run can tell, in words.
    """

    mode: Valueless
    model: nn.Module
    requested: Mapping[str, Tensor]
    infos: Mapping[str, ParameterInfo]
    estimator: Estimator
    answering: Answering
    check: bool
    keeps_results: bool = True
    sums_of: dict[str, int] = field(default_factory=dict)
    bases_of: dict[str, int] = field(default_factory=dict)
    workspace: int = 0
    states: int = 0
    phases: dict[str, Phase] = field(default_factory=dict)
    paths: dict[str, tuple[str, str]] = field(default_factory=dict)
    estimating: int = 0
    unknown: list[str] = field(default_factory=list)

    def over(self, batch: Examples | None) -> dict[str, Any]:
        """Rehearse it.

        Args:
            batch: A batch of tensors from :meth:`fishkern.statistics.valueless.Valueless.input_like`; ``None``: states
                are made and turned into results, and nothing is added to them.

        Returns:
            The results, by canonical name.
        """
        with self.mode:
            with self._phase("states"):
                states = _States(self.infos, self.estimator, self.mode)
            self.sums_of = {key: sum(_nbytes(total) for total in sums(states[key])) for key in self.infos}
            self.states = self.mode.live
            self.bases_of = {key: whole - self.sums_of[key] for key, (whole, _) in states.made.items()}
            self.workspace = max(peak - whole for whole, peak in states.made.values())
            if batch is None:
                self.paths = dict.fromkeys(self.requested, (ONLY_A_RUN, "there is no batch that reaches it"))
                served = served_by_rule(self.model, self.requested)
                self.paths |= dict.fromkeys(served, ("fused", ""))
            else:
                try:
                    self._run(batch, states)
                except Exception as error:
                    self.unknown.append(f"the rest of a batch: {self._why_stopped(error)}")
            with self._phase("results"):
                return self._finish(states)

    def _run(self, batch: Examples, states: _States) -> None:
        asked: set[str] = set()
        with undisturbed(self.model, self.requested.values()) as entered:

            def answer(examples: Examples, *onlooker: Onlooker) -> Predictive | Tensor:
                entered.restore()
                with self.mode.noting(asked):
                    return self.answering(examples, *onlooker)

            if not self.answering.prepared:
                with self._phase("loss of one example"):
                    self.answering.prepare(batch)
            if self.answering.awaits(batch):
                with self._phase("logits of one example"):
                    self.answering.meet(batch)
            if self.estimator.reads in ("sums", "batches"):
                self._run_by_autograd(batch, answer, entered, states)
            else:
                self._run_captured(batch, answer, entered, states)
        if asked:
            self.unknown.append(
                f"parts of the model that follow the values of a batch ({', '.join(sorted(asked))}), such as the "
                "experts that a token is sent to: here they got no row"
            )

    def _run_by_autograd(self, batch: Examples, answer: Answer, entered: Entered, states: _States) -> None:
        independence = self._independence(answer)
        common = (self.requested, answer, _Few(self.estimator), states)
        one_pass = AutogradPass(*common, independence=independence, connection=entered.connection)
        self.paths = dict(one_pass.paths)
        with self._phase("batch"):
            one_pass.run(batch)
        self.estimating = states.flops

    def _run_captured(self, batch: Examples, answer: Answer, entered: Entered, states: _States) -> None:
        independence = self._independence(answer)
        common = (self.requested, answer, _Few(self.estimator), states)
        planner = Planner(
            self.model,
            *common,
            counted=partial(counted_positions, self.model, self.estimator, self.answering),
            check=self.check,
            independence=independence,
            connection=entered.connection,
        )
        few = batch.take(0, min(2, batch.num_examples))
        surveying = Survey(self.requested.values())

        number = 0

        def losses() -> Tensor:
            nonlocal number
            number, objective = first(self.estimator.objectives(answer(few, surveying), few.places))
            return objective

        with self._phase("survey"), independence.precision.noting():
            keys = {parameter: key for key, parameter in self.requested.items()}
            options = {"num_examples": few.num_examples, "order": few.order}
            plan = foresee(self.model, keys, losses, answered=entered.connection.answered, **options)
        for key, (path, reason) in plan.paths.items():
            self.paths[key] = (path, reason) if path == "fused" else (ONLY_A_RUN, reason)
        if (
            self.estimator.reads == "positions" or self.estimator.reads_factors
        ):  # no loop gives them: a run finds another path, or refuses
            plan = plan.only({key for site in plan.sites for key in site.keys.values()})
        if self.check:
            with self._phase("self-check"):
                planner.disagreements(plan, few, number)
        planner.take(plan)
        states.flops = 0
        with self._phase("batch"):
            CapturedPass(*common, planner).run(batch)
        self.estimating = states.flops

    def _why_stopped(self, error: Exception) -> str:
        """Say why a batch cannot be rehearsed to its end; an error of another kind is raised."""
        what = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if isinstance(error, _NEEDS_VALUES):
            return f"it depends on values that tensors have in a run alone ({what})"
        if not stored_weights(self.model):
            raise error
        return f"the modules with stored weights do not run without values ({what})"

    def _independence(self, answer: Answer) -> Independence:
        by_labels = self.estimator.definition.get("fisher_type", "empirical") == "empirical"
        return Independence(self.model, answer, ComputedDtypes(self.model), by_labels=by_labels)

    def _finish(self, states: _States) -> dict[str, Any]:
        """Turn the states into results one after the other, and look for numbers that are not finite."""
        results = {}
        for key in self.infos:
            result = self.estimator.result(states.pop(key), 1)
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    leaf.isfinite().all()
            if self.keeps_results:
                results[key] = result
        return results

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        with self.mode.phase() as self.phases[name]:
            yield


class _States(States):
    """States that rehearse an addition once for all gradients of the same shapes.

    Attributes:
        flops: FLOPs of all additions.
        made: For each parameter, the bytes of its state and the most bytes while it was made.
    """

    def __init__(self, parameters: Mapping[str, ParameterInfo], estimator: Estimator, mode: Valueless) -> None:
        self._mode = mode
        self.made: dict[str, tuple[int, int]] = {}
        super().__init__(parameters, estimator, "torch")
        self._added: dict[Any, Phase] = {}
        self.flops = 0

    def of_the_same_kind(self, estimator: Estimator, names: Collection[str]) -> States:
        return _States({name: self._parameters[name] for name in names}, estimator, self._mode)

    def _begin(self, parameter: ParameterInfo) -> State:
        with self._mode.phase() as phase:
            state = super()._begin(parameter)
        self.made[parameter.name] = (self._mode.live - phase.start, phase.peak - phase.start)
        return state

    def add(self, name: str, grads: PerExampleGrads) -> None:
        shapes = (self.info(name).shape, *(total.shape for total in sums(self[name])), *_described(grads))
        if (same := self._added.get(shapes)) is not None:
            self._mode.repeat(same)
        else:
            with self._mode.phase() as same:
                super().add(name, grads)
            if self._mode.live == same.start:  # else it keeps something of this call
                self._added[shapes] = same
        self.flops += same.flops


class _Few:
    """An estimator with the first objectives of a batch alone."""

    def __init__(self, estimator: Estimator) -> None:
        self._estimator = estimator

    def __getattr__(self, name: str) -> Any:
        return getattr(self._estimator, name)

    def objectives(self, answer: Predictive | Tensor, examples: range) -> Iterator[Tensor | None]:
        return islice(self._estimator.objectives(answer, examples), _OBJECTIVES)


def _described(value: Any) -> tuple[Any, ...]:
    """Describe gradients by their form, and the shapes, strides and dtypes of their factors."""
    if isinstance(value, Tensor):
        return (value.shape, value.stride(), value.dtype)
    if is_dataclass(value):
        return (type(value), *(part for one in fields(value) for part in _described(getattr(value, one.name))))
    if isinstance(value, tuple | list):
        return tuple(part for one in value for part in _described(one))
    return (value,)


def _nbytes(total: Tensor) -> int:
    return total.untyped_storage().nbytes()
