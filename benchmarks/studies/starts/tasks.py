"""The two tasks: a small LLaMA that learns sentences and may forget its stories, and MiniLM that learns classes.

A task has the untrained model, the rows that a start may look at, the rows that are trained on, and what is measured.
The learning rate is chosen on training rows of its own, and the figures come from the validation part.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.studies.glue.data import grouped_by_length
from benchmarks.studies.glue.scores import metric
from benchmarks.studies.starts.data import Row, by_length, collated, rows_of, sentences
from benchmarks.studies.starts.setting import Setting
from fishkern.integrations import hub

Batch = dict[str, Tensor]
EVALUATED = 64  # rows in a batch that is only evaluated
STORY_SEED = 7


class Task:
    """What the arms are compared on.

    Args:
        setting: Budget and training.
        folder: Of the model, with its tokenizer.
        data: Of the GLUE task's parquet files.
    """

    language: bool
    targets: tuple[str, ...]  # the adapted modules, by the ends of their paths

    def __init__(self, setting: Setting, folder: Path, data: Path) -> None:
        from transformers import AutoTokenizer

        self.setting, self.folder = setting, folder
        tokenizer = AutoTokenizer.from_pretrained(folder)
        most = setting.examples + setting.choosing
        texts, labels = sentences(data, "train")
        rows = rows_of(texts[:most], labels[:most], tokenizer, setting.max_length)
        self.train, self.choosing = rows[: setting.examples], rows[setting.examples :]
        texts, labels = (part[: setting.scored] for part in sentences(data, "validation"))
        self.scored = rows_of(texts, labels, tokenizer, setting.max_length)

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def fresh(self, seed: int) -> nn.Module:
        """The untrained model in evaluation mode, in float32; the seed draws a classifier."""
        raise NotImplementedError

    def measure(self, model: nn.Module, *, choosing: bool) -> dict[str, float]:
        """The figures of a model; ``choice`` is what the learning rate is chosen by, the more the better."""
        raise NotImplementedError

    def drawn(self, seed: int, count: int | None = None, rows: list[Row] | None = None) -> list[Row]:
        """The rows that a start may look at: of the training rows, or of ``rows``."""
        rows = self.train if rows is None else rows
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        return [rows[n] for n in order[: count or self.setting.statistic].tolist()]

    def batches(self, rows: list[Row], size: int | None = None, length: int | None = None) -> Iterator[Batch]:
        """Batches on the model's device."""
        size = size or self.setting.batch_size
        for start in range(0, len(rows), size):
            yield self.batch(rows[start : start + size], length)

    def batch(self, rows: list[Row], length: int | None = None) -> Batch:
        """One batch on the model's device."""
        batch = collated(rows, language=self.language, length=length)
        return {name: values.to(self.device) for name, values in batch.items()}

    def steps(self, seed: int) -> list[list[Row]]:
        """The rows of each training step, in batches of about the same length."""
        order = torch.Generator().manual_seed(seed)
        epochs = [grouped_by_length(self.train, self.setting.batch_size, order) for _ in range(self.setting.epochs)]
        return [[self.train[n] for n in rows] for epoch in epochs for rows in epoch]

    def probe(self) -> Batch:
        """A batch on which the step-0 output is compared with the untrained model's."""
        return next(self.batches(self.scored))


class Language(Task):
    """``stories260K`` as a language model of sentences: their loss, and what becomes of its own stories.

    It was trained on stories. The texts that it draws itself are such stories, and its own probabilities are the truth
    there: forgetting is the mean KL divergence from it to the trained model, computed at each position. ``knowledge``
    are other texts of the same kind, for starts that look at what is to be kept.
    """

    language = True
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

    def __init__(self, setting: Setting, folder: Path, data: Path) -> None:
        super().__init__(setting, folder, data)
        drawn = self._drawn_by_itself(2 * setting.stories)
        self.stories, self.knowledge = drawn[: setting.stories], drawn[setting.stories :]

    def fresh(self, seed: int) -> nn.Module:
        from transformers import AutoModelForCausalLM

        with hub.quiet():
            model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        return model.eval().to(self.device)

    @torch.no_grad()
    def measure(self, model: nn.Module, *, choosing: bool) -> dict[str, float]:
        """Mean negative log-likelihood of a token of sentences and of stories, and the KL divergence, in nats."""
        model.eval()
        loss, tokens = 0.0, 0
        for batch in self.batches(by_length(self.choosing if choosing else self.scored), EVALUATED):
            nll = _nll(model, batch)
            loss, tokens = loss + nll.sum().item(), tokens + nll.numel()
        story, kl = 0.0, 0.0
        for batch, expected in zip(self.batches(self.stories, EVALUATED), self.expected, strict=True):
            actual = _log_probabilities(model, batch)
            kl += (expected.exp() * (expected - actual)).sum().item()
            story -= actual.gather(2, batch["input_ids"][:, 1:, None]).sum().item()
        positions = len(self.stories) * (self.setting.story_tokens - 1)
        nll = loss / tokens
        return {"nll": nll, "story_nll": story / positions, "kl": kl / positions, "choice": -nll}

    @cached_property
    def base(self) -> dict[str, float]:
        """The figures of the untrained model."""
        measured = self.measure(self.fresh(0), choosing=False)
        return {name: measured[name] for name in ("nll", "story_nll", "kl")}

    @cached_property
    @torch.no_grad()
    def expected(self) -> list[Tensor]:
        """The untrained model's log-probabilities of the stories' tokens, batch by batch."""
        model = self.fresh(0)
        return [_log_probabilities(model, batch) for batch in self.batches(self.stories, EVALUATED)]

    def _drawn_by_itself(self, count: int) -> list[Row]:
        """Texts of the untrained model at temperature 1."""
        model = self.fresh(0).cpu()  # the draws of a CPU, on every device
        start = torch.full((count, 1), model.config.bos_token_id)
        more = self.setting.story_tokens - 1
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(STORY_SEED)
            ids = model.generate(
                start, attention_mask=torch.ones_like(start), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                min_new_tokens=more, max_new_tokens=more,
            )  # fmt: skip
        return [{"input_ids": row, "label": 0} for row in ids.tolist()]


def _log_probabilities(model: nn.Module, batch: Batch) -> Tensor:
    """``[N, T - 1, V]``, of each next token."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits[:, :-1].float().log_softmax(-1)


def _nll(model: nn.Module, batch: Batch) -> Tensor:
    """One value for each token with a label."""
    labels = batch["labels"][:, 1:]
    counted = labels != -100
    of_labels = _log_probabilities(model, batch).gather(2, labels.clamp(min=0)[:, :, None])[:, :, 0]
    return -of_labels[counted]


class Classes(Task):
    """MiniLM with a fresh classifier, which is trained with the adapter."""

    language = False
    targets = ("query", "key", "value", "attention.output.dense")  # all of one shape

    def fresh(self, seed: int) -> nn.Module:
        from transformers import AutoModelForSequenceClassification

        torch.manual_seed(seed)
        with hub.quiet():  # that the classifier is new is known
            model = AutoModelForSequenceClassification.from_pretrained(self.folder, num_labels=2, dtype=torch.float32)
        return model.eval().to(self.device)

    base = None

    @torch.no_grad()
    def measure(self, model: nn.Module, *, choosing: bool, rows: list[Row] | None = None) -> dict[str, float]:
        """Accuracy (Matthews' correlation for CoLA), and the mean cross-entropy, of these rows if they are given."""
        model.eval()
        outputs, labels = [], []
        rows = rows or (self.choosing if choosing else self.scored)
        for batch in self.batches(by_length(rows), EVALUATED):
            labels.append(batch.pop("labels").cpu())
            outputs.append(model(**batch).logits.float().cpu())
        outputs, labels = torch.cat(outputs), torch.cat(labels)
        score = metric(self.setting.texts, outputs, labels)
        return {"score": score, "nll": nn.functional.cross_entropy(outputs, labels).item(), "choice": score}


def task_of(setting: Setting, data: Path, *, llama: Path, encoder: Any) -> Task:
    """The task of a setting.

    Args:
        setting: Budget and training.
        data: Holds a folder for each GLUE task.
        llama: Folder of ``stories260K``.
        encoder: Finds the folder of MiniLM; only called where it is needed.
    """
    language = setting.stories > 0
    folder = llama if language else encoder()
    return (Language if language else Classes)(setting, folder, data / setting.texts)
