"""Run the model on a batch: its predictive distribution or its losses, with the loss checked once."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fishkern import hosts
from fishkern.statistics.batches import Batch, Examples, another_reading
from fishkern.statistics.chunked_head import ChunkedHead, chunked_head, logits_of_answer
from fishkern.statistics.cutting import answering_parts
from fishkern.statistics.drawn import Drawn, LossFunction, losses_by_function
from fishkern.statistics.head_logits import Onlooker
from fishkern.statistics.labels import UnknownLabelError
from fishkern.statistics.likelihood import Likelihood, recognise_likelihood
from fishkern.statistics.likelihood_argument import checked_likelihood, described
from fishkern.statistics.notes import note_choice, note_labels, note_probabilities
from fishkern.statistics.outputs import own_loss
from fishkern.statistics.predictive import Categorical, PackedCategorical, Predictive
from fishkern.warning import warn_caller

Told = Callable[[int, Predictive | Tensor], None]

# Where transformers leaves a loss in 16 bits, it is rounded a few times. Otherwise it is computed in float32, also in
# float64 models, from sums over many positions in another order.
_ROUNDINGS_16_BIT, _ROUNDINGS = 4, 64


class Answering:
    """Run the model on a batch, and return its predictive distribution or its losses.

    Args:
        model: In evaluation mode.
        likelihood: The loss of an example; ``None``: recognised from the model and its first batch.

    Attributes:
        prepared: Whether :meth:`prepare` has run.

    Raises:
        TypeError: ``likelihood`` is not a likelihood.
    """

    def __init__(self, model: nn.Module, likelihood: Likelihood | LossFunction | Drawn | None) -> None:
        self._model = model
        self._likelihood = checked_likelihood(likelihood)
        self._named = likelihood is not None
        self._usual = 1
        self._head: ChunkedHead | None = None
        self.prepared = False

    def begin(self, batch: Examples, told: Told | None = None) -> None:
        """Begin to read data: :meth:`prepare`, unless that was done on earlier data.

        Args:
            batch: The first batch of the data.
            told: As for :meth:`prepare`.
        """
        if not self.prepared:
            self.prepare(batch, told)
        if self._head is not None:
            self._head.said = None
        self._usual = batch.num_examples

    def awaits(self, batch: Examples) -> bool:
        """Tell whether a batch is the first one whose logits are large.

        Args:
            batch: A batch; the first one of the data has been prepared for.

        Returns:
            Whether :meth:`meet` has to find out if the model runs without them.
        """
        return self._head is not None and self._head.awaits(batch)

    def meet(self, batch: Examples) -> None:
        """Find out whether the model runs without its logits.

        Args:
            batch: The first batch whose logits are large.
        """
        self._head.meet(batch)

    @property
    def learned(self) -> Hashable:
        """What changes when a batch settles how the logits of later ones are computed."""
        return self._head is not None and self._head.tried

    @property
    def said_of_logits(self) -> str | None:
        """How large logits were computed, in words; ``None`` if none were large."""
        return None if self._head is None else self._head.said

    def go_on(self, said: str | None) -> None:
        """Go on where an earlier run was.

        Args:
            said: :attr:`said_of_logits` then.
        """
        if self._head is not None:
            self._head.said = said

    def prepare(self, batch: Examples, told: Told | None = None) -> None:
        """Recognise the likelihood, and compare the loss of one example with the model's own.

        Args:
            batch: The first batch.
            told: Called with the index of the first example in the data and what the model answers for it alone, if it
                has others beside it and is no packed document.

        Raises:
            ValueError: The model's loss is unknown or different; or the outputs of the model or of a function are cut
                off from the parameters.

        Warns:
            UserWarning: The likelihood was named and the model's own loss is different; or labels include padding; or
                the outputs look like probabilities instead of logits.
        """
        self._usual = batch.num_examples
        if self._likelihood is None:
            self._likelihood = recognise_likelihood(self._model, batch.content)
        answers: list[Predictive | Tensor] = []
        refusal = answering_parts(partial(self._prepare_on, answers=answers), self)(batch.take(0, 1))
        if refusal:  # raised here: inside answering_parts it would be reported as an error of cut rows
            raise ValueError(refusal)
        if told is not None and batch.documents is None and batch.num_examples > 1:  # here for the same reason
            told(batch.places[0], answers[-1])
        if isinstance(self._likelihood, Likelihood):
            note_labels(self._model, self._likelihood, batch.content)
        self.prepared = True

    def _prepare_on(self, example: Examples, answers: list[Predictive | Tensor]) -> str | None:
        """Run an example, note the answer, and say why its loss cannot be used, or return ``None``."""
        with _differentiable(self._model):
            if isinstance(self._likelihood, Likelihood):
                return self._prepare_likelihood(example, answers)
            losses = self(example)
            answers.append(losses)
            return _cut_off(f"the losses of {self.description}") if self._is_cut_off(losses) else None

    def _is_cut_off(self, outputs: Tensor) -> bool:
        """Tell whether the outputs have no gradient. With weights stored as integers, only a pass can tell."""
        return not outputs.requires_grad and all(p.is_floating_point() for p in self._model.parameters())

    def _prepare_likelihood(self, example: Examples, answers: list[Predictive | Tensor]) -> str | None:
        returned: list[Any] = []
        handle = self._model.register_forward_hook(lambda _, args, outputs: returned.append(outputs))
        try:
            self._likelihood = self._likelihood.settled(self._model, example.copied())
            self._head = chunked_head(self._model, self._likelihood)
            with nullcontext([]) if self._head is None else self._head.confirming() as logits:
                answer = self._likelihood.predictive(self._model, example.copied())
                logits += logits_of_answer(answer)
        except UnknownLabelError as error:
            raise error.at(f"row 0 of a batch of {self._usual}") from None
        finally:
            handle.remove()
        answers.append(answer)
        note_choice(self._model, returned[-1] if returned else None)
        outputs = getattr(answer, "logits", getattr(answer, "means", None))
        if isinstance(outputs, Tensor):
            if self._is_cut_off(outputs):
                return _cut_off(f"the outputs of {type(self._model).__name__}")
            if isinstance(answer, Categorical):
                note_probabilities(self._likelihood, outputs)
        return _compare_with_own_loss(self._model, self._likelihood, answer, example.copied(), named=self._named)

    @property
    def likelihood(self) -> Likelihood | LossFunction | Drawn | None:
        """The likelihood; ``None`` if it is still to be recognised."""
        return self._likelihood

    @property
    def description(self) -> str:
        """The likelihood, for the provenance."""
        return described(self._likelihood)

    def __call__(self, batch: Examples, onlooker: Onlooker | None = None) -> Predictive | Tensor:
        """Run the model on a batch.

        Args:
            batch: The batch.
            onlooker: Looks on meanwhile, and in the backward pass.

        Returns:
            Its distribution or its losses ``[N]``.

        Raises:
            ValueError: A function gives no loss for each example, or a likelihood no distribution of packed documents.
        """
        if isinstance(self._likelihood, Likelihood):
            answer = self._predictive(batch.copied(), onlooker)
            if batch.documents is not None and not isinstance(answer, PackedCategorical):
                raise ValueError(
                    f"{type(self._likelihood).__name__} gives a {type(answer).__name__} of rows, and the rows of this "
                    "batch are packed: give a PackedCategorical of their documents, or use a collator that keeps one "
                    "example in each row."
                )
            return answer
        losses = losses_by_function(self._likelihood, self._model, batch)
        N = batch.num_examples
        if isinstance(losses, Tensor) and losses.shape == () and self._usual == N == 1:
            return losses[None]  # with one example in each batch, the batch's mean is the example's loss
        if not isinstance(losses, Tensor) or losses.shape != (N,):
            raise ValueError(_not_one_for_each(losses, N) + another_reading((batch.cut_from or batch).content))
        return losses

    def _predictive(self, batch: Batch, onlooker: Onlooker | None) -> Predictive:
        if self._head is None:
            return self._likelihood.predictive(self._model, batch)
        return self._head.predictive(batch, onlooker)


def _not_one_for_each(losses: object, N: int) -> str:
    """Say what a likelihood function returned instead of ``[N]``, and how to correct it."""
    where = f"a batch of {N}"
    expected = f"the likelihood function must return one loss for each example, a tensor of shape ({N},)"
    if isinstance(losses, Tensor) and losses.ndim and losses.shape[0] == N:
        shape = tuple(losses.shape)
        return f"{expected}; for {where} came {shape}: sum or average over the other axes, losses.flatten(1).mean(1)."
    if isinstance(losses, Tensor) and losses.ndim == 1 and len(losses) and len(losses) % N == 0:
        return (
            f"{expected}; for {where} came {len(losses)} values: average those of each example, losses.view({N}, "
            "-1).mean(1)."
        )
    if (
        isinstance(losses, list | tuple)
        and len(losses) == N
        and all(isinstance(one, Tensor) and one.numel() == 1 for one in losses)
    ):
        return f"{expected}; for {where} came a {type(losses).__name__} of {N} tensors: write torch.stack(losses)."
    if not isinstance(losses, Tensor | float):
        return f"{expected}; for {where} came {type(losses).__name__}: return the losses alone."
    if isinstance(losses, Tensor):
        got = "one number" if losses.numel() == 1 else f"{tuple(losses.shape)}"
    else:
        got = type(losses).__name__
    return f"{expected}; for {where} came {got}: do not sum or average over the batch (reduction='none')."


@contextmanager
def _differentiable(model: nn.Module) -> Iterator[None]:
    """Let every parameter that can require a gradient do so, and restore all afterwards."""
    states = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in states:
            parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
        yield
    finally:
        for parameter, required in states:
            parameter.requires_grad_(required)


def _cut_off(what: str) -> str:
    return (
        f"{what} are cut off from the parameters, so no gradient arrives: torch must compute them from the parameters, "
        "without detach(), item(), numpy(), argmax() or no_grad()."
    )


def _compare_with_own_loss(
    model: nn.Module, likelihood: Likelihood, answer: Predictive, example: Batch, *, named: bool
) -> str | None:
    """Compare a loss with the one that the model returns for the example, to the rounding of its dtype.

    A recognised loss must be the model's own. A named one is the user's decision: a difference is only noted.

    Returns:
        Why a recognised loss cannot be used, or ``None``.
    """
    if not likelihood.has_own_loss:
        return None
    own = None
    # the model may not accept the labels of a named loss: then there is no loss of its own to compare with
    with suppress(IndexError, RuntimeError, TypeError, ValueError) if named else nullcontext():
        own = own_loss(model, example, numbers=likelihood.labels_are_numbers)
    if own is None:
        return None
    # the model returns a mean over positions, whatever reduction the statistics are of
    answer = replace(answer, mean=True) if hasattr(answer, "mean") else answer
    ours = answer.losses()[0].item()
    if not math.isfinite(ours):
        return None
    half = own.dtype in (torch.float16, torch.bfloat16)
    tolerance = _ROUNDINGS_16_BIT * torch.finfo(own.dtype).eps if half else _ROUNDINGS * torch.finfo(torch.float32).eps
    if abs(ours - own.item()) <= tolerance * max(1.0, abs(own.item())):
        return None
    kind = type(likelihood).__name__
    numbers = f"the loss of the first example is {ours:.6g} by {kind} and {own.item():.6g} by the model itself"
    if not math.isfinite(own.item()):
        why = "the model's own is not finite, though its logits are"
    else:
        why = hosts.added_loss(model) or (
            "the model's holds more than that (an auxiliary loss, label smoothing, another shift)"
        )
    if named:
        warn_caller(f"{numbers}: {why}. As {kind} was named, the statistics are of its loss alone.")
        return None
    return (
        f"{numbers}: they should agree, but {why}. For the loss of the labels alone name it, "
        f"likelihood=fishkern.{kind}(); for another, pass a function (model, batch) -> losses [N] that computes it."
    )
