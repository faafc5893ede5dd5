"""Models and data of the whole-pass benchmarks and of the comparison with rivals.

Weights are random: speed does not depend on them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn


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
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=16 * self.hidden,
                hidden_size=self.hidden,
                intermediate_size=self.hidden * 43 // 16,
                num_hidden_layers=self.layers,
                num_attention_heads=self.hidden // 64,
                num_key_value_heads=self.hidden // 64,
                tie_word_embeddings=False,
                attn_implementation="sdpa",
            )
        ).eval()

    def data(self) -> list[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(0, 16 * self.hidden, (self.batches, self.N, self.T), generator=generator)
        return [{"input_ids": rows, "attention_mask": torch.ones_like(rows), "labels": rows} for rows in ids]


CPU_CASES = [WholePass(T=16), WholePass(T=64), WholePass(T=256)]


@dataclass(frozen=True)
class Shape:
    """One pass over full rows by a model of BERT's or LLaMA's kind, on a device.

    Args:
        kind: ``"bert"`` (sequence classification) or ``"llama"`` (causal language model).
        T: Tokens in each example.
        N: Examples in each batch.
        batches: Number of batches.
        layers: Encoder or decoder layers.
        hidden: Hidden size.
        intermediate: Size of the feed-forward layers.
        vocabulary: Number of tokens known.
        heads: Attention heads.
        key_heads: Heads of keys and values, the same number where it is 0.
        tied: Whether embedding and head share their weight.
        dtype: Of the weights.
        device: Where model and data are.
    """

    kind: str
    T: int
    N: int = 8
    batches: int = 4
    layers: int = 4
    hidden: int = 512
    intermediate: int = 1376
    vocabulary: int = 8192
    heads: int = 8
    key_heads: int = 0
    tied: bool = False
    dtype: str = "float32"
    device: str = "cpu"

    def __str__(self) -> str:
        return f"{self.kind},layers={self.layers},hidden={self.hidden},T={self.T},N={self.N},batches={self.batches}"

    def model(self) -> nn.Module:
        """Random weights of the initialization's own spread, no dropout, in evaluation mode."""
        from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

        sizes = dict(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            max_position_embeddings=max(512, self.T),
            attn_implementation="sdpa",
        )
        torch.manual_seed(0)
        with torch.device(self.device):
            if self.kind == "llama":
                key_heads = self.key_heads or self.heads
                config = LlamaConfig(**sizes, num_key_value_heads=key_heads, tie_word_embeddings=self.tied)
                model = LlamaForCausalLM(config)
            else:
                dropout = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
                config = BertConfig(**sizes, **dropout, num_labels=3, problem_type="single_label_classification")
                model = BertForSequenceClassification(config)
        return model.to(getattr(torch, self.dtype)).eval()

    def data(self) -> list[dict[str, Tensor]]:
        """Full rows without a mask; BERT's labels are of three classes."""
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(1, self.vocabulary, (self.batches, self.N, self.T), generator=generator).to(self.device)
        classes = torch.randint(3, (self.batches, self.N), generator=generator).to(self.device)
        return [
            {"input_ids": rows, "labels": rows if self.kind == "llama" else labels}
            for rows, labels in zip(ids, classes, strict=True)
        ]

    def small(self) -> Shape:
        """The same kind in small and in float32, on which errors are measured."""
        key_heads = self.key_heads and 2
        return Shape(self.kind, 24, 4, 2, 2, 64, 172, 256, 4, key_heads, self.tied, device=self.device)


BERT_MINI = Shape("bert", 128, layers=4, hidden=256, intermediate=1024, vocabulary=30522, heads=4)
LLAMA_SMALL = Shape("llama", 128, layers=4, hidden=512, intermediate=1376, vocabulary=8192, heads=8)
SHAPES_CPU = [
    replace(BERT_MINI, T=32, batches=12),
    replace(BERT_MINI, T=128, batches=4),
    replace(BERT_MINI, T=512, N=4, batches=16),
    replace(LLAMA_SMALL, T=32, batches=6),
    replace(LLAMA_SMALL, T=128, batches=4),
    replace(LLAMA_SMALL, T=512, N=4, batches=8),
]

BERT_BASE = Shape("bert", 128, 32, 8, 12, 768, 3072, 30522, heads=12, device="cuda")
LLAMA_1B = Shape("llama", 512, 8, 8, 16, 2048, 8192, 128256, 32, 8, tied=True, dtype="bfloat16", device="cuda")
LLAMA_8B = Shape("llama", 512, 8, 2, 32, 4096, 14336, 128256, 32, 8, dtype="bfloat16", device="cuda")
SHAPES_GPU = [
    *(replace(BERT_BASE, T=T) for T in (32, 128, 512)),
    *(replace(LLAMA_1B, T=T) for T in (32, 128, 512)),
    replace(LLAMA_1B, T=2048, N=4, batches=4),
    *(replace(LLAMA_8B, T=T) for T in (128, 512)),
    replace(LLAMA_8B, T=2048, N=4),
]
