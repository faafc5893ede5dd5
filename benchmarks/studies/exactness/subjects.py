"""The models and examples of the study of exactness: real weights, real text, no example inside another.

* **stories**: the LLaMA ``stories260K`` on stories that it writes itself (drawn at temperature 1, 32 tokens), the text
  that it was trained on as far as a model tells: its mean gradient is about zero there.
* **cola**: the same model on sentences of CoLA, which it was not trained on: its mean gradient is not zero.
* **sst2**: the encoder MiniLM on rows of SST-2 of at least eight words. Its pooler and a new classifier are first
  trained on other rows, on the frozen output of the encoder. Its pool is the upper two layers, pooler and classifier.

A text that contains another, or is part of it, is dropped: parts of one sentence in both of two sets would make these
look more alike than independent examples are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.studies.glue.data import encoder_name
from fishkern.integrations import hub

HEAD_ROWS, HEAD_STEPS, HEAD_RATE = 1000, 100, 1e-3
HELD_OUT = 256  # rows of the study on which the head is scored


@dataclass(frozen=True)
class Loaded:
    """A model, and rows of tokens (and a class, where it is a classifier), already shuffled."""

    model: nn.Module
    rows: list[tuple[list[int], int | None]]
    about: dict[str, Any]
    parameters: Callable[[str, nn.Parameter], bool] | None = None

    def batches(self, rows: range, size: int) -> Iterator[dict[str, torch.Tensor]]:
        """Rows in their order, padded right; for a language model the tokens are the labels."""
        for start in range(rows.start, rows.stop, size):
            part = self.rows[start : min(start + size, rows.stop)]
            tokens = [torch.tensor(ids) for ids, _ in part]
            ids = nn.utils.rnn.pad_sequence(tokens, batch_first=True)
            mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in tokens], batch_first=True)
            classes = [label for _, label in part]
            labels = ids.masked_fill(mask == 0, -100) if classes[0] is None else torch.tensor(classes)
            yield {"input_ids": ids, "attention_mask": mask, "labels": labels}


@dataclass(frozen=True)
class Subject:
    """A model and its examples.

    Args:
        name: In the records.
        sizes: Numbers of examples, ascending.
        language: Whether it is a language model, whose loss may be a mean or a sum over tokens.
        load: From a number of rows, and a seed, to the model and as many rows.
    """

    name: str
    sizes: tuple[int, ...]
    language: bool
    load: Callable[[int, int], Loaded]


def subjects(data: Path, llama: Path, encoder: Callable[[], Path]) -> list[Subject]:
    """The three subjects.

    Args:
        data: Holds ``cola/train.parquet`` and ``sst2/train.parquet``.
        llama: Folder of ``stories260K``.
        encoder: Finds the folder of MiniLM.
    """
    return [
        Subject("stories", (64, 256), True, lambda count, seed: stories(llama, count, seed)),
        Subject("cola", (64, 256, 1024), True, lambda count, seed: cola(llama, data / "cola", count, seed)),
        Subject("sst2", (64, 256), False, lambda count, seed: sst2(encoder(), data / "sst2", count, seed)),
    ]


def stories(folder: Path, count: int, seed: int, tokens: int = 32) -> Loaded:
    model = _language_model(folder)
    start = torch.full((256, 1), model.config.bos_token_id)
    rows: dict[tuple[int, ...], None] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        while len(rows) < count:
            drawn = model.generate(
                start, attention_mask=torch.ones_like(start), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                min_new_tokens=tokens - 1, max_new_tokens=tokens - 1,
            )  # fmt: skip
            rows.update(dict.fromkeys(map(tuple, drawn.tolist())))
    about = {"model": folder.name, "text": f"drawn by the model itself, {tokens} tokens"}
    return Loaded(model, [(list(row), None) for row in list(rows)[:count]], about)


def cola(folder: Path, data: Path, count: int, seed: int, longest: int = 48) -> Loaded:
    from transformers import AutoTokenizer

    texts = distinct((text for text, _ in shuffled_texts(data, seed) if len(text.split()) >= 4), count)
    tokens = AutoTokenizer.from_pretrained(folder)(texts, truncation=True, max_length=longest)["input_ids"]
    about = {"model": folder.name, "text": f"CoLA, sentences of at least 4 words, up to {longest} tokens"}
    return Loaded(_language_model(folder), [(ids, None) for ids in tokens], about)


def sst2(folder: Path, data: Path, count: int, seed: int, longest: int = 64) -> Loaded:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    classes = {text: label for text, label in shuffled_texts(data, seed) if len(text.split()) >= 8}
    texts = distinct(classes, count + HEAD_ROWS)
    tokens = AutoTokenizer.from_pretrained(folder)(texts, truncation=True, max_length=longest)["input_ids"]
    rows = [(ids, classes[text]) for ids, text in zip(tokens, texts, strict=True)]
    with torch.random.fork_rng(devices=[]), hub.quiet():  # that the classifier is new is known
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2).eval()
    loaded = Loaded(model, rows, {}, _upper(model))
    accuracy = train_head(loaded, range(count, len(rows)), range(min(count, HELD_OUT)))
    about = {
        "model": encoder_name(folder),
        "text": f"SST-2, rows of at least 8 words, up to {longest} tokens",
        "parameters": "upper two layers, pooler and classifier",
        "head": {"rows": len(rows) - count, "steps": HEAD_STEPS, "lr": HEAD_RATE, "accuracy": accuracy},
    }
    return Loaded(model, rows[:count], about, loaded.parameters)


def _upper(model: nn.Module) -> Callable[[str, nn.Parameter], bool]:
    """The last two layers of a BERT, and the modules after them."""
    layers = model.config.num_hidden_layers
    parts = (f".layer.{layers - 2}.", f".layer.{layers - 1}.", ".pooler.", "classifier.")
    return lambda name, _: any(part in name for part in parts)


def train_head(loaded: Loaded, rows: range, held_out: range) -> float:
    """Train the pooler and the classifier of a BERT on the frozen encoder's output, in full batches.

    Args:
        loaded: The classifier.
        rows: Rows to train on.
        held_out: Rows to score.

    Returns:
        Accuracy on the held-out rows.
    """
    model = loaded.model
    head = [*model.bert.pooler.parameters(), *model.classifier.parameters()]

    @torch.no_grad()
    def features(rows: range) -> tuple[torch.Tensor, torch.Tensor]:
        outputs, labels = [], []
        for batch in loaded.batches(rows, 64):
            labels.append(batch.pop("labels"))
            outputs.append(model.bert(**batch).last_hidden_state[:, :1])
        return torch.cat(outputs), torch.cat(labels)

    inputs, labels = features(rows)
    optimizer = torch.optim.AdamW(head, lr=HEAD_RATE)
    for _ in range(HEAD_STEPS):
        loss = nn.functional.cross_entropy(model.classifier(model.bert.pooler(inputs)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    inputs, labels = features(held_out)
    with torch.no_grad():
        return (model.classifier(model.bert.pooler(inputs)).argmax(1) == labels).double().mean().item()


def distinct(texts: Iterable[str], count: int) -> list[str]:
    """Take the first texts of which none contains another, whatever their case and punctuation."""
    texts_by_words: dict[str, str] = {}
    for text in texts:
        words = f" {' '.join(re.findall(r'[a-z0-9]+', text.lower()))} "
        if not any(words in other or other in words for other in texts_by_words):
            texts_by_words[words] = text
        if len(texts_by_words) == count:
            return list(texts_by_words.values())
    raise ValueError(
        f"{count} texts are needed of which none is part of another, and there are only {len(texts_by_words)}."
    )


def _language_model(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    with hub.quiet():
        return AutoModelForCausalLM.from_pretrained(folder).eval()


def shuffled_texts(folder: Path, seed: int) -> Iterator[tuple[str, int]]:
    from datasets import load_dataset

    rows = load_dataset("parquet", data_files=str(folder / "train.parquet"), split="train")
    texts, labels = rows["sentence"][:], rows["label"][:]
    for n in torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist():
        yield texts[n].strip(), labels[n]
