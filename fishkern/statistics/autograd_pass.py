"""The pass of estimators that do not need single examples: one gradient of each objective, by ordinary autograd."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

from torch import Tensor, nn

from fishkern.layers import Connection, DenseGrads, is_wrapped, without_gradient
from fishkern.statistics.autograd import backward, check_finite, only_trainable, summed, take_grad, with_last
from fishkern.statistics.base import Estimator
from fishkern.statistics.batches import Examples
from fishkern.statistics.independence import Independence
from fishkern.statistics.known import Kind, Known
from fishkern.statistics.planning import Answer
from fishkern.statistics.states import States


class AutogradPass:
    """Back-propagate each objective as a whole.

    Args:
        parameters: The parameters to differentiate by, by canonical name.
        answer: Runs the model on a batch.
        estimator: The recipe.
        states: The states that it adds to.
        independence: Checks that the loss of an example is its own; used only for sums over examples.
        connection: Lets gradients reach segments under reentrant checkpointing.
        known: What earlier passes have found out; ``None`` for nothing, and to keep nothing.

    Attributes:
        paths: Path and reason for each parameter.
        connected: Whether a loss depends on these parameters.
        loss: Sum of all losses.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        answer: Answer,
        estimator: Estimator,
        states: States,
        *,
        independence: Independence,
        connection: Connection,
        known: Known | None = None,
    ) -> None:
        self._parameters = parameters
        self._answer = answer
        self._estimator = estimator
        self._states = states
        self._independence = independence
        self._connection = connection
        self._known = known
        of_examples = estimator.reads == "sums"
        self._of_examples = of_examples
        self.paths = dict.fromkeys(parameters, ("sketch" if of_examples else "batch", ""))
        self.connected = False
        self.loss: Tensor | float = 0.0

    @property
    def learned(self) -> Hashable:
        """What changes when a batch shows something on which later ones depend."""
        return self._independence.learned, self._connection.connected

    def prepare(self, batch: Examples) -> None:
        """Do what comes before the first batch, and meet the segments under reentrant checkpointing.

        Args:
            batch: A batch, of which nothing is added.
        """
        with only_trainable(self._parameters.values()):
            self._connection.answered(lambda: self._answer(batch))
            self._settle(batch)

    def run(self, batch: Examples) -> None:
        """Add one batch.

        Args:
            batch: The batch.

        Raises:
            UnsupportedModuleError: A parameter is of a tensor subclass to which autograd gives no gradient.
        """  # noqa: DOC501
        with only_trainable(self._parameters.values()):
            self._settle(batch)
            answer = self._connection.answered(lambda: self._answer(batch))
            for objective, last in with_last(self._estimator.objectives(answer, batch.places)):
                check_finite(objective, batch.places)
                self.connected |= objective.requires_grad
                self.loss = self.loss + summed(objective)  # read once, at the end
                backward(objective.sum(), retain_graph=not last)
                for key, parameter in self._parameters.items():
                    if (grad := take_grad(parameter)) is not None:
                        self._states.add(key, DenseGrads(grad[None]))
                    elif is_wrapped(parameter):
                        raise without_gradient(key, parameter)

    def _settle(self, batch: Examples) -> None:
        """Let the first batch of several examples show whether they interact, if this matters.

        A batch as a unit may be anything, but the losses of packed documents are of each alone.
        """
        matters = self._of_examples or batch.documents is not None
        if not matters or not self._independence.awaits(batch):
            return
        few = batch.few
        kind = Kind(few.num_examples == 1, few.kind)
        if self._known is None or not self._known.has_seen(kind, few):
            with self._independence.precision.noting():
                self._independence.note_together(self._answer(few))
            self._independence.settle(few)
        if self._known is not None:
            self._known.note_seen(kind, few)
        self._independence.take_for_granted(few)
