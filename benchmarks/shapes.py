"""Shapes of the models that benchmarks run on. Weights are random: speed does not depend on them.

Imports nothing but torch, and transformers where a model is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Shape:
    """A BERT with a head for classes of sequences, or a causal LLaMA, as its config says it.

    Args:
        layers: Encoder or decoder layers.
        hidden: Hidden size.
        intermediate: Size of the feed-forward layers.
        vocabulary: Number of tokens known.
        heads: Attention heads.
        key_heads: Heads of keys and values, the same number where it is 0.
        tied: Whether embedding and head share their weight.
        kind: ``"llama"`` or ``"bert"``.
    """

    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    heads: int
    key_heads: int = 0
    tied: bool = False
    kind: str = "llama"

    def model(
        self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, **settings: Any
    ) -> nn.Module:
        """Make one with random weights, the same ones each time, on the device itself and in this dtype.

        Args:
            device: Where it is made.
            dtype: Of the weights.
            **settings: More of the config than the shape.

        Returns:
            The model, in evaluation mode.
        """
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, LlamaConfig

        sizes = {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "attn_implementation": "sdpa",
        }
        if self.kind == "llama":
            sizes |= {"num_key_value_heads": self.key_heads or self.heads, "tie_word_embeddings": self.tied}
            config, family = LlamaConfig(**sizes, **settings), AutoModelForCausalLM
        else:
            config, family = BertConfig(**sizes, **settings), AutoModelForSequenceClassification
        torch.manual_seed(0)
        with torch.device(device):
            return family.from_config(config, dtype=dtype).eval()

    def sizes(self) -> list[int]:
        """How many entries each parameter has."""
        return [parameter.numel() for parameter in self.model("meta").parameters()]


BERT_BASE = Shape(12, 768, 3072, 30522, 12, kind="bert")
BERT_MINI = Shape(4, 256, 1024, 30522, 4, kind="bert")
MINILM = Shape(6, 384, 1536, 30522, 12, kind="bert")
LLAMA_8B = Shape(32, 4096, 14336, 128256, 32, 8)  # Llama 3.1
LLAMA_1B = Shape(16, 2048, 8192, 128256, 32, 8, tied=True)  # Llama 3.2
TINYLLAMA = Shape(22, 2048, 5632, 32000, 32, 4)  # TinyLlama 1.1B
LLAMA_104M = Shape(12, 768, 2064, 12288, 12)
LLAMA_32M = Shape(8, 512, 1376, 8192, 8, 4)
LLAMA_21M = Shape(4, 512, 1376, 8192, 8)
LLAMA_TINY = Shape(3, 32, 48, 64, 4, 2)
