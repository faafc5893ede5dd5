"""A pass over data with a model that FSDP2 shards: all ranks take the same steps, each on its own examples.

Every forward and backward pass of such a model is a collective operation. So the ranks agree before each step: on the
batch (a rank without one runs examples that do not count), on plans, on errors. Plans are made, and compared with
ordinary autograd, on the same examples on every rank: FSDP2's gradient, a mean over ranks, is then theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fishkern import hosts
from fishkern.layers import Plan, UnsupportedModuleError
from fishkern.names import listed
from fishkern.statistics.autograd import backward, only_trainable, take_grad
from fishkern.statistics.base import Estimator, losses_of
from fishkern.statistics.batches import Examples
from fishkern.statistics.captured_pass import CapturedPass, Objectives
from fishkern.statistics.data import Data, Progress
from fishkern.statistics.diagonal_fisher import DiagonalFisher
from fishkern.statistics.direction_energy import DirectionEnergy
from fishkern.statistics.group_fisher import GroupFisher
from fishkern.statistics.head_logits import Onlooker
from fishkern.statistics.independence import Independence
from fishkern.statistics.keeping import Running
from fishkern.statistics.known import Kind
from fishkern.statistics.one_pass import OnePass, Passed
from fishkern.statistics.planning import Planner
from fishkern.statistics.positions import counted_positions
from fishkern.statistics.predictive import Predictive
from fishkern.statistics.randomness import OwnRandomness
from fishkern.statistics.sharded_examples import SharedExamples
from fishkern.statistics.sharded_sketch import ShardedSketch
from fishkern.statistics.sharded_states import ShardedStates
from fishkern.statistics.sharding import Sharding
from fishkern.statistics.shards import Ranks
from fishkern.statistics.sketched_fisher import SketchedFisher
from fishkern.statistics.turns import Turn, kind_of, turns
from fishkern.statistics.undisturbed import Entered, undisturbed

_END = object()
_OF_ONE_GRADIENT = ("sums", "batches")  # what estimators read that FSDP2's own gradient is


def check_sharded(estimator: Estimator) -> None:
    """Refuse recipes that are not computed on sharded parameters.

    Args:
        estimator: The recipe.

    Raises:
        UnsupportedModuleError: It is none of the diagonal Fisher, sums of it over groups, a sketch of it, or energies
            of directions; or one of your own, whose states may not be sums of squares, entry by entry.
    """
    if type(estimator) not in (DiagonalFisher, DirectionEnergy, GroupFisher, SketchedFisher):
        kind = type(estimator).__name__
        options = {key: estimator.definition[key] for key in ("fisher_type", "unit") if key in estimator.definition}
        raise UnsupportedModuleError(
            f"FSDP2 shards the parameters, and {kind}({', '.join(f'{k}={v!r}' for k, v in options.items())}) is not "
            "computed on shards: expected DiagonalFisher, GroupFisher, SketchedFisher or DirectionEnergy. Load the "
            "whole model in each process for others."
        )


@dataclass
class ShardedPass(OnePass):
    """One pass over the data with a sharded model.

    Args:
        sharding: How the model is sharded.
    """

    sharding: Sharding | None = None  # always given; a field after those with defaults needs one
    reuses: ClassVar[bool] = False
    _spare: Examples | None = field(default=None, init=False)

    def over(self, data: Data, ranks: Ranks, report: Progress) -> Passed:
        with self._watching():
            return super().over(data, ranks, report)

    def prepare(self, batch: Examples) -> Mapping[str, tuple[str, str]]:
        """Do what comes before the first batch, with the first examples of every kind of batch that a rank has.

        Args:
            batch: This rank's batch, on its device.

        Returns:
            Path and reason for each parameter.
        """
        with self._watching(), undisturbed(self.model, self.requested.values()) as entered:
            one_pass, independence = self._begin(entered)
            randomness = OwnRandomness(hosts.runs_on(next(iter(self.requested.values()))))
            self._meet(one_pass, one_pass.examples.first(batch, 0), randomness)
            with randomness.drawing():
                one_pass.plan(batch, self.sharding.ranks.gathered(kind_of(batch)))
            self._keep(independence, entered)
        return one_pass.paths

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Exchange what there is to add as gradients arrive; of one gradient as a whole, FSDP2 itself reduces it."""
        arrived = (lambda: None) if self.estimator.reads in _OF_ONE_GRADIENT else self.states.exchange
        with self.sharding.differentiating(self.requested), self.sharding.units.watched(arrived):
            yield

    def _meet(self, one_pass: ShardedCapture | ShardedSketch, spare: Examples, randomness: OwnRandomness) -> None:
        """Check the loss, on examples that all ranks run."""
        with self.sharding.everyone.failing_together(), randomness.aside():
            if self.known is not None:
                self.known.demand_structure(spare)
            self.answering.begin(spare)
        self.sharding.units.reshard()  # a forward pass alone leaves the outermost unit whole

    def _turns(self, data: Data) -> Iterator[Turn]:
        return turns(iter(data), self.sharding.ranks, self.sharding.everyone)

    def _units(self, turn: Turn) -> list[int]:
        if self.estimator.reads != "batches":
            return super()._units(turn)
        return [int(rank == 0) for rank in range(len(turn.sizes))]  # what all ranks run at one time is one batch

    def _take(self, turn: Turn, data: Data, running: Running) -> None:
        """Run the batches of all ranks; one that has none runs the first examples, which do not count."""
        one_pass, randomness = running.one_pass, running.randomness
        if self._spare is None:
            rank = next(rank for rank, kind in enumerate(turn.kinds) if kind is not None)
            self._spare = one_pass.examples.first(turn.batch, rank)
            self._meet(one_pass, self._spare, randomness)
        with randomness.drawing():
            one_pass.plan(turn.batch, turn.kinds)
        own = turn.batch is not None
        with randomness.drawing():
            one_pass.run(turn.batch if own else self._spare, own=own)

    def _pass(
        self, answer: Callable[[Examples], Predictive | Tensor], entered: Entered, independence: Independence
    ) -> ShardedCapture | ShardedSketch:
        common = (self.requested, self._together(answer), self.estimator, self.states)
        joint = {"independence": independence, "connection": entered.connection, "known": self.known}
        examples = SharedExamples(self.sharding.ranks, hosts.runs_on(next(iter(self.requested.values()))))
        if self.estimator.reads in _OF_ONE_GRADIENT:
            return ShardedSketch(*common, self.sharding, examples, **joint)
        planner = Planner(
            self.model,
            *common,
            counted=partial(counted_positions, self.model, self.estimator, self.answering),
            check=self.check,
            whole=lambda call: self.sharding.units.whole(call.module, (call.args, dict(call.kwargs))),
            unserved=partial(_nested, sharding=self.sharding),
            **joint,
        )
        return self._capturing(*common, planner, self.sharding, examples)

    def _capturing(self, *args: Any) -> ShardedCapture:
        return ShardedCapture(*args)

    def _agreed(self, losses: list[float]) -> list[float]:
        return self.sharding.ranks.gathered(losses)[0]  # of the same examples, whose last bits may differ on devices

    def _together(self, answer: Callable[[Examples], Predictive | Tensor]) -> Callable[[Examples], Predictive | Tensor]:
        """Run the model on all ranks: an error on one of them ends the step on all."""

        def answered(batch: Examples, *onlooker: Onlooker) -> Predictive | Tensor:
            self.sharding.units.reshard()  # so that this run sees which parameters require a gradient
            with self.sharding.everyone.failing_together(), self.sharding.units.followed():
                return answer(batch, *onlooker)

        return answered


class ShardedCapture(CapturedPass):
    """Capture by plans that all ranks share.

    Args:
        parameters: As for :class:`CapturedPass`.
        answer: As for :class:`CapturedPass`.
        estimator: As for :class:`CapturedPass`.
        states: As for :class:`CapturedPass`.
        planner: As for :class:`CapturedPass`.
        sharding: How the model is sharded.
        examples: Sends examples of one rank to all.

    Attributes:
        planner: As given.
        examples: As given.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        answer: Callable[[Examples], Predictive | Tensor],
        estimator: Estimator,
        states: ShardedStates,
        planner: Planner,
        sharding: Sharding,
        examples: SharedExamples,
    ) -> None:
        super().__init__(parameters, answer, estimator, states, planner)
        self.planner = planner
        self.examples = examples
        self._sharding = sharding
        self._looped: dict[str, Collection[int] | None] = {}

    def run(self, batch: Examples, *, own: bool = True) -> None:
        """Add one batch of each rank.

        Args:
            batch: This rank's batch.
            own: Whether it counts.
        """
        ranks, planner = self._sharding.ranks, self.planner
        planner.begun = True
        withheld = self._captured(planner.plan_for(batch), batch, own=own)
        if not any(withheld):
            return
        # as on one device: a gradient arrived where the survey saw none, or rows follow the data; a batch in which that
        # happened is surveyed
        planner.forget()
        kinds = ranks.gathered(kind_of(batch))
        self.plan(batch, [kind if each else None for kind, each in zip(kinds, withheld, strict=True)])
        self.plan(batch, kinds)
        keys = sorted({key for each in withheld for key in each})
        only = {key: withheld[ranks.rank].get(key, set()) for key in keys}
        again = self._captured(planner.plan_for(batch).only(keys), batch, own=own, only=only)
        if any(again):
            self._loop_together(batch, again)
            planner.note_looped(sorted({key for each in again for key in each}), batch)

    def plan(self, batch: Examples | None, kinds: Sequence[Kind | None]) -> None:
        """Make plans for all ranks, each on the first examples of a rank.

        Args:
            batch: This rank's batch.
            kinds: The kind of each rank's batch; ``None`` where it has none.
        """
        everyone = self._sharding.everyone
        for rank, kind in enumerate(kinds):
            if kind is not None and not self.planner.has_plan(kind):
                few = self.examples.first(batch, rank)
                with everyone.failing_together():
                    plan = self.planner.plan_for(few)
                everyone.demand_equal(_described(plan), "the paths of parameters")
                self._check(plan)

    def _check(self, plan: Plan) -> None:
        """Refuse a plan that no rank can follow."""

    def _captured(
        self, plan: Plan, batch: Examples, *, own: bool, only: Objectives | None = None
    ) -> list[dict[str, set[int]]]:
        """Capture a batch of each rank, and say what each holds back; of one that does not count, nothing."""
        everyone = self._sharding.everyone
        if self._estimator.reads_factors:
            with everyone.failing_together():  # an error here, where only this rank's batch is read, ends all
                self.planner.counted(batch)
        self._looped, loss = {}, self.loss
        with everyone.failing_together(), self._sharding.apart(counts=own):
            withheld = dict(self._capture(plan, batch, only))
        if not own:
            withheld, self.loss, self._looped = {}, loss, {}
        ended = self._of_all_ranks((withheld, self._looped, dict(self.planner.strayed), set(self.planner.distrusted)))
        every_withheld, every_looped, every_strayed, every_distrusted = zip(*ended, strict=True)
        self.planner.distrusted.update(*every_distrusted)
        if strayed := {key: reason for reasons in every_strayed for key, reason in reasons.items()}:
            with everyone.failing_together():
                self.planner.note_strays(strayed)
        self._loop_together(batch, every_looped)
        return list(every_withheld)

    def _of_all_ranks(self, ended: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        """Collect what follows from a batch on each rank."""
        return self._sharding.ranks.gathered(ended)

    def _loop(self, batch: Examples, keys: Iterable[str], only: Objectives | None) -> None:
        # all ranks loop together, once each has taken part in the backward pass
        self._looped = {key: None if only is None else set(only[key]) for key in keys}

    def _loop_together(self, batch: Examples, looped: Sequence[Mapping[str, Collection[int] | None]]) -> None:
        """Run every example of every rank alone, on all ranks at once: FSDP2's mean of gradients is then its own."""
        ranks = self._sharding.ranks
        for rank, wanted in enumerate(looped):
            if not wanted:
                continue
            self.planner.refuse_whole(wanted)
            whole = self.examples.sent(batch if ranks.rank == rank else None, rank)
            parameters = {key: self._parameters[key] for key in wanted}
            with only_trainable(parameters.values()):
                for one in whole.singly():
                    for number, (objective, last) in enumerate(self._noted(self._answer(one), one)):
                        if objective is not None:
                            backward(objective.sum(), retain_graph=not last)
                            self._add_single(parameters, number, wanted)

    def _add_single(
        self, parameters: Mapping[str, nn.Parameter], number: int, wanted: Mapping[str, Collection[int] | None]
    ) -> None:
        for key, parameter in parameters.items():
            grad, numbers = take_grad(parameter), wanted[key]
            if grad is not None and (numbers is None or number in numbers):
                self._states.add_single(key, grad)

    def _noted(self, answer: Predictive | Tensor, batch: Examples) -> Iterator[tuple[Tensor | None, bool]]:
        """Give the objectives, equally many on all ranks; an error of one ends all before the backward pass."""
        ranks, everyone = self._sharding.ranks, self._sharding.everyone
        objectives = self._estimator.objectives(answer, batch.places)
        zeros: Tensor | None = None
        with everyone.failing_together():
            following = next(objectives, _END)
        while True:
            objective = None if following is _END else following
            with everyone.failing_together():
                if objective is not None:
                    self._note(objective, batch)
                following = _END if following is _END else next(objectives, _END)
            flags = torch.tensor([objective is not None, following is not _END], dtype=torch.uint8)
            any_now, any_later = map(bool, ranks.largest(flags).tolist())
            if any_now and objective is None:  # another rank has labels of more positions: this one adds nothing
                zeros = 0 * losses_of(answer) if zeros is None else zeros
                objective = zeros
            yield (objective if any_now else None), not any_later
            if not any_later:
                return


def _described(plan: Plan) -> list[tuple[str, str, list[str]]]:
    """Describe a plan in values that can be compared between ranks."""
    sites = [(site.path, type(site.layer).__name__, sorted(site.keys.values())) for site in plan.sites]
    return [*sites, *(("", "loop", [key]) for key in sorted(plan.loop))]


def _nested(plan: Plan, sharding: Sharding) -> dict[str, str]:
    """Say which parameters a module computes that runs once more, while units inside it hold their shards alone."""
    reasons: dict[str, str] = {}
    for site in plan.sites:
        if site.layer is None and (inside := sharding.units.units_inside(site.module)):
            reason = (
                f"{site.path} would run once more for each example, and FSDP2 shards {listed(inside)} inside it on "
                f"their own (to avoid this, call fully_shard on {site.path} alone)"
            )
            reasons |= dict.fromkeys(site.keys.values(), reason)
    return reasons
