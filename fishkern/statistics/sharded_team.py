"""Models that FSDP2 shards and tensor parallel splits as well, over the axes of one mesh.

Processes along the last axis compute one model, on the same examples (a team); along the axes before it each has
examples of its own. So a rank does with the ranks of the same part what it does with all where FSDP2 shards alone, and
what follows from the values of a batch, of which the processes of a team see their parts, must be alike in a team.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fishkern import hosts
from fishkern.backend import Backend
from fishkern.layers import Plan
from fishkern.statistics.base import Estimator, ParameterInfo
from fishkern.statistics.data import Data, Progress
from fishkern.statistics.one_pass import Passed
from fishkern.statistics.sharded_pass import ShardedCapture, ShardedPass
from fishkern.statistics.sharded_states import ShardedStates
from fishkern.statistics.sharding import Sharding
from fishkern.statistics.shards import Ranks
from fishkern.statistics.tensor_parallel import Team, demand_alike
from fishkern.statistics.tensor_parallel_pass import agreed, refuse_sums


class ShardedTeamStates(ShardedStates):
    """States of parameters, of each the shard of this process's part.

    Args:
        parameters: As for :class:`ShardedStates`.
        estimator: As for :class:`ShardedStates`.
        backend: As for :class:`ShardedStates`.
        sharding: As for :class:`ShardedStates`.
        team: The processes.
    """

    def __init__(
        self,
        parameters: Mapping[str, ParameterInfo],
        estimator: Estimator,
        backend: Backend | None = None,
        *,
        sharding: Sharding,
        team: Team,
    ) -> None:
        self._team = team
        super().__init__(parameters, estimator, backend, sharding=sharding)

    def result(self, name: str, ranks: Ranks, count: int) -> Any:
        value = self.info(name).value
        result = super().result(name, self._team.data, count)
        if hosts.placed_over(value, self._team.mesh) is None:
            with self._sharding.everyone.failing_together():  # another team may find its shards alike, and go on
                demand_alike(name, value, hosts.local_part(result), self._team.model)
        if hosts.is_distributed(value) and not hosts.is_distributed(result):  # one that FSDP2 leaves alone
            return hosts.placed(result, value)
        return result


@dataclass
class ShardedTeamPass(ShardedPass):
    """One pass over the data with a model that FSDP2 shards and tensor parallel splits.

    Args:
        team: The processes.
    """

    team: Team | None = None  # always given; a field after those with defaults needs one

    def over(self, data: Data, ranks: Ranks, report: Progress) -> Passed:
        with ranks.failing_together():
            return super().over(data, self.team.data, report)

    def _agreed(self, losses: list[float]) -> list[float]:
        with self.sharding.everyone.failing_together():
            losses = agreed(losses, self.team.model)
        return super()._agreed(losses)

    def _capturing(self, *args: Any) -> ShardedCapture:
        return ShardedTeamCapture(*args, model=self.team.model)


class ShardedTeamCapture(ShardedCapture):
    """Capture by plans that all ranks share.

    Args:
        args: As for :class:`ShardedCapture`.
        model: The processes that compute one model.
    """

    def __init__(self, *args: Any, model: Ranks) -> None:
        super().__init__(*args)
        self._model = model

    def _check(self, plan: Plan) -> None:
        refuse_sums(plan, self._estimator)

    def _of_all_ranks(self, ended: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        with self._sharding.everyone.failing_together():
            self._model.demand_equal(ended, "what is held back")
        return super()._of_all_ranks(ended)
