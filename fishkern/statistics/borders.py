"""Where the documents of packed rows begin, by the entries that transformers itself reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fishkern.layers import Documents
from fishkern.statistics.contents import KINDS, Batch, holds_kinds, is_array
from fishkern.statistics.labels import as_tensor

BORDERS = ("cu_seq_lens_q", "cu_seq_lens_k")
"""Cumulated lengths of all documents of the flattened rows, as varlen kernels are given them."""
_HIDES = 1e4  # a key that is less by this than the best one of its query has a weight of zero in every dtype


def document_numbers(content: Batch) -> Tensor | None:
    """Give each document of packed rows a number, by what transformers itself reads.

    The borders are those of ``cu_seq_lens_q`` or ``cu_seq_lens_k``; else a new document begins where ``seq_idx``
    changes; else where ``position_ids`` do not go on by one (of several kinds ``[4, R, T]``, those of the text, which
    are the first). Beside an ``attention_mask [R, T]`` transformers does not read them so, and padding has positions of
    its own: then a document begins where they go back, or stay at the lowest one, between two attended positions.

    Args:
        content: A batch.

    Returns:
        ``[R, T]``, int64, ascending from 0 in every row; ``None`` where each row is one document.

    Raises:
        ValueError: The borders do not fit the rows, are given by an entry that is not read, or by one entry and not by
            another that a model may read instead.
    """
    if not isinstance(content, Mapping):
        return None
    if unread := [key for key in content if str(key).startswith("cu_seqlens")]:
        raise ValueError(
            f"the rows are packed, as their {unread[0]!r} says, and where their documents end is read off "
            "'cu_seq_lens_q', 'seq_idx' or 'position_ids': give one of these."
        )
    if (shape := _shape(content)) is None:
        return None
    starts = _starts(content, shape)
    if starts is None or not bool(starts[:, 1:].any()):
        return None
    return starts.long().cumsum(1) - starts[:, :1].long()


def text_positions(content: Mapping[str, Any], shape: tuple[int, int]) -> Tensor | None:
    """Read the positions by which transformers tells documents apart.

    Args:
        content: A batch.
        shape: ``(R, T)``.

    Returns:
        ``[R, T]``; ``None`` where there are none, or of time, height and width alone.
    """
    R, T = shape
    value = content.get("position_ids")
    if not is_array(value):
        return None
    sizes = tuple(value.shape)
    if len(sizes) == 3 and sizes[0] == KINDS["with text"]:
        value, sizes = value[0], sizes[1:]
    return as_tensor(value).expand(R, T) if sizes in {(R, T), (1, T)} else None


def check_mask(content: Mapping[str, Any], documents: Documents, number: int) -> None:
    """Refuse a mask of pairs of positions that lets a document look at another one.

    That the model obeys the mask is shown on two documents of a batch. The values of the mask may be others in each
    batch, and are looked at in all of them.

    Args:
        content: A batch of packed rows.
        documents: Its documents.
        number: Its index in the iterable, for the message.

    Raises:
        ValueError: A position of a document attends to one outside of it.
    """
    mask = content.get("attention_mask")
    if not is_pairs(mask, documents.shape[1]):
        return
    owners = documents.numbers.to(as_tensor(mask).device)
    outside = (owners[:, :, None] >= 0) & (owners[:, :, None] != owners[:, None, :])
    seen = _attended(as_tensor(mask)) & outside
    if bool(seen.any()):
        row, query, key = seen.nonzero()[0].tolist()
        raise ValueError(
            f"batch {number} has packed rows, and its attention_mask lets position {query} of row {row} attend to "
            f"position {key}, which is not of the same document: it must separate all documents of each batch, with "
            "False, or a number such as -inf, between two of them."
        )


def is_pairs(mask: Any, T: int) -> bool:
    """Tell whether a mask is one of pairs of positions, ``[R, H, T, T]`` or ``[R, T, T]``."""
    return is_array(mask) and len(mask.shape) in (3, 4) and tuple(mask.shape[-2:]) == (T, T)


def _attended(mask: Tensor) -> Tensor:
    """Say which keys get a weight from a query in any head, ``[R or 1, T, T]``, bool."""
    if mask.is_floating_point():  # added to the scores, of which only differences count
        best = mask.amax(-1, keepdim=True)
        # where all keys are hidden by one large number, which absorbs the scores, they all get the same weight
        mask = (mask > best - _HIDES) | ((mask == best) & best.isfinite())
    mask = mask != 0
    return mask.any(1) if mask.ndim == 4 else mask


def _shape(content: Mapping[str, Any]) -> tuple[int, int] | None:
    """Read ``(R, T)`` off the entry that says what the rows are."""
    for key in ("input_ids", "inputs_embeds", "labels"):
        value = content.get(key)
        if is_array(value) and len(value.shape) > 1:
            return value.shape[0], value.shape[1]
    return None


def _starts(content: Mapping[str, Any], shape: tuple[int, int]) -> Tensor | None:
    """Say at which positions a document begins, ``[R, T]``, bool, by the first entry that tells."""
    R, T = shape
    told: dict[str, Tensor] = {}
    for key in BORDERS:
        if content.get(key) is not None:
            told[key] = _starts_of_borders(as_tensor(content[key]), R, T)
    numbers = content.get("seq_idx")
    if is_array(numbers) and tuple(numbers.shape) in {(R, T), (1, T)}:
        told["seq_idx"] = _others_than_before(as_tensor(numbers).expand(R, T), 0)
    positions = text_positions(content, shape)
    if not told:
        _refuse_restarts_of_kinds(content, shape)
        return None if positions is None else _restarts(positions, content.get("attention_mask"))
    if positions is not None:
        told["position_ids"] = _others_than_before(positions, 1)
    _refuse_other_borders(told)
    return next(iter(told.values()))


def _refuse_other_borders(told: Mapping[str, Tensor]) -> None:
    # each must tell the borders of the first one, or more: a model that reads another sees no document beside its own
    (source, starts), *others = told.items()
    for key, own in others:
        lost = (starts & ~own.to(starts.device))[:, 1:]
        if bool(lost.any()):
            row, place = lost.nonzero()[0].tolist()
            raise ValueError(
                f"the rows are packed: by {source!r} a document begins at position {place + 1} of row {row}, and not "
                f"by {key!r}. Which of them a model reads depends on its attention: let {key!r} tell the same borders, "
                "or leave it out."
            )


def _refuse_restarts_of_kinds(content: Mapping[str, Any], shape: tuple[int, int]) -> None:
    # time may go back inside a document too, behind a video; but only its first position is 0 in all three
    value = content.get("position_ids")
    if not holds_kinds("position_ids", value, shape) or value.shape[0] != KINDS["without text"]:
        return
    zero = (as_tensor(value) == 0).all(0).expand(shape)
    mask = content.get("attention_mask")
    if _is_of_positions(mask, shape):
        zero = zero & (as_tensor(mask).to(zero.device) != 0)
    if bool((rows := zero.sum(1) > 1).any()):
        raise ValueError(
            f"position_ids [3, R, T] begin again in row {int(rows.nonzero()[0])}, as those of packed rows do, and "
            "time, height and width do not say where a document ends: put the positions of the text in front, [4, R, "
            "T], as transformers does, or give cu_seq_lens_q. (If those are padding, say so by an attention_mask.)"
        )


def _starts_of_borders(borders: Tensor, R: int, T: int) -> Tensor:
    ends = borders.flatten().tolist()
    firsts = set(range(0, R * T, T))
    if ends != sorted(ends) or not ends or (ends[0], ends[-1]) != (0, R * T) or not firsts <= set(ends):
        raise ValueError(
            f"cu_seq_lens_q must ascend from 0 to the number of positions, {R * T}, with a border at each of {R} rows; "
            f"got {len(ends)} numbers{f' from {ends[0]} to {ends[-1]}' if ends else ''}. Make them with the collator "
            "that packs the rows."
        )
    starts = torch.zeros(R * T, dtype=torch.bool)
    starts[[end for end in ends if end < R * T]] = True  # the last border may be repeated, for a table of one length
    return starts.view(R, T)


def _others_than_before(numbers: Tensor, step: int) -> Tensor:
    """Say where numbers do not go on by a step, ``[R, T]``, bool; the first of a row never does."""
    starts = torch.ones_like(numbers, dtype=torch.bool)
    starts[:, 1:] = numbers.diff(dim=1) != step
    return starts


def _restarts(positions: Tensor, mask: Any) -> Tensor:
    if not _is_of_positions(mask, tuple(positions.shape)):
        return _others_than_before(positions, 1)
    positions = positions.long()
    attended = (as_tensor(mask).to(positions.device) != 0).expand_as(positions)
    lowest = positions.masked_fill(~attended, torch.iinfo(positions.dtype).max).amin(1, keepdim=True)
    steps = positions.diff(dim=1)
    again = (steps < 0) | ((steps == 0) & (positions == lowest)[:, 1:])  # a document of one token stays there
    starts = torch.ones_like(positions, dtype=torch.bool)
    starts[:, 1:] = again & attended[:, 1:] & attended[:, :-1]
    return starts


def _is_of_positions(mask: Any, shape: tuple[int, int]) -> bool:
    return is_array(mask) and tuple(mask.shape) in {shape, (1, shape[1])}
