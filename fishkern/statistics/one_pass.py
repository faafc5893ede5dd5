"""One pass over data: the batches of all ranks, added to the states of some parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from fishkern.statistics.answering import Answering
from fishkern.statistics.autograd_pass import AutogradPass
from fishkern.statistics.base import Estimator
from fishkern.statistics.batches import Examples
from fishkern.statistics.captured_pass import CapturedPass
from fishkern.statistics.computed_dtypes import ComputedDtypes
from fishkern.statistics.cutting import answering_parts
from fishkern.statistics.data import Data, Progress
from fishkern.statistics.following import Following
from fishkern.statistics.head_logits import Onlooker
from fishkern.statistics.independence import Independence
from fishkern.statistics.keeping import Keeper, Running
from fishkern.statistics.known import Known
from fishkern.statistics.planning import Planner
from fishkern.statistics.positions import counted_positions
from fishkern.statistics.predictive import Predictive
from fishkern.statistics.randomness import OwnRandomness
from fishkern.statistics.shards import Ranks
from fishkern.statistics.states import States
from fishkern.statistics.turns import Turn, turns
from fishkern.statistics.undisturbed import Entered, undisturbed


class Counts(NamedTuple):
    """What all ranks together have added up in a pass, and how many ranks with examples of their own they are."""

    units: int
    examples: int
    batches: int
    dropped: int
    ranks: int


class Passed(NamedTuple):
    """What is remembered of a pass.

    Args:
        counts: Of all ranks together.
        loss: Sum of this rank's losses.
        paths: Path and reason for each parameter.
        note: A remark for the provenance about how examples of a batch interact.
        half: Whether a part of the model computes in 16 bits.
    """

    counts: Counts
    loss: float
    paths: Mapping[str, tuple[str, str]]
    note: str | None
    half: bool


@dataclass
class OnePass:
    """One pass over the data.

    Args:
        model: Without running wrappers.
        requested: The parameters of this pass, by canonical name.
        estimator: The recipe.
        states: The states that it adds to.
        answering: Runs the model on a batch.
        check: As for :func:`fishkern.estimate`.
        known: What earlier passes have found out, and this one adds to; ``None`` if no later one will ask.
        keeper: Writes the checkpoint, from which the pass goes on; ``None`` for none.
        following: Follows entries of the states, and ends the pass when they are precise enough; ``None`` for none.
        in_step: The ranks that take turns together; by default each goes on by itself.

    Attributes:
        reuses: Whether one run of the first examples serves several steps before the first batch. If not, each step
            runs the model for itself, so that processes that compute it together take steps that do not depend on data.
    """

    model: nn.Module
    requested: Mapping[str, Tensor]
    estimator: Estimator
    states: States
    answering: Answering
    check: bool
    known: Known | None = None
    keeper: Keeper | None = None
    following: Following | None = None
    in_step: Ranks = field(default_factory=Ranks.alone)
    reuses: ClassVar[bool] = True

    def over(self, data: Data, ranks: Ranks, report: Progress) -> Passed:
        """Add every batch, on every rank.

        Args:
            data: This rank's batches.
            ranks: All ranks.
            report: Is told the number of examples done.

        Returns:
            What is remembered of it.

        Raises:
            ValueError: The data holds no example, or the loss depends on none of the parameters.
        """
        with ranks.failing_together(), undisturbed(self.model, self.requested.values()) as entered:
            units, one_pass, independence = self._run(data, entered, report)
        report.close()
        all_counts = ranks.gathered((units, data.examples, data.batches, data.dropped, 1))
        counts = Counts(*(sum(each) for each in zip(*all_counts, strict=True)))
        _demand_gradients(self.requested, one_pass, counts, ranks)
        half = independence.precision.half
        return Passed(counts, float(one_pass.loss), one_pass.paths, independence.note, half)

    def prepare(self, batch: Examples) -> Mapping[str, tuple[str, str]]:
        """Do what comes before the first batch, and add nothing.

        Args:
            batch: A batch on the model's device.

        Returns:
            Path and reason for each parameter.
        """
        with undisturbed(self.model, self.requested.values()) as entered:
            one_pass, independence = self._begin(entered)
            with OwnRandomness(next(iter(self.requested.values())).device).drawing():
                self.answering.begin(batch, independence.note_first if self.reuses else None)
                if self.answering.awaits(batch):
                    self.answering.meet(batch)
                one_pass.prepare(batch)
            self._keep(independence, entered)
        return one_pass.paths

    def _run(
        self, data: Data, entered: Entered, report: Progress
    ) -> tuple[int, AutogradPass | CapturedPass, Independence]:
        """Add this rank's batches; return the number of units, the pass, and what is known of its precision."""
        one_pass, independence = self._begin(entered)
        randomness = OwnRandomness(data.device)
        running = Running(one_pass, independence, self.states, self.answering, randomness, following=self.following)
        taken = self._turns(data) if self.keeper is None else self.keeper.over(data, running, report)
        for turn in taken:
            self._take(turn, data, running)
            units = self._units(turn)
            running.units += units[self.in_step.rank]
            if self.following is not None and not turn.again:
                self.following.add(units, turn.number)
                report.overlap = self.following.overlap
            report(data.examples)
            if self.following is not None and not turn.again and self.following.reached:
                break
        self._keep(independence, entered)
        return running.units, one_pass, independence

    def _turns(self, data: Data) -> Iterator[Turn]:
        """Read the data."""
        return turns(iter(data), self.in_step)

    def _units(self, turn: Turn) -> list[int]:
        """Count what each rank has added in a turn."""
        return [self.estimator.units(size) if size else 0 for size in turn.sizes]

    def _take(self, turn: Turn, data: Data, running: Running) -> None:
        """Run a batch, if there is one."""
        if (batch := turn.batch) is None:
            return
        randomness = running.randomness
        if data.batches == 1:
            if self.known is not None:
                self.known.demand_structure(batch)
            with randomness.aside():
                self.answering.begin(batch, running.independence.note_first if self.reuses else None)
        if self.answering.awaits(batch):
            with randomness.aside():
                self.answering.meet(batch)
        with randomness.drawing():  # the model's draws, not those of the data, come from the pass's own stream
            running.one_pass.run(batch)

    def _begin(self, entered: Entered) -> tuple[AutogradPass | CapturedPass, Independence]:
        answer_parts = answering_parts(self.answering)

        def answer(batch: Examples, *onlooker: Onlooker) -> Predictive | Tensor:
            entered.restore()
            return answer_parts(batch, *onlooker)

        by_labels = self.estimator.definition.get("fisher_type", "empirical") == "empirical"
        dtypes = ComputedDtypes(self.model)
        independence = Independence(self.model, answer, dtypes, by_labels=by_labels, agreed=self._agreed)
        if self.known is not None:
            self.known.begin(self.model, independence, entered.connection)
        return self._pass(answer, entered, independence), independence

    def _agreed(self, losses: list[float]) -> list[float]:
        """Give the losses by which all ranks judge whether examples interact: each has examples of its own."""
        return losses

    def _keep(self, independence: Independence, entered: Entered) -> None:
        if self.known is not None:
            self.known.keep(independence, entered.connection)

    def _pass(
        self, answer: Callable[..., Predictive | Tensor], entered: Entered, independence: Independence
    ) -> AutogradPass | CapturedPass:
        common = (self.requested, answer, self.estimator, self.states)
        joint = {"independence": independence, "connection": entered.connection, "known": self.known}
        if self.estimator.reads in ("sums", "batches"):
            return AutogradPass(*common, **joint)
        counted = partial(counted_positions, self.model, self.estimator, self.answering)
        planner = Planner(self.model, *common, counted=counted, check=self.check, reuses=self.reuses, **joint)
        return CapturedPass(*common, planner)


def _demand_gradients(
    requested: Mapping[str, Tensor], one_pass: AutogradPass | CapturedPass, counts: Counts, ranks: Ranks
) -> None:
    """Refuse a result of no examples, or of a loss without a gradient."""
    if not counts.units:
        raise ValueError("the data holds no example: batches was empty (an exhausted iterator, or max_examples=0).")
    if not any(ranks.gathered(one_pass.connected)):
        raise ValueError(
            f"the loss depends on none of the {len(requested)} requested parameters "
            f"({', '.join(list(requested)[:3])}, ...): it was computed without gradients, or these parameters are "
            "not used."
        )
