"""Models and data of the whole-pass benchmarks. Weights are random: speed does not depend on them."""

from __future__ import annotations

from dataclasses import dataclass

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
