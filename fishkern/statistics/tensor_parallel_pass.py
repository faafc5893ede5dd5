"""A pass over data with a model that several processes compute together: all take the same steps, on the same examples.

Forward and backward passes of such a model are collective operations. What follows from the values of a batch, of which
each process sees its part alone, they find out together; what they must find alike, is compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor, nn

from fishkern.layers import Plan, UnsupportedModuleError, leave_out
from fishkern.statistics.base import Estimator
from fishkern.statistics.batches import Examples
from fishkern.statistics.captured_pass import CapturedPass, Objectives
from fishkern.statistics.data import Data, Progress
from fishkern.statistics.head_logits import Onlooker
from fishkern.statistics.independence import Independence
from fishkern.statistics.one_pass import OnePass, Passed
from fishkern.statistics.planning import Answer, Planner
from fishkern.statistics.positions import counted_positions
from fishkern.statistics.predictive import Predictive
from fishkern.statistics.shards import Ranks
from fishkern.statistics.states import States
from fishkern.statistics.tensor_parallel import Team
from fishkern.statistics.undisturbed import Entered

_SAME_LOSS = 1e-2  # in 16 bits


@dataclass
class TensorParallelPass(OnePass):
    """One pass over the data with a model that several processes compute together.

    Args:
        team: The processes.
    """

    team: Team | None = None  # always given; a field after those with defaults needs one
    reuses: ClassVar[bool] = False

    def over(self, data: Data, ranks: Ranks, report: Progress) -> Passed:
        with ranks.failing_together():
            return super().over(data, self.team.data, report)

    def _agreed(self, losses: list[float]) -> list[float]:
        return agreed(losses, self.team.model)

    def _together(self, answer: Callable[..., Predictive | Tensor]) -> Callable[..., Predictive | Tensor]:
        """Run the model on all processes: an error of one of them in the loss ends the step on all."""

        def answered(batch: Examples, *onlooker: Onlooker) -> Predictive | Tensor:
            with self.team.model.failing_together():
                return answer(batch, *onlooker)

        return answered

    def _pass(
        self, answer: Callable[..., Predictive | Tensor], entered: Entered, independence: Independence
    ) -> CapturedPass:
        common = (self.requested, self._together(answer), self.estimator, self.states)
        counted = partial(counted_positions, self.model, self.estimator, self.answering)
        joint = {"check": self.check, "independence": independence, "connection": entered.connection}
        planner = Planner(self.model, *common, counted=counted, **joint)
        return TensorParallelCapture(*common, planner, self.team.model)


class TensorParallelCapture(CapturedPass):
    """Capture by plans that all processes share.

    Args:
        parameters: As for :class:`CapturedPass`.
        answer: As for :class:`CapturedPass`.
        estimator: As for :class:`CapturedPass`.
        states: As for :class:`CapturedPass`.
        planner: As for :class:`CapturedPass`.
        model: The processes.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        answer: Answer,
        estimator: Estimator,
        states: States,
        planner: Planner,
        model: Ranks,
    ) -> None:
        super().__init__(parameters, answer, estimator, states, planner)
        self._model = model
        self._checked: Plan | None = None

    def _capture(self, plan: Plan, batch: Examples, only: Objectives | None = None) -> dict[str, set[int]]:
        if plan is not self._checked:
            self._check(plan)
            self._checked = plan
        withheld = super()._capture(plan, batch, only)
        self._model.demand_equal({key: sorted(numbers) for key, numbers in withheld.items()}, "what is held back")
        return withheld

    def _check(self, plan: Plan) -> None:
        """Refuse plans that differ between processes, and sums over processes that come before single positions."""
        sites = [
            (site.path, type(site.layer).__name__, sorted(site.keys.values()), site.settled) for site in plan.sites
        ]
        self._model.demand_equal((sites, sorted(plan.loop)), "the paths of parameters")
        refuse_sums(plan, self._estimator)


def agreed(losses: list[float], model: Ranks) -> list[float]:
    """Give the losses that all processes of a model have found of the same examples. A collective operation.

    Args:
        losses: This process's.
        model: The processes.

    Returns:
        The losses of the first.

    Raises:
        UnsupportedModuleError: They differ.
    """
    every = model.gathered(losses)
    for rank, other in enumerate(every):
        if any(abs(a - b) > _SAME_LOSS * max(abs(a), abs(b)) for a, b in zip(every[0], other, strict=True)):
            raise UnsupportedModuleError(
                f"processes 0 and {rank} of the {len(every)} that compute one model find losses {every[0]} and "
                f"{other} of the same examples: its outputs are in parts. Let its last module gather them, by "
                "output_layouts=Replicate()."
            )
    return every[0]  # whose last bits may differ on devices


def refuse_sums(plan: Plan, estimator: Estimator) -> None:
    """Refuse single positions of what is summed over the positions or heads of several processes.

    Args:
        plan: A plan.
        estimator: The recipe.

    Raises:
        UnsupportedModuleError: The recipe squares single positions, and the plan has such sums.
    """
    summed = [site for site in plan.sites if site.layer is not None and site.layer.sums_processes]
    if summed and estimator.reads == "positions":
        keys = sorted(key for site in summed for key in site.keys.values())
        raise UnsupportedModuleError(
            f"unit='position' squares single positions, and {keys} are summed over the positions or heads of "
            f"several processes first. {leave_out(keys, by_autograd=False)}"
        )
