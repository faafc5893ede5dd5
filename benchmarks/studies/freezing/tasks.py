"""The tasks: MiniLM that learns classes, whole or by LoRA, and a vision transformer that learns to find nuclei.

A task has the untrained model, the rows of each step, the probe whose statistic is read, and what is measured. The
learning rate is chosen on training rows of its own, and the figures come from the validation part.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.studies.comparing.images import EVALUATED, normalised
from benchmarks.studies.comparing.order import shuffled
from benchmarks.studies.freezing import nuclei
from benchmarks.studies.freezing.setting import Setting
from benchmarks.studies.starts.setting import Setting as Sentences
from benchmarks.studies.starts.tasks import Classes

Batch = dict[str, Tensor]
RANK = 8
TARGETS = ("query", "key", "value", "attention.output.dense")


class Task:
    """What the arms are compared on.

    Args:
        setting: Training and the times of the events.
    """

    likelihood: Callable[[nn.Module, Batch], Tensor] | None = None
    """Losses of a batch ``[N]``; None: the model's own."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def fresh(self, seed: int) -> nn.Module:
        """The untrained model in float32, in the mode that it is trained in."""
        raise NotImplementedError

    def steps(self, seed: int) -> list[Any]:
        """The rows of each training step."""
        raise NotImplementedError

    def batch(self, rows: Any) -> Batch:
        """One batch on the model's device."""
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss of a batch."""
        raise NotImplementedError

    def probe(self, seed: int) -> list[Batch]:
        """Training rows whose statistic is read."""
        raise NotImplementedError

    def measure(self, model: nn.Module, *, choosing: bool = False, few: bool = False) -> dict[str, float]:
        """The figures of a model, which is left in its mode.

        Args:
            model: It.
            choosing: Whether the rows are those on which rates are chosen.
            few: Whether only those are measured that are looked at around events.

        Returns:
            ``"score"``, ``"nll"``, and ``"choice"``, by which the learning rate is chosen, the more the better.
        """
        raise NotImplementedError

    def drawn(self, seed: int, count: int) -> list[int]:
        """Numbers of the training rows of the probe."""
        return torch.randperm(self.setting.examples, generator=torch.Generator().manual_seed(seed))[:count].tolist()


class Sentiment(Task):
    """MiniLM with a fresh classifier on SST-2: all of it, or LoRA and the classifier.

    Args:
        setting: Training and the times of the events.
        folder: Of the encoder.
        data: Of SST-2's parquet files.
    """

    def __init__(self, setting: Setting, folder: Path, data: Path) -> None:
        super().__init__(setting)
        shared = {
            name: getattr(setting, name) for name in ("rates", "examples", "choosing", "scored", "epochs", "batch_size")
        }
        self._rows = Classes(Sentences(setting.task, texts="sst2", max_length=setting.size, **shared), folder, data)
        self._few = self._rows.scored[: setting.shock]

    def fresh(self, seed: int) -> nn.Module:
        model = self._rows.fresh(seed)
        if self.setting.task.endswith("-lora"):
            import peft

            torch.manual_seed(seed)
            options = dict(r=RANK, lora_alpha=RANK, target_modules=list(TARGETS), task_type="SEQ_CLS")
            model = peft.get_peft_model(model, peft.LoraConfig(**options))
        return model.train()

    def steps(self, seed: int) -> list[Any]:
        return self._rows.steps(seed)

    def batch(self, rows: Any) -> Batch:
        return self._rows.batch(rows)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(**batch).loss

    def probe(self, seed: int) -> list[Batch]:
        rows = [self._rows.train[n] for n in self.drawn(seed, self.setting.probe)]
        return list(self._rows.batches(rows))

    def measure(self, model: nn.Module, *, choosing: bool = False, few: bool = False) -> dict[str, float]:
        measured = self._rows.measure(model, choosing=choosing, rows=self._few if few else None)
        model.train()
        return measured


class Nuclei(Task):
    """A vision transformer with a decoder, pretrained on other images, on nuclei of cells.

    Args:
        setting: Training and the times of the events.
        folder: Of the network.
        data: Holds ``train.parquet`` and ``validation.parquet``.
    """

    likelihood = staticmethod(nuclei.losses)

    def __init__(self, setting: Setting, folder: Path, data: Path) -> None:
        super().__init__(setting)
        self._folder = folder
        rows = nuclei.load(data / "train.parquet", setting.size)
        self._train = rows.rows(slice(setting.examples))
        self._choosing = rows.rows(slice(setting.examples, setting.examples + setting.choosing))
        self._scored = nuclei.load(data / "validation.parquet", setting.size).rows(slice(setting.scored))

    def fresh(self, seed: int) -> nn.Module:
        return nuclei.segmenter(self._folder).to(self.device)  # it has neither dropout nor a part to draw

    def steps(self, seed: int) -> list[Any]:
        return shuffled(self.setting.examples, self.setting.batch_size, self.setting.epochs, seed)

    def batch(self, rows: Any) -> Batch:
        return self._of(self._train.rows(rows))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return nuclei.losses(model, batch).mean()

    def probe(self, seed: int) -> list[Batch]:
        rows = self.drawn(seed, self.setting.probe)
        size = self.setting.batch_size
        return [self.batch(rows[start : start + size]) for start in range(0, len(rows), size)]

    @torch.no_grad()
    def measure(self, model: nn.Module, *, choosing: bool = False, few: bool = False) -> dict[str, float]:
        """Dice of an image, the mean; and of shifted images, which it was not trained on."""
        images = self._choosing if choosing else self._scored.rows(slice(self.setting.shock if few else None))
        measured = self._dice(model, images)
        if not (choosing or few):
            for shift in nuclei.SHIFTS:
                other = nuclei.Images(nuclei.shifted(images.pixels, shift), images.masks)
                measured[shift] = self._dice(model, other)["score"]
        return {**measured, "choice": measured["score"]}

    def _dice(self, model: nn.Module, images: nuclei.Images) -> dict[str, float]:
        scores, losses = 0.0, 0.0
        for start in range(0, len(images.masks), EVALUATED):
            batch = self._of(images.rows(slice(start, start + EVALUATED)))
            marked = (model(batch["pixel_values"]) > 0).float()
            scores += nuclei.dice(marked, batch["masks"]).sum().item()
            losses += nuclei.losses(model, batch).sum().item()
        count = len(images.masks)
        return {"score": scores / count, "nll": losses / count}

    def _of(self, images: nuclei.Images) -> Batch:
        pixels = normalised(images.pixels)
        return {"pixel_values": pixels.to(self.device), "masks": images.masks.to(self.device)}


def task_of(setting: Setting, data: Path, *, encoder: Callable[[], Path]) -> Task:
    """The task of a setting.

    Args:
        setting: Training and the times of the events.
        data: Holds ``glue``, ``vision`` and ``models``.
        encoder: Finds the folder of MiniLM; only called where it is needed.
    """
    if setting.task == "nuclei":
        return Nuclei(setting, data / "models" / "dinov2_small_focus", data / "vision" / "dsb2018_nuclei")
    return Sentiment(setting, encoder(), data / "glue" / "sst2")
