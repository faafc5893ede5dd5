"""Packed rows of a model that chooses frequencies of positions by the longest document of a batch."""

from __future__ import annotations

import torch
from torch import nn

from fishkern import hosts
from fishkern.statistics.borders import text_positions
from fishkern.statistics.packing import PackedExamples


def check_lengths(model: nn.Module, batch: PackedExamples, number: int) -> None:
    """Refuse packed rows in which a document is turned by other frequencies than alone.

    That documents are kept apart is shown on two of a batch, and this depends on all of them.

    Args:
        model: Without running wrappers.
        batch: Packed rows.
        number: Index of the batch in the iterable, for the message.

    Raises:
        ValueError: The model has such rotary embeddings, and a document is shorter than their limit, or than another
            one, and another one is beyond it.
    """
    if not (limits := hosts.length_limits(model)):
        return
    shape = batch.documents.shape
    positions = text_positions(batch.content, shape)
    if positions is None:
        positions = torch.arange(shape[1]).expand(shape)
        own = batch.documents.lengths.tolist()  # alone, each is numbered from 0
    else:
        own = [int(batch.documents.cut(positions, n).max()) + 1 for n in range(batch.num_examples)]
    longest = int(positions.max()) + 1
    for limit in limits:
        alike = min(own) > limit.length if limit.kind == "longrope" else min(own) == longest
        if longest > limit.length and not alike:
            raise ValueError(
                f"batch {number} has packed rows whose longest document reaches {longest} positions, beyond the "
                f"{limit.length} up to which {type(model).__name__} turns all positions alike (rope_type "
                f"'{limit.kind}'): then its other documents, down to {min(own)} positions, get other frequencies than "
                "alone. Pack long and short documents into different batches, or use a collator that keeps one example "
                "in each row."
            )
