"""The models, and two tasks for each.

* **llama**: the LLaMA ``stories260K``, which learns sentences of CoLA, and of SST-2.
* **vit**: a vision transformer of 4 layers for the digits of scikit-learn (8 x 8 pixels, of its package, which is not
  imported). It first learns 485 of them upright; the tasks are other digits a pixel to the right, and the same
  mirrored.

Only the weights of linear maps inside the layers train: they are what every arm has numbers for, and embeddings, norms,
biases and heads stay as they are.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.studies.cheaper_rivals.setting import Setting
from benchmarks.studies.comparing.order import shuffled

Batch = dict[str, Tensor]
Rows = Sequence[Any]
BASE_ROWS, BASE_EPOCHS, BASE_RATE = 485, 30, 1e-3  # of the vision transformer, before any task
LONGEST = 20  # tokens of a sentence


@dataclass(frozen=True)
class Task:
    """Rows of one task, no row in two of these.

    Args:
        name: In words.
        ours: What arms estimate on.
        theirs: What they are compared on; the model trains on both.
        choosing: What is chosen by.
        scored: What the figures come from.
    """

    name: str
    ours: Rows
    theirs: Rows
    choosing: Rows
    scored: Rows

    @staticmethod
    def of(name: str, rows: Rows, setting: Setting) -> Task:
        """Deal out rows that are in random order already."""
        counts = (setting.examples, setting.examples, setting.choosing, setting.scored)
        starts = [0, *itertools.accumulate(counts)]
        return Task(name, *(rows[start:end] for start, end in itertools.pairwise(starts)))


@dataclass(frozen=True)
class Loaded:
    """A model before its tasks.

    Args:
        base: Never trained itself.
        tasks: The first, and the second.
        collate: From rows to a batch.
        losses: From a model and a batch to the loss of each row, that of the model for the row alone.
        about: For the records.
    """

    base: nn.Module
    tasks: tuple[Task, ...]
    collate: Callable[[Rows], Batch]
    losses: Callable[[nn.Module, Batch], Tensor]
    about: dict[str, Any]

    def fresh(self) -> nn.Module:
        return copy.deepcopy(self.base)

    def batches(self, rows: Rows, size: int) -> Iterator[Batch]:
        for start in range(0, len(rows), size):
            yield self.collate(rows[start : start + size])

    @torch.no_grad()
    def score(self, model: nn.Module, rows: Rows) -> float:
        """The mean loss of the rows."""
        return torch.cat([self.losses(model, batch) for batch in self.batches(rows, 128)]).double().mean().item()

    def train(
        self,
        model: nn.Module,
        rows: Rows,
        optimizer: torch.optim.Optimizer,
        setting: Setting,
        seed: int,
        extra: Callable[[], Tensor] | None = None,
    ) -> None:
        """Train in evaluation mode, so that no arm has other draws; the model stays as trained.

        Args:
            model: Changed.
            rows: In an order that the seed alone decides.
            optimizer: Of the model.
            setting: Steps.
            seed: Of the order.
            extra: Added to each step's loss.
        """
        for numbers in shuffled(len(rows), setting.batch_size, setting.epochs, seed):
            loss = self.losses(model, self.collate([rows[n] for n in numbers])).mean()
            (loss if extra is None else loss + extra()).backward()
            optimizer.step()
            optimizer.zero_grad()


def freeze_all_but_linears(model: nn.Module, inside: str) -> None:
    """Let only the weights of linear maps train whose names contain a text."""
    linears = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in linears and inside in name)


def llama(data: Path, seed: int, setting: Setting) -> Loaded:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from benchmarks.studies.exactness.subjects import distinct, shuffled_texts
    from fishkern.integrations import hub

    folder = data / "models" / "stories260K"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with hub.quiet():
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
    freeze_all_but_linears(model, ".layers.")
    needed = 2 * setting.examples + setting.choosing + setting.scored
    tasks = []
    for name, shortest in (("cola", 4), ("sst2", 8)):
        words = (text for text, _ in shuffled_texts(data / "glue" / name, seed) if len(text.split()) >= shortest)
        ids = tokenizer(distinct(words, needed), truncation=True, max_length=LONGEST)["input_ids"]
        tasks.append(Task.of(name, ids, setting))
    about = {"model": folder.name, "tasks": [task.name for task in tasks], "longest": LONGEST}
    return Loaded(model, tuple(tasks), of_tokens, token_losses, about)


def of_tokens(rows: Rows) -> Batch:
    """Rows of tokens, padded right, as their own labels."""
    tokens = [torch.tensor(row) for row in rows]
    ids = nn.utils.rnn.pad_sequence(tokens, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in tokens], batch_first=True)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def token_losses(model: nn.Module, batch: Batch) -> Tensor:
    """The mean over the tokens of each row, ``[N]``."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["labels"][:, 1:]
    losses = nn.functional.cross_entropy(logits[:, :-1].mT, labels, reduction="none", ignore_index=-100)
    return losses.sum(1) / (labels != -100).sum(1)


def vit(seed: int, setting: Setting) -> Loaded:
    from transformers import ViTConfig, ViTForImageClassification

    images, labels = digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tolist()
    rows = [(images[n], labels[n].item()) for n in order]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = ViTConfig(
            image_size=8, patch_size=2, num_channels=1, hidden_size=48, intermediate_size=96, num_hidden_layers=4,
            num_attention_heads=4, num_labels=10, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        model = ViTForImageClassification(config).eval()
    others = rows[BASE_ROWS:]
    shifted = Task.of("shifted", [(pixels.roll(1, 2), label) for pixels, label in others], setting)
    mirrored = Task.of("mirrored", [(pixels.flip(2), label) for pixels, label in others], setting)
    about = {"model": "ViT of 4 layers, hidden size 48", "tasks": ["shifted", "mirrored"]}
    loaded = Loaded(model, (shifted, mirrored), of_pictures, class_losses, about)
    optimizer = torch.optim.AdamW(model.parameters(), lr=BASE_RATE)
    loaded.train(model, rows[:BASE_ROWS], optimizer, replace(setting, epochs=BASE_EPOCHS), seed)
    freeze_all_but_linears(model, ".layer")
    return loaded


def digits() -> tuple[Tensor, Tensor]:
    """Pictures ``[1797, 1, 8, 8]`` in [0, 1], and their classes."""
    import numpy

    spec = find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError('the digits are in the package scikit-learn: pip install -e ".[rivals]"')
    table = numpy.loadtxt(Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    values = torch.from_numpy(table).float()
    return values[:, :-1].reshape(-1, 1, 8, 8) / 16, values[:, -1].long()


def of_pictures(rows: Rows) -> Batch:
    return {
        "pixel_values": torch.stack([pixels for pixels, _ in rows]),
        "labels": torch.tensor([label for _, label in rows]),
    }


def class_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of each picture, ``[N]``."""
    logits = model(pixel_values=batch["pixel_values"]).logits
    return nn.functional.cross_entropy(logits, batch["labels"], reduction="none")
