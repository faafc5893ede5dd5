"""What the demonstration runs on: shapes of LLaMA, batches, and what they need of a device's memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.shapes import LLAMA_1B, LLAMA_8B, LLAMA_32M, LLAMA_TINY, Shape

GIB = 2**30

SHAPES = {
    "llama-3.1-8b": LLAMA_8B,
    "llama-3.2-1b": LLAMA_1B,
    "small": LLAMA_32M,
    "tiny": LLAMA_TINY,  # for a look at the command, and its test
}


@dataclass(frozen=True)
class Setting:
    """All that the figures depend on, besides machine and versions.

    Args:
        shape: Key of ``SHAPES``.
        device: ``"cpu"`` or ``"cuda"``.
        dtype: Of the weights.
        examples: How many the Fisher is estimated on.
        batch_size: Examples in each batch.
        tokens: Tokens in each example; all rows are full, and the tokens are random.
        density: Selected fraction of all entries.
        steps: Training steps, all on the first batch.
        lr: Learning rate of these.
        rival_examples: How many the slower ways to the Fisher are timed on.
        accumulate_on: Where the Fisher's float32 accumulators lie, ``"cpu"`` or ``"cuda"``.
        save: Whether the statistics go to disk and come back lazily.
    """

    shape: str
    device: str
    dtype: str
    examples: int
    batch_size: int
    tokens: int
    density: float
    steps: int
    lr: float
    rival_examples: int
    accumulate_on: str
    save: bool

    def model(self) -> nn.Module:
        return SHAPES[self.shape].model(self.device, getattr(torch, self.dtype))

    def batches(self, examples: int | None = None) -> list[dict[str, Tensor]]:
        """The first examples, all by default, in batches."""
        shape = (self.examples, self.tokens)
        ids = torch.randint(0, SHAPES[self.shape].vocabulary, shape, generator=torch.Generator().manual_seed(1))
        ids = ids[:examples].to(self.device)
        return [{"input_ids": rows, "labels": rows} for rows in ids.split(self.batch_size)]


@dataclass(frozen=True)
class Needs:
    """What a shape takes, in bytes, as far as arithmetic can tell it beforehand.

    Args:
        weights: The weights.
        accumulators: A float32 number for each.
        work: A batch's activations and logits, and what is compared of the largest parameter.
    """

    weights: int
    accumulators: int
    work: int

    @classmethod
    def of(cls, shape: Shape, dtype: torch.dtype, batch_size: int, tokens: int) -> Needs:
        sizes, itemsize = shape.sizes(), dtype.itemsize
        activations = (16 * shape.hidden + 5 * shape.intermediate) * shape.layers * itemsize
        logits = shape.vocabulary * (3 * 4 + itemsize)  # in float32 for the loss, with their gradient and softmax
        work = batch_size * tokens * (activations + logits) + 3 * 4 * max(sizes)
        return cls(itemsize * sum(sizes), 4 * sum(sizes), work)
