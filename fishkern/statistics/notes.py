"""Warnings about a first batch that runs, but is probably a mistake. Each is one warning."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fishkern import hosts
from fishkern.statistics.batches import Batch
from fishkern.statistics.likelihood import CausalLM, Likelihood, MaskedLM, Seq2SeqLM
from fishkern.warning import warn_caller


def note_labels(model: nn.Module, likelihood: Likelihood, batch: Batch) -> None:
    """Note labels of tokens that count padding, or that were shifted already.

    Args:
        model: The model.
        likelihood: The likelihood that reads the labels.
        batch: The first batch.
    """
    inputs, labels, mask = _texts(batch)
    if not isinstance(likelihood, CausalLM | MaskedLM | Seq2SeqLM) or labels is None:
        return
    counted = labels != -100
    if mask is not None and (hidden := int((counted & (mask == 0)).sum())):
        warn_caller(
            f"{hidden} labels of the first batch are where its attention_mask is 0: padding counts as text, also in "
            "the model's own loss. Mark it with the label -100."
        )
    elif (pad := hosts.padding_token(model)) is not None and (padding := int((labels == pad).sum())):
        warn_caller(
            f"{padding} labels of the first batch are the padding token {pad}: padding counts as text, also in the "
            "model's own loss. Mark it with the label -100."
        )
    if isinstance(likelihood, CausalLM) and inputs is not None and _shifted(inputs, labels):
        warn_caller(
            "the labels of the first batch are its inputs shifted by one, and CausalLM shifts them itself, so it "
            "predicts the token after the next: pass unshifted labels, or name fishkern.TokenClassification(), which "
            "does not shift."
        )


def note_choice(model: nn.Module, outputs: Any) -> None:
    """Note which of several tensors of a plain tuple is used as the logits; in transformers' tuples they are first.

    Args:
        model: The model.
        outputs: Its output for one example.
    """
    if not isinstance(outputs, tuple | list) or hasattr(outputs, "_fields") or hosts.task(model) is not None:
        return
    first, *others = [tuple(one.shape) for one in outputs if isinstance(one, Tensor) and one.ndim > 1] or [()]
    if others:
        warn_caller(
            f"{type(model).__name__} returned a tuple, of which the first tensor was taken for the logits, of shape "
            f"{first} for one example, and not {', '.join(map(str, others))}: return a mapping with 'logits' where it "
            "is another."
        )


def note_probabilities(likelihood: Likelihood, logits: Tensor) -> None:
    """Note outputs that look like probabilities: the loss would apply a second softmax.

    Args:
        likelihood: The likelihood that reads the logits.
        logits: ``[1, L, C]``.
    """
    sums = logits.detach().sum(-1)
    if logits.shape[-1] > 1 and bool((logits >= 0).all() and torch.isclose(sums, torch.ones_like(sums)).all()):
        warn_caller(
            f"the model's outputs look like probabilities (not negative, and 1 in sum), and "
            f"{type(likelihood).__name__} takes logits: leave the softmax out, or pass likelihood= as a function "
            "(model, batch) -> losses [N]."
        )


def note_own_tokens(withheld: Collection[str]) -> None:
    """Note entries that are withheld from the model, because they would make an example's loss depend on its batch.

    Args:
        withheld: Their names.
    """
    if withheld:
        warn_caller(
            f"the batches hold {', '.join(map(repr, sorted(withheld)))}, which the model does not get: the loss of "
            "an example is that of its own tokens."
        )


def _texts(batch: Batch) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the inputs, labels and mask of a batch of tokens, each ``[N, T]`` or ``None``."""
    if isinstance(batch, Mapping):
        entries = [batch.get(key) for key in ("input_ids", "labels", "attention_mask")]
    else:
        entries = [batch[0], batch[1], None]
    inputs, labels, mask = (one if isinstance(one, Tensor) and one.ndim == 2 else None for one in entries)
    if labels is None:
        return None, None, None
    inputs, mask = (one if one is not None and one.shape == labels.shape else None for one in (inputs, mask))
    return inputs, labels, mask


def _shifted(inputs: Tensor, labels: Tensor) -> bool:
    """Tell whether each label is the token after its input, and not the input itself."""
    counted = labels[:, :-1] != -100
    follows = (labels[:, :-1] == inputs[:, 1:])[counted]
    return follows.numel() > 0 and bool(follows.all()) and bool((labels != inputs)[labels != -100].any())
