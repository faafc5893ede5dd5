"""What a survey has seen of the first examples of a pass, for the steps that would otherwise run them once more.

These are the self-check, for which it stands in for a captured pass, and the result of the pass, which begins with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from fishkern.layers import PerExampleGrads, Replay, Site, groups
from fishkern.statistics.base import Estimator, State
from fishkern.statistics.batches import Examples
from fishkern.statistics.states import States


class Added(NamedTuple):
    """The first examples of a batch, which have been added to the states of a pass while its plan was made.

    Attributes:
        examples: How many they are.
        loss: Sum of their losses.
        connected: Whether it depends on the parameters.
    """

    examples: int
    loss: Tensor
    connected: bool


@dataclass
class Surveyed:
    """What a survey has back-propagated of some examples, and kept.

    Args:
        few: The examples.
        number: Number of the objective: type-2 has one for each label of a position.
        objective: The objective, ``[N]``; after :meth:`end` its values alone.
        connected: Whether it depends on the parameters.
        objectives: How many there are.
        replay: What is kept of calls and gradients; ``None`` if a capture has to run the examples once more.
        held_back: Whether a capture of it has held some gradients back.
        distrusted: Paths of modules whose row count turned out to depend on the data.
    """

    few: Examples
    number: int = 0
    objective: Tensor | None = None
    connected: bool = False
    objectives: int = 0
    replay: Replay | None = None
    held_back: bool = False
    distrusted: set[str] = field(default_factory=set)

    def counting(self, objectives: Iterator[Tensor | None]) -> Iterator[Tensor | None]:
        """Count the objectives while they are looked at.

        Args:
            objectives: All of the examples.

        Yields:
            Each.
        """
        self.objectives = 0
        for one in objectives:
            self.objectives += 1
            yield one

    def end(self) -> None:
        """Let go of the graph, when the survey has back-propagated."""
        self.connected, self.objective = self.objective.requires_grad, self.objective.detach()

    def states(
        self, sites: Sequence[Site], states: States, estimator: Estimator, counted: Tensor | None
    ) -> Iterator[tuple[str, State | None]]:
        """Give what capture adds to the state of each parameter, one after the other.

        Args:
            sites: The sites of a plan.
            states: States like which they are; unchanged.
            estimator: Of these states.
            counted: Which positions of the examples count, ``[N, T]``.

        Yields:
            For each parameter that has a state, its name and what is added; ``None`` if nothing is captured, as where
            what was kept is no longer what it was.
        """
        left = set(states.names)
        for group in groups(sites) if self.replay.is_intact else ():
            apart: dict[str, State] = {}

            def add(key: str, grads: PerExampleGrads, apart: dict[str, State] = apart) -> None:
                if key in left:
                    if key not in apart:
                        apart[key] = states.like(key, grads.device)
                    states.add(key, grads, apart[key])

            withheld = self._replayed(group, estimator, add, counted)
            for key in dict.fromkeys(key for site in group for key in site.keys.values() if key in left):
                left.remove(key)
                if key not in apart:
                    apart[key] = states.like(key, states.info(key).device)
                yield key, None if key in withheld else apart.pop(key)
        for key in left:
            yield key, None

    def add_to(self, states: States, sites: Sequence[Site], estimator: Estimator, counted: Tensor | None) -> None:
        """Add what capture gives of the examples.

        Args:
            states: Changed.
            sites: The sites of a plan.
            estimator: Of these states.
            counted: Which positions of the examples count, ``[N, T]``.
        """
        for group in groups(sites):
            self._replayed(group, estimator, states.add, counted)
        states.complete()

    def _replayed(
        self,
        sites: Sequence[Site],
        estimator: Estimator,
        add: Callable[[str, PerExampleGrads], None],
        counted: Tensor | None,
    ) -> frozenset[str]:
        parts = {"squares": estimator.reads == "squares", "factors": estimator.reads_factors}
        withheld, distrusted = self.replay.run(sites, add, counted=counted, **parts)
        self.held_back |= bool(withheld)
        self.distrusted |= distrusted
        return withheld
