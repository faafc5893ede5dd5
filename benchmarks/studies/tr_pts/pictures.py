"""The task: a small pretrained vision transformer with a fresh classifier on small pictures of ten kinds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.studies.comparing.images import EVALUATED, normalised, pixels_of
from benchmarks.studies.comparing.order import shuffled
from benchmarks.studies.tr_pts.setting import Setting
from fishkern.integrations import hub

Batch = dict[str, Tensor]
CLASSES = 10


@dataclass(frozen=True)
class Labelled:
    """Images and what is on them.

    Args:
        pixels: ``[N, 3, S, S]``, normalised.
        labels: ``[N]``.
    """

    pixels: Tensor
    labels: Tensor

    def batch(self, rows: slice | list[int], device: torch.device) -> Batch:
        return {"pixel_values": self.pixels[rows].to(device), "labels": self.labels[rows].to(device)}


def load(path: Path, rows: slice, size: int) -> Labelled:
    """Read images of a parquet file.

    Args:
        path: With the columns ``img`` and ``label``.
        rows: Which.
        size: Pixels along a side, to which they are scaled.
    """
    from pyarrow import parquet

    columns = parquet.read_table(path, columns=["img", "label"]).to_pydict()
    pixels = pixels_of((image["bytes"] for image in columns["img"][rows]), size)
    return Labelled(normalised(pixels), torch.tensor(columns["label"][rows]))


class Pictures:
    """Model and data.

    Args:
        setting: Data and training.
        data: Holds ``models`` and ``vision``.
    """

    def __init__(self, setting: Setting, data: Path) -> None:
        self.setting = setting
        self.folder = data / "models" / "dinov2_small_focus"
        first, last = setting.examples, setting.examples + setting.choosing
        images = data / "vision" / "cifar10_slice"
        self.train = load(images / "train.parquet", slice(first), setting.size)
        self._choosing = load(images / "train.parquet", slice(first, last), setting.size)
        self._scored = load(images / "test.parquet", slice(setting.scored), setting.size)

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def fresh(self, seed: int) -> nn.Module:
        """The pretrained model in float32 with a classifier that the seed draws; it has no dropout.

        The token that stands for masked patches is never reached, and frozen.
        """
        from transformers import AutoModelForImageClassification

        torch.manual_seed(seed)
        with hub.quiet():  # that the classifier is new is known
            model = AutoModelForImageClassification.from_pretrained(
                self.folder, num_labels=CLASSES, dtype=torch.float32
            )
        model.get_parameter("dinov2.embeddings.mask_token").requires_grad_(False)
        return model.train().to(self.device)

    def steps(self, seed: int) -> list[list[int]]:
        """The training rows of each step."""
        return shuffled(self.setting.examples, self.setting.batch_size, self.setting.epochs, seed)

    def batch(self, rows: list[int]) -> Batch:
        """Training rows on the model's device."""
        return self.train.batch(rows, self.device)

    def ranked(self) -> list[Batch]:
        """All training rows, by which connections are ranked."""
        return self._batches(self.train, self.setting.batch_size)

    @torch.no_grad()
    def measure(self, model: nn.Module, *, choosing: bool) -> dict[str, float]:
        """Accuracy and mean cross-entropy; ``"choice"``, by which the learning rate is chosen, is accuracy."""
        model.eval()
        right, losses = 0.0, 0.0
        images = self._choosing if choosing else self._scored
        for batch in self._batches(images, EVALUATED):
            logits = model(pixel_values=batch["pixel_values"]).logits
            right += (logits.argmax(1) == batch["labels"]).sum().item()
            losses += nn.functional.cross_entropy(logits, batch["labels"], reduction="sum").item()
        model.train()
        score = right / len(images.labels)
        return {"score": score, "nll": losses / len(images.labels), "choice": score}

    def measured_images(self, *, choosing: bool) -> int:
        """How many images :meth:`measure` goes through."""
        return len((self._choosing if choosing else self._scored).labels)

    def _batches(self, images: Labelled, size: int) -> list[Batch]:
        count = len(images.labels)
        return [images.batch(slice(start, start + size), self.device) for start in range(0, count, size)]
