"""Preference pairs: which of two answers is the better one (DPO and its relatives)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fishkern import hosts
from fishkern.statistics.batches import Batch
from fishkern.statistics.contents import Place, rebuilt
from fishkern.statistics.labels import as_tensor
from fishkern.statistics.likelihood import CausalLM, Likelihood
from fishkern.statistics.pairs import ORDERS, PairedExamples, paired_examples
from fishkern.statistics.predictive import Bernoulli, Predictive
from fishkern.statistics.preference_losses import LOGITS, LOSSES, WITHOUT_REFERENCE, PairLogps, PairLoss

_OWN = ("completion_mask", "labels")


@dataclass(frozen=True)
class Preference(Likelihood):
    """The loss of a pair of answers, a chosen and a rejected one: DPO by default, or one of its relatives.

    **An example is a pair.** A batch is what TRL's ``DataCollatorForPreference`` makes: ``input_ids [2 N, T]``, first
    all chosen answers with their prompts and then all rejected ones, and a ``completion_mask`` of the same shape, which
    is 1 at the tokens of the answers (or ``labels``, -100 where a token does not count). The other entries have ``2 N``
    rows, or ``N``, one for each pair. Both answers run in one forward pass.

    The reference model's log-probabilities of the answers are data, summed over the tokens: entries ``[N]`` of the
    batch. TRL writes them with ``precompute_ref_log_probs=True``. :meth:`logps` computes them of any model::

        with torch.no_grad(), model.disable_adapter():  # the reference of a PEFT model is what it adapts
            batch["ref_chosen_logps"], batch["ref_rejected_logps"] = fk.Preference().logps(model, batch)

    Args:
        beta: Strength of the bond to the reference model; see the loss.
        loss: ``"sigmoid"`` (DPO), ``"ipo"``, ``"hinge"``, or without a reference model ``"simpo"`` and ``"orpo"``:
            their formulas and sources are in :mod:`fishkern.statistics.preference_losses`. Or a function
            ``(PairLogps, beta) -> losses [N]``.
        margin: By how much the logit of the chosen answer is to be above that of the rejected one, which is subtracted
            from it in ``"sigmoid"`` and ``"simpo"`` (gamma in SimPO).
        reference_logps: Names of the entries with the reference model's log-probabilities of the chosen and the
            rejected answers; ``None`` for zeros, as of a uniform reference. Losses without one do not read them.
        rows: ``"halves"``: all chosen answers come before all rejected ones; ``"interleaved"``: the rejected one
            follows each chosen one.

    ``"sigmoid"`` and ``"simpo"`` are the likelihood of which answer is the better one, given both, so that
    ``fisher_type="mc"`` and ``"type-2"`` are defined: ``p = sigmoid(logit)``. The others give the empirical Fisher.

    Raises:
        ValueError: An argument has another value than described.
    """

    reduction: Literal["sum"] = field(default="sum", init=False)
    beta: float = 0.1
    loss: str | PairLoss = "sigmoid"
    margin: float = 0.0
    reference_logps: tuple[str, str] | None = ("ref_chosen_logps", "ref_rejected_logps")
    rows: Literal["halves", "interleaved"] = "halves"

    has_own_loss: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not callable(self.loss) and self.loss not in (*LOGITS, *LOSSES):
            known = ", ".join(map(repr, (*LOGITS, *LOSSES)))
            raise ValueError(f"loss must be one of {known} or a function (PairLogps, beta) -> [N], got {self.loss!r}.")
        if not self.beta > 0 or not isfinite(self.beta):
            raise ValueError(f"beta must be a positive number, got {self.beta!r}.")
        if self.margin and self.loss not in LOGITS:
            raise ValueError(f"margin is of the losses {', '.join(map(repr, LOGITS))}, and the loss is {self._loss}.")
        names = self.reference_logps
        if names is not None and (len(names) != 2 or not all(isinstance(name, str) for name in names)):
            raise ValueError(f"reference_logps names two entries of a batch, or is None; got {names!r}.")
        if self.rows not in ORDERS:
            raise ValueError(f"rows must be 'halves' or 'interleaved', got {self.rows!r}.")

    @property
    def description(self) -> str:
        options = f"loss={self._loss}, beta={self.beta}"
        options += f", margin={self.margin}" if self.margin else ""
        options += ", no reference" if self.reference_logps is None and self._has_reference else ""
        return f"Preference({options})"

    @property
    def _loss(self) -> str:
        if isinstance(self.loss, str):
            return repr(self.loss)
        return getattr(self.loss, "__qualname__", type(self.loss).__name__)  # no address, which is another elsewhere

    @property
    def _has_reference(self) -> bool:
        return callable(self.loss) or self.loss not in WITHOUT_REFERENCE

    def read(self, content: Batch, number: int, is_shared: Callable[[Place], bool]) -> PairedExamples:
        """Read a batch of pairs, see :func:`fishkern.statistics.pairs.paired_examples`, with labels for the mask."""
        if isinstance(content, Mapping):
            others = {key: value for key, value in content.items() if key not in _OWN}
            content = rebuilt(content, {**others, "labels": self._labels(content)})
        return paired_examples(content, number, is_shared, ORDERS[self.rows])

    def predictive(self, model: nn.Module, batch: Batch) -> Predictive:
        logps = self._pair_logps(model, batch)
        if self.loss in LOGITS:
            return Better(LOGITS[self.loss](logps, self.beta) - self.margin, labels=None, mean=False)
        losses = (self.loss if callable(self.loss) else LOSSES[self.loss])(logps, self.beta)
        if not isinstance(losses, Tensor) or losses.shape != logps.chosen.shape:
            got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(
                f"the loss function of Preference must return one loss for each pair, {tuple(logps.chosen.shape)}, and "
                f"{self._loss} returned {got}."
            )
        return LossesAlone(losses, f"Preference(loss={self._loss})")

    def labelled(self, batch: Batch) -> Tensor:
        """As for any likelihood, of both rows of each pair: ``[2 N, T]``."""
        return CausalLM().labelled(self._rows(batch))

    def logps(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Compute the log-probabilities of the answers, as of a reference model.

        Args:
            model: A language model. Its modes are left as they are: a reference is to be in evaluation mode.
            batch: As above, on the model's device, without ``reference_logps`` or with them.

        Returns:
            Of the chosen and of the rejected answers, the sums over their tokens, ``[N]`` each.

        Raises:
            ValueError: The model has an encoder and a decoder, or the batch does not say which tokens are the answers'.
        """
        logps = self._pair_logps(model, batch, referring=False)
        return logps.chosen, logps.rejected

    def _pair_logps(self, model: nn.Module, batch: Batch, *, referring: bool = True) -> PairLogps:
        base = hosts.base_model(model)
        if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
            raise ValueError(
                f"{type(base).__name__} has an encoder and a decoder, and Preference reads pairs of a model that "
                "continues its prompt: pass a function (model, batch) -> losses [N] that computes the loss."
            )
        rows = CausalLM(reduction="sum").predictive(model, self._rows(batch))
        chosen, rejected = self._chosen_and_rejected(-rows.losses())
        # the first token of a row has no log-probability, unless the model puts positions of its own before it
        tokens = self._chosen_and_rejected((rows.labels != -100).sum(1).clamp_min(1).to(chosen))
        references = self._references(batch, chosen) if referring else [torch.zeros_like(chosen)] * 2
        return PairLogps(chosen, rejected, *references, *tokens)

    def _references(self, batch: Batch, like: Tensor) -> tuple[Tensor, Tensor]:
        if self.reference_logps is None or not self._has_reference:
            return torch.zeros_like(like), torch.zeros_like(like)
        if missing := [name for name in self.reference_logps if batch.get(name) is None]:
            raise ValueError(
                f"Preference(loss={self._loss}) needs the reference model's log-probabilities in every batch, and "
                f"there is no {missing[0]!r}: compute them before (TRL: precompute_ref_log_probs=True; or "
                "fishkern.Preference().logps(reference, batch)), name the entries in reference_logps=, or take "
                "reference_logps=None for none."
            )
        values = [as_tensor(batch[name]).to(like) for name in self.reference_logps]
        for name, one in zip(self.reference_logps, values, strict=True):
            if one.shape != like.shape:
                raise ValueError(
                    f"{name!r} must be one log-probability for each pair, {tuple(like.shape)}, summed over the tokens "
                    f"of its answer; got {tuple(one.shape)}."
                )
        return values[0], values[1]

    def _rows(self, batch: Batch) -> dict[str, Any]:
        """Give what a language model takes of a batch, with the labels of its rows."""
        dropped = (*_OWN, *(self.reference_logps or ()), "ref_chosen_logps", "ref_rejected_logps")
        return {**{key: value for key, value in batch.items() if key not in dropped}, "labels": self._labels(batch)}

    def _labels(self, batch: Batch) -> Tensor:
        """Give the tokens of the answers, ``[2 N, T]``, -100 elsewhere."""
        marked = ("input_ids", "completion_mask")
        entries = batch if isinstance(batch, Mapping) else {}
        if entries.get("labels") is None and any(entries.get(key) is None for key in marked):
            raise ValueError(
                "preference pairs need a 'completion_mask' or 'labels' in every batch, which say which tokens are "
                "those of the answers: take TRL's DataCollatorForPreference, or make them as it does."
            )
        if entries.get("shift_labels") is not None:
            raise ValueError(
                "the tokens of answers are those that 'completion_mask' or 'labels' mark, and this batch has "
                "'shift_labels' as well: leave them out."
            )
        labels, mask = (None if entries.get(key) is None else as_tensor(entries[key]) for key in _OWN[::-1])
        if labels is not None and (mask is None or torch.equal(labels.cpu() != -100, mask.cpu() != 0)):
            return labels
        if labels is not None:
            raise ValueError(
                "'labels' and 'completion_mask' of preference pairs mark other tokens: give one of the two, or the "
                "label -100 where the mask is 0 and there alone."
            )
        ids = as_tensor(entries["input_ids"])
        if ids.shape != mask.shape:
            raise ValueError(
                f"completion_mask must be of the shape of input_ids, {tuple(ids.shape)}, got {tuple(mask.shape)}."
            )
        return ids.masked_fill(mask.to(ids.device) == 0, -100)

    def _chosen_and_rejected(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Divide one value for each row, ``[2 N]``, into those of chosen and of rejected answers."""
        both = values.view(2, -1) if self.rows == "halves" else values.view(-1, 2).mT
        return both[0], both[1]


@dataclass(frozen=True)
class Better(Bernoulli):
    """Whether the chosen answer is the better one of its pair: the data say yes, by what they call chosen."""

    def losses(self) -> Tensor:
        return self._at(torch.ones_like(self.logits))


@dataclass(frozen=True)
class LossesAlone(Predictive):
    """Losses without a distribution of labels.

    Args:
        values: ``[N]``, differentiable.
        source: Whose losses they are, for the message.
    """

    values: Tensor
    source: str

    def losses(self) -> Tensor:
        return self.values

    @property
    def draws_per_example(self) -> int:
        raise self._refusal()

    def drawn_losses(self, uniform: Tensor) -> Tensor:
        raise self._refusal()

    @property
    def label_passes(self) -> int:
        raise self._refusal()

    def label_losses(self) -> Iterator[Tensor | None]:
        raise self._refusal()

    def _refusal(self) -> ValueError:
        return ValueError(
            f"{self.source} is no likelihood of labels, so fisher_type='mc' and 'type-2' are not defined: take "
            "loss='sigmoid' or 'simpo', or fisher_type='empirical'."
        )
