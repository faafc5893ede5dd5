"""How processes divide a model, and by which states and passes each of them then does its part.

====================  =======================  ======================  ====================
FSDP2 shards          tensor parallel splits   states                  pass
====================  =======================  ======================  ====================
no                    no                       States                  OnePass
yes                   no                       ShardedStates           ShardedPass
no                    yes                      TensorParallelStates    TensorParallelPass
yes                   yes                      ShardedTeamStates       ShardedTeamPass
====================  =======================  ======================  ====================
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fishkern.backend import Backend
from fishkern.statistics.base import Estimator, ParameterInfo
from fishkern.statistics.data import Data
from fishkern.statistics.following import Following
from fishkern.statistics.one_pass import OnePass
from fishkern.statistics.sharded_following import ShardedFollowing
from fishkern.statistics.sharded_pass import ShardedPass
from fishkern.statistics.sharded_states import ShardedStates
from fishkern.statistics.sharded_team import ShardedTeamPass, ShardedTeamStates
from fishkern.statistics.sharding import Sharding
from fishkern.statistics.shards import Ranks
from fishkern.statistics.states import States
from fishkern.statistics.tensor_parallel import SameData, Team, TensorParallelStates
from fishkern.statistics.tensor_parallel_pass import TensorParallelPass

_KINDS: dict[tuple[bool, bool], tuple[type[States], type[OnePass]]] = {
    (False, False): (States, OnePass),
    (True, False): (ShardedStates, ShardedPass),
    (False, True): (TensorParallelStates, TensorParallelPass),
    (True, True): (ShardedTeamStates, ShardedTeamPass),
}


@dataclass(frozen=True, eq=False)
class Division:
    """How processes divide a model.

    Args:
        ranks: All processes.
        sharding: How FSDP2 shards it; ``None`` where it does not.
        team: The processes over which tensor parallel splits it; ``None`` where it does not.
    """

    ranks: Ranks
    sharding: Sharding | None = None
    team: Team | None = None

    def data(self, *args: Any) -> Data:
        """Make the data of this process.

        Args:
            args: As for :class:`Data`, without the ranks.

        Returns:
            The data, which all processes of a team must have alike.
        """
        return Data(*args, self.ranks) if self.team is None else SameData(*args, self.team)

    def states(self, infos: Mapping[str, ParameterInfo], estimator: Estimator, backend: Backend | None) -> States:
        """Make the states of parameters.

        Args:
            infos: The parameters, by canonical name.
            estimator: As for :class:`States`.
            backend: As for :class:`States`.

        Returns:
            The states, of what this process holds.
        """
        return self._kinds[0](infos, estimator, backend, **self._how)

    def one_pass(self, *args: Any, in_step: Ranks | None = None, **options: Any) -> OnePass:
        """Make a pass.

        Args:
            args: As for :class:`OnePass`.
            in_step: The ranks that take turns together, where the division does not say so; ``None`` for none.
            options: As for :class:`OnePass`.

        Returns:
            The pass.
        """
        if self.sharding is not None:
            in_step = self.sharding.ranks
        if in_step is not None:
            options["in_step"] = in_step
        return self._kinds[1](*args, **options, **self._how)

    def following(self, states: States, **options: Any) -> Following:
        """Follow entries of states.

        Args:
            states: Of a division without a team.
            options: As for :class:`Following`.

        Returns:
            What follows them.
        """
        return (Following if self.sharding is None else ShardedFollowing)(states, **options)

    @property
    def _kinds(self) -> tuple[type[States], type[OnePass]]:
        return _KINDS[self.sharding is not None, self.team is not None]

    @property
    def _how(self) -> dict[str, Any]:
        how = {"sharding": self.sharding, "team": self.team}
        return {name: value for name, value in how.items() if value is not None}
