"""Texts of GLUE as rows of tokens, and batches of them; parquet is read without ``datasets``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Row = dict[str, Any]  # input_ids, and label


def sentences(folder: Path, part: str) -> tuple[list[str], list[int]]:
    """The texts and labels of one part of a GLUE task of single sentences.

    Args:
        folder: Holds ``train.parquet`` and ``validation.parquet``.
        part: ``"train"`` or ``"validation"``.
    """
    from pyarrow import parquet

    columns = parquet.read_table(folder / f"{part}.parquet", columns=["sentence", "label"]).to_pydict()
    return [text.strip() for text in columns["sentence"]], columns["label"]


def rows_of(texts: Sequence[str], labels: Iterable[int], tokenizer: Any, max_length: int) -> list[Row]:
    ids = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
    return [{"input_ids": tokens, "label": label} for tokens, label in zip(ids, labels, strict=True)]


def collated(rows: Sequence[Row], *, language: bool, length: int | None = None) -> dict[str, Tensor]:
    """One batch, padded right with 0: to the longest row, or to ``length``.

    Args:
        rows: At least one.
        language: Whether the tokens are the labels.
        length: Pad to so many tokens instead, as published code does.
    """
    tokens = [torch.tensor(row["input_ids"]) for row in rows]
    ids = nn.utils.rnn.pad_sequence(tokens, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in tokens], batch_first=True)
    if length is not None:
        ids, mask = (nn.functional.pad(part, (0, length - part.shape[1])) for part in (ids, mask))
    labels = ids.masked_fill(mask == 0, -100) if language else torch.tensor([row["label"] for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def by_length(rows: Sequence[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: len(row["input_ids"]))
