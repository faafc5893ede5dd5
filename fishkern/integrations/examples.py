"""Rows of data as examples of a task, with their tokens and labels; and examples as padded batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fishkern.integrations.columns import option_of
from fishkern.integrations.data import Rows
from fishkern.statistics.labels import unknown_class

Example = dict[str, Any]

MASKED = 0.15  # the share of tokens hidden from a masked language model, as in BERT


@dataclass
class Encoder:
    """Turns rows into examples of one task, and examples into batches.

    Attributes:
        task: One of :data:`fishkern.integrations.tasks.TASKS`.
        columns: Role to column.
        processor: A tokenizer, or an image processor.
        config: The model's config.
        max_length: Texts are cut to this many tokens.
        seed: Decides which tokens are hidden from a masked language model.
        passed_over: Rows without anything to learn from, so far.
    """

    task: str
    columns: Mapping[str, str]
    processor: Any
    config: Any
    max_length: int
    seed: int = 0
    passed_over: int = field(default=0, init=False)

    def examples(self, rows: Rows, count: int) -> Iterator[Example]:
        """Encode rows until there are enough examples.

        Args:
            rows: The data.
            count: How many examples.

        Yields:
            One example for each row that has something to learn from.
        """
        for place, row in rows:
            example = getattr(self, "_" + self.task.replace("-", "_"))(row, place)
            if example is None:
                self.passed_over += 1
                continue
            yield example
            if (count := count - 1) == 0:
                return

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Pad examples on the right and stack them.

        Args:
            examples: At least one.

        Returns:
            Keyword arguments of the model, ``[N, ...]`` each; labels are -100 at padding.
        """
        fill = {"labels": -100, "input_ids": pad_token(self.processor) if self.task != "image-classification" else 0}
        batch = {}
        for key in examples[0]:
            values = [example[key] for example in examples]
            if isinstance(values[0], Tensor):
                batch[key] = torch.stack(values)
            elif isinstance(values[0], list):
                rows = [torch.tensor(value) for value in values]
                batch[key] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill.get(key, 0))
            else:
                batch[key] = torch.tensor(values)
        return batch

    def _causal_lm(self, row: Mapping[str, Any], place: int) -> Example | None:
        if "target" not in self.columns:
            example = self._tokens(row, place)
            labels = example["input_ids"]
        else:
            prompt = self.processor(self._text(row, place, "text"))["input_ids"]
            answer = self.processor(self._text(row, place, "target"), add_special_tokens=False)["input_ids"]
            if self.processor.eos_token_id is not None:
                answer = [*answer, self.processor.eos_token_id]
            ids = (prompt + answer)[: self.max_length]
            self._check_ids(ids)
            example = {"input_ids": ids, "attention_mask": [1] * len(ids)}
            labels = ([-100] * len(prompt) + answer)[: self.max_length]
        if all(label == -100 for label in labels[1:]):
            return None
        return {**example, "labels": list(labels)}

    def _masked_lm(self, row: Mapping[str, Any], place: int) -> Example | None:
        example = self._tokens(row, place)
        ids = torch.tensor(example["input_ids"])
        special = self.processor.get_special_tokens_mask(example["input_ids"], already_has_special_tokens=True)
        free = (torch.tensor(special) == 0).nonzero().flatten()
        if not len(free):
            return None
        # Seeded by the row's place, so that neither batch size nor order changes which tokens are hidden.
        generator = torch.Generator().manual_seed(self.seed * 2**32 + place)
        count = max(1, round(MASKED * len(free)))
        hidden = free[torch.randperm(len(free), generator=generator)[:count]]
        labels = torch.full_like(ids, -100)
        labels[hidden] = ids[hidden]
        ids[hidden] = self.processor.mask_token_id
        return {**example, "input_ids": ids.tolist(), "labels": labels.tolist()}

    def _seq2seq_lm(self, row: Mapping[str, Any], place: int) -> Example | None:
        target = self._text(row, place, "target")
        labels = self.processor(text_target=target, truncation=True, max_length=self.max_length)["input_ids"]
        self._check_ids(labels)
        if not target.strip():
            return None
        return {**self._tokens(row, place), "labels": list(labels)}

    def _sequence_classification(self, row: Mapping[str, Any], place: int) -> Example:
        return {**self._tokens(row, place), "labels": self._label(row[self.columns["label"]], place)}

    def _token_classification(self, row: Mapping[str, Any], place: int) -> Example | None:
        words, tags = row[self.columns["words"]], row[self.columns["label"]]
        if not isinstance(words, list) or not isinstance(tags, list) or len(words) != len(tags):
            raise ValueError(f"row {place} needs a list of words and a list of as many labels, got {words!r:.60}.")
        encoded = self.processor(words, is_split_into_words=True, truncation=True, max_length=self.max_length)
        labels, before = [], None
        for word in encoded.word_ids():
            first = word is not None and word != before  # the other pieces of a word have no label
            labels.append(self._label(tags[word], place) if first else -100)
            before = word
        example = {**self._checked(encoded), "labels": labels}
        return example if any(label != -100 for label in labels) else None

    def _image_classification(self, row: Mapping[str, Any], place: int) -> Example:
        image = row[self.columns["image"]]
        if not hasattr(image, "convert"):
            raise ValueError(f"row {place} holds no image in {self.columns['image']!r}: name another with --image.")
        pixels = self.processor(image.convert("RGB"), return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixels, "labels": self._label(row[self.columns["label"]], place)}

    def _tokens(self, row: Mapping[str, Any], place: int) -> Example:
        texts = [self._text(row, place, role) for role in ("text", "text_pair") if role in self.columns]
        return self._checked(self.processor(*texts, truncation=True, max_length=self.max_length))

    def _checked(self, encoded: Mapping[str, Any]) -> Example:
        self._check_ids(encoded["input_ids"])
        return {key: list(encoded[key]) for key in ("input_ids", "attention_mask", "token_type_ids") if key in encoded}

    def _check_ids(self, ids: Sequence[int]) -> None:
        size = self.config.get_text_config().vocab_size
        if ids and max(ids) >= size:
            raise ValueError(
                f"the tokenizer gives the token {max(ids)}, and the model knows {size}: it belongs to another model; "
                "name the right one with --tokenizer."
            )

    def _text(self, row: Mapping[str, Any], place: int, role: str) -> str:
        text = row[self.columns[role]]
        if text is None:
            return ""
        if not isinstance(text, str):
            raise ValueError(
                f"row {place} holds {type(text).__name__} instead of text in {self.columns[role]!r}: name another "
                f"column with {option_of(role)}."
            )
        return text

    def _label(self, value: Any, place: int) -> int | float | Tensor:
        size, problem = self.config.num_labels, self.config.problem_type
        where = f"row {place} has the label {value!r}"
        if isinstance(value, list):
            if len(value) != size:
                raise ValueError(f"{where}, of {len(value)} entries; the model has {size}.")
            return torch.tensor(value, dtype=torch.float32)
        if isinstance(value, str):
            if value not in self.config.label2id:
                raise ValueError(f"{where}; the model knows {', '.join(map(str, self.config.label2id))}.")
            return int(self.config.label2id[value])
        if problem == "regression" or (problem is None and size == 1 and self.task == "sequence-classification"):
            if value is None:
                raise ValueError(f"{where}: drop such rows.")
            return float(value)
        if not isinstance(value, int) or not 0 <= value < size:
            if value == -100 and self.task == "token-classification":
                return -100
            raise ValueError(f"row {place} {unknown_class(value, size)}.")
        return value


def pad_token(tokenizer: Any) -> int:
    """Choose a token for padding; attention and labels leave it out.

    Args:
        tokenizer: A tokenizer of transformers.

    Returns:
        Its own, else the one that ends a text, else 0.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    return 0
