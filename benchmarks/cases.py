"""Models and data of the whole-pass benchmarks and of the comparison with rivals."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.shapes import BERT_BASE, BERT_MINI, LLAMA_1B, LLAMA_8B, LLAMA_21M, Shape

CLASSES = 3  # of sequences, for BERT


@dataclass(frozen=True)
class WholePass:
    """One pass over data.

    Args:
        T: Tokens in each example.
        N: Examples in each batch.
        batches: Number of batches.
        layers: Decoder layers.
        hidden: Hidden size; the feed-forward size is 2.6875 times it, the vocabulary 16 times it, as in small LLaMAs.
    """

    T: int
    N: int = 8
    batches: int = 16  # 128 examples, the number that FISH-Tuning takes
    layers: int = 4
    hidden: int = 512

    def __str__(self) -> str:
        return f"T={self.T},N={self.N},batches={self.batches},layers={self.layers},hidden={self.hidden}"

    def model(self) -> nn.Module:
        hidden = self.hidden
        return Shape(self.layers, hidden, hidden * 43 // 16, 16 * hidden, hidden // 64).model()

    def data(self) -> list[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(0, 16 * self.hidden, (self.batches, self.N, self.T), generator=generator)
        return [{"input_ids": rows, "attention_mask": torch.ones_like(rows), "labels": rows} for rows in ids]


CPU_CASES = [WholePass(T=16), WholePass(T=64), WholePass(T=256)]


@dataclass(frozen=True)
class FullRows:
    """One pass over full rows, on a device.

    Args:
        shape: Of the model: a BERT that classifies sequences, or a causal LLaMA.
        T: Tokens in each example.
        N: Examples in each batch.
        batches: Number of batches.
        dtype: Of the weights.
        device: Where model and data are.
    """

    shape: Shape
    T: int
    N: int = 8
    batches: int = 4
    dtype: str = "float32"
    device: str = "cpu"

    def __str__(self) -> str:
        shape = f"{self.shape.kind},layers={self.shape.layers},hidden={self.shape.hidden}"
        return f"{shape},T={self.T},N={self.N},batches={self.batches}"

    @property
    def fields(self) -> dict[str, Any]:
        """As a record says it."""
        return vars(self.shape) | {name: value for name, value in vars(self).items() if name != "shape"}

    def model(self) -> nn.Module:
        """Random weights of the initialization's own spread, no dropout, in evaluation mode."""
        settings: dict[str, Any] = {"max_position_embeddings": max(512, self.T)}
        if self.shape.kind == "bert":
            settings |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
            settings |= {"num_labels": CLASSES, "problem_type": "single_label_classification"}
        return self.shape.model(self.device, getattr(torch, self.dtype), **settings)

    def data(self) -> list[dict[str, Tensor]]:
        """Full rows without a mask; BERT's labels are classes."""
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(1, self.shape.vocabulary, (self.batches, self.N, self.T), generator=generator)
        classes = torch.randint(CLASSES, (self.batches, self.N), generator=generator).to(self.device)
        return [
            {"input_ids": rows, "labels": rows if self.shape.kind == "llama" else labels}
            for rows, labels in zip(ids.to(self.device), classes, strict=True)
        ]

    def small(self) -> FullRows:
        """The same kind in small and in float32, on which errors are measured."""
        sizes = {"layers": 2, "hidden": 64, "intermediate": 172, "vocabulary": 256, "heads": 4}
        shape = replace(self.shape, **sizes, key_heads=self.shape.key_heads and 2)
        return FullRows(shape, 24, 4, 2, device=self.device)


SHAPES_CPU = [
    FullRows(BERT_MINI, 32, batches=12),
    FullRows(BERT_MINI, 128),
    FullRows(BERT_MINI, 512, N=4, batches=16),
    FullRows(LLAMA_21M, 32, batches=6),
    FullRows(LLAMA_21M, 128),
    FullRows(LLAMA_21M, 512, N=4, batches=8),
]
SHAPES_GPU = [
    *(FullRows(BERT_BASE, T, N=32, batches=8, device="cuda") for T in (32, 128, 512)),
    *(FullRows(LLAMA_1B, T, batches=8, dtype="bfloat16", device="cuda") for T in (32, 128, 512)),
    FullRows(LLAMA_1B, 2048, N=4, dtype="bfloat16", device="cuda"),
    *(FullRows(LLAMA_8B, T, batches=2, dtype="bfloat16", device="cuda") for T in (128, 512)),
    FullRows(LLAMA_8B, 2048, N=4, batches=2, dtype="bfloat16", device="cuda"),
]
