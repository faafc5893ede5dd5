"""Sketches and squared batch gradients of a model that FSDP2 shards: one gradient of all ranks' losses together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fishkern.ops.dtypes import accumulates_in
from fishkern.statistics.autograd import backward, check_finite, only_trainable, summed, take_grad, with_last
from fishkern.statistics.autograd_pass import AutogradPass
from fishkern.statistics.base import Estimator
from fishkern.statistics.batches import Examples
from fishkern.statistics.known import Kind
from fishkern.statistics.predictive import Predictive
from fishkern.statistics.sharded_examples import SharedExamples
from fishkern.statistics.sharded_states import ShardedStates
from fishkern.statistics.sharding import Sharding


class ShardedSketch(AutogradPass):
    """Square the gradient that FSDP2 reduces over all ranks, whose batches of one step are one batch.

    Args:
        parameters: As for :class:`AutogradPass`.
        answer: As for :class:`AutogradPass`.
        estimator: As for :class:`AutogradPass`; it has equally many objectives for every batch.
        states: As for :class:`AutogradPass`.
        sharding: How the model is sharded.
        examples: Sends examples of one rank to all.
        joint: As for :class:`AutogradPass`.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        answer: Callable[[Examples], Predictive | Tensor],
        estimator: Estimator,
        states: ShardedStates,
        sharding: Sharding,
        examples: SharedExamples,
        **joint: Any,
    ) -> None:
        super().__init__(parameters, answer, estimator, states, **joint)
        self._sharding = sharding
        self.examples = examples
        self._seen: set[Kind] = set()

    def plan(self, batch: Examples | None, kinds: Sequence[Kind | None]) -> None:
        """Let the first examples of each kind of batch show on all ranks whether they interact.

        Args:
            batch: This rank's batch.
            kinds: The kind of each rank's batch; ``None`` where it has none.
        """
        for rank, kind in enumerate(kinds):
            if kind is not None and kind not in self._seen:
                self._seen.add(kind)
                few = self.examples.first(batch, rank)
                with only_trainable(self._parameters.values()), self._sharding.ranks.failing_together():
                    self._settle(few)

    def run(self, batch: Examples, *, own: bool = True) -> None:
        """Add one batch of each rank: together they are one batch.

        Args:
            batch: This rank's batch.
            own: Whether it counts.
        """
        weight = self._weight(batch, own=own)
        with only_trainable(self._parameters.values()), self._sharding.units.reducing_all():
            answer = self._connection.answered(lambda: self._answer(batch))
            for objective, last in with_last(self._estimator.objectives(answer, batch.places)):
                with self._sharding.ranks.failing_together():
                    check_finite(objective, batch.places)
                self.connected |= objective.requires_grad
                self.loss = self.loss + (summed(objective) if own else 0.0)
                backward(weight * objective.sum(), retain_graph=not last)
                self._add_gradients()

    def _weight(self, batch: Examples, *, own: bool) -> float:
        """Weigh this rank's objective: of a mean over a batch, by its part of the examples that all ranks run."""
        if self._of_examples:
            return float(own)
        counts = self._sharding.ranks.gathered(batch.num_examples if own else 0)
        return counts[self._sharding.ranks.rank] / sum(counts)

    def _add_gradients(self) -> None:
        ranks = self._sharding.ranks
        for key, parameter in self._parameters.items():
            grad, whole = take_grad(parameter), self._sharding.part(parameter) is None
            if grad is None and whole:
                grad = torch.zeros_like(parameter)
            if grad is not None:
                grad = grad.to(accumulates_in(grad.dtype))
                if whole:  # every rank has its own gradient of it
                    ranks.sum_(grad)
                else:  # FSDP2 gives the mean
                    grad *= ranks.count
                self._states.add_single(key, grad)
