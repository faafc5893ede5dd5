"""One task of a comparison: the runs that are missing of it, and the arms that failed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.engine.records import Record
from benchmarks.studies.comparing.limit import Limit, say
from benchmarks.studies.comparing.runs import CHOOSING_SEED, Log, Step, stages

Run = Callable[[str, float, int, bool], Record]
"""From an arm, a learning rate, a seed, and whether it chooses the rate, to what was measured."""


class Part:
    """The runs of one task.

    Args:
        task: Its name.
        arms: Those to run, the most important first.
        seeds: Of each arm.
        log: The records.
        run: Makes a run.
    """

    def __init__(self, task: str, arms: Sequence[str], seeds: int, log: Log, run: Run) -> None:
        self.task, self.arms, self.log = task, list(arms), log
        self._seeds, self._run = seeds, run
        self.failed: dict[str, str] = {}  # by arm, why; the rest of it is left out, and nothing is recorded

    def complete(self, stage: int, limit: Limit) -> None:
        """Make the runs of a stage that are missing."""
        for step in stages(self.arms, self.log.rates, self._seeds)[stage]:
            if step.arm in self.failed or self.log.find(step):
                continue
            if not limit.allows():
                return
            self._complete(step, limit)

    def try_arms(self) -> list[str]:
        """Take a few steps of each arm, record nothing, and give a line for each that failed."""
        raise NotImplementedError

    def rehearse(self, once: Callable[[str], str]) -> list[str]:
        """Try each arm, and record nothing.

        Args:
            once: Takes a few steps of an arm with few rows, and says what it took.

        Returns:
            A line for each arm that failed.
        """
        failed = []
        for arm in self.arms:
            try:
                took = once(arm)
            except Exception as error:  # the others are tried, too
                failed.append(f"{self.task}: {arm} fails: {type(error).__name__}: {error}")
                continue
            say(f"{self.task}: {arm}: {took}")
        return failed

    def _complete(self, step: Step, limit: Limit) -> None:
        lr = step.lr or self.log.best_rate(step.arm)
        say(f"{self.task}: {step.arm}, lr {lr:g}, seed {step.seed}")
        try:
            with limit.timed():
                measured = self._run(step.arm, lr, step.seed, step.seed == CHOOSING_SEED)
        except Exception as error:  # one arm that cannot run leaves the others
            self.failed[step.arm] = f"{self.task}: {step.arm} fails: {type(error).__name__}: {error}"
            say(self.failed[step.arm])
            return
        self.log.append(step._replace(lr=lr), measured)
