"""What is noted of a first batch: it runs, and is probably not what was meant. Each is one warning."""

from __future__ import annotations

from collections.abc import Mapping
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
        likelihood: What reads the labels.
        batch: The first batch.
    """
    inputs, labels, mask = _texts(batch)
    if not isinstance(likelihood, CausalLM | MaskedLM | Seq2SeqLM) or labels is None:
        return
    counted = labels != -100
    if mask is not None and (hidden := int((counted & (mask == 0)).sum())):
        warn_caller(
            f"{hidden} labels of the first batch stand where its attention_mask is 0: padding counts as text, in the "
            "model's own loss, too. Mark it with the label -100."
        )
    elif (pad := hosts.padding_token(model)) is not None and (padding := int((labels == pad).sum())):
        warn_caller(
            f"{padding} labels of the first batch are the padding token {pad}: padding counts as text, in the model's "
            "own loss, too. Mark it with the label -100."
        )
    if isinstance(likelihood, CausalLM) and inputs is not None and _shifted(inputs, labels):
        warn_caller(
            "the labels of the first batch are its inputs shifted by one, and CausalLM shifts them itself, so that it "
            "asks for the token after the next: pass unshifted labels, or name fishkern.TokenClassification(), which "
            "does not shift."
        )


def note_choice(model: nn.Module, outputs: Any) -> None:
    """Note which of several tensors of a plain tuple is taken for the logits; those of transformers begin with them.

    Args:
        model: Who returned them.
        outputs: What it returned for one example.
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
    """Note that a softmax was taken already: the loss takes another one.

    Args:
        likelihood: What reads the logits.
        logits: ``[1, L, C]``.
    """
    sums = logits.detach().sum(-1)
    if logits.shape[-1] > 1 and bool((logits >= 0).all() and torch.isclose(sums, torch.ones_like(sums)).all()):
        warn_caller(
            f"the model's outputs look like probabilities (not negative, and 1 in sum), and "
            f"{type(likelihood).__name__} takes logits: leave the softmax out, or pass likelihood= as a function "
            "(model, batch) -> losses [N]."
        )


def _texts(batch: Batch) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Take the inputs, labels and mask of a batch of tokens, each ``[N, T]`` where it is there."""
    if isinstance(batch, Mapping):
        found = [batch.get(key) for key in ("input_ids", "labels", "attention_mask")]
    else:
        found = [batch[0], batch[1], None]
    inputs, labels, mask = (one if isinstance(one, Tensor) and one.ndim == 2 else None for one in found)
    if labels is None:
        return None, None, None
    inputs, mask = (one if one is not None and one.shape == labels.shape else None for one in (inputs, mask))
    return inputs, labels, mask


def _shifted(inputs: Tensor, labels: Tensor) -> bool:
    """Tell whether each label is the token behind its input, and not the input itself."""
    counted = labels[:, :-1] != -100
    behind = (labels[:, :-1] == inputs[:, 1:])[counted]
    return behind.numel() > 0 and bool(behind.all()) and bool((labels != inputs)[labels != -100].any())
