"""Models of named shapes with random weights, and random full rows for them: neither changes the speed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

CLASSES = 3  # of sequences, for BERT


@dataclass(frozen=True)
class Shape:
    """A BERT with a head for classes of sequences, or a causal LLaMA, as its config describes it.

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
        """Make one with random weights, the same each time, directly on the device and in this dtype.

        Args:
            device: Where it is made.
            dtype: Of the weights.
            **settings: More of the config than the shape.

        Returns:
            The model, in evaluation mode.
        """
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, LlamaConfig

        sizes: dict[str, Any] = {
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

    def linears(self) -> list[tuple[int, int]]:
        """Out- and in-features of the seven linears of one layer of a LLaMA: four of attention, three of the MLP."""
        keys = self.hidden * (self.key_heads or self.heads) // self.heads
        return [
            (self.hidden, self.hidden),
            (keys, self.hidden),
            (keys, self.hidden),
            (self.hidden, self.hidden),
            (self.intermediate, self.hidden),
            (self.intermediate, self.hidden),
            (self.hidden, self.intermediate),
        ]


BERT_BASE = Shape(12, 768, 3072, 30522, 12, kind="bert")
BERT_MINI = Shape(4, 256, 1024, 30522, 4, kind="bert")
MINILM = Shape(6, 384, 1536, 30522, 12, kind="bert")
LLAMA_8B = Shape(32, 4096, 14336, 128256, 32, 8)  # Llama 3.1
LLAMA_7B = Shape(32, 4096, 11008, 32000, 32)  # Llama 2
LLAMA_1B = Shape(16, 2048, 8192, 128256, 32, 8, tied=True)  # Llama 3.2
TINYLLAMA = Shape(22, 2048, 5632, 32000, 32, 4)  # TinyLlama 1.1B
LLAMA_322M = Shape(20, 1024, 2816, 32000, 16)
LLAMA_104M = Shape(12, 768, 2064, 12288, 12)
LLAMA_32M = Shape(8, 512, 1376, 8192, 8, 4)
LLAMA_21M = Shape(4, 512, 1376, 8192, 8)
LLAMA_TINY = Shape(3, 32, 48, 64, 4, 2)


@dataclass(frozen=True)
class Workload:
    """A model and batches of full rows of random tokens.

    Args:
        shape: Of the model.
        T: Tokens in each example.
        N: Examples in each batch.
        batches: Number of batches.
        dtype: Of the weights.
        device: Where model and data are.
        lora: Rank of LoRA on all linears, whose factors alone are trained; 0 for none.
    """

    shape: Shape
    T: int
    N: int = 8
    batches: int = 4
    dtype: str = "float32"
    device: str = "cpu"
    lora: int = 0

    def __str__(self) -> str:
        shape = f"{self.shape.kind},layers={self.shape.layers},hidden={self.shape.hidden}"
        return f"{shape},T={self.T},N={self.N},batches={self.batches}"

    @property
    def fields(self) -> dict[str, Any]:
        """The case of a record."""
        own = {name: value for name, value in vars(self).items() if name != "shape" and (name != "lora" or value)}
        return vars(self.shape) | own

    def model(self) -> nn.Module:
        """The model, in evaluation mode and without dropout."""
        settings: dict[str, Any] = {"max_position_embeddings": max(512, self.T)}
        if self.shape.kind == "bert":
            settings |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
            settings |= {"num_labels": CLASSES, "problem_type": "single_label_classification"}
        model = self.shape.model(self.device, getattr(torch, self.dtype), **settings)
        return with_lora(model, self.lora) if self.lora else model

    def data(self, *, mask: bool = False) -> list[dict[str, Tensor]]:
        """The batches; labels are the tokens, or classes for a BERT.

        Args:
            mask: Whether the batches have an attention mask, all ones.
        """
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(1, self.shape.vocabulary, (self.batches, self.N, self.T), generator=generator)
        classes = torch.randint(CLASSES, (self.batches, self.N), generator=generator).to(self.device)
        return [
            {
                "input_ids": rows,
                **({"attention_mask": torch.ones_like(rows)} if mask else {}),
                "labels": rows if self.shape.kind == "llama" else labels,
            }
            for rows, labels in zip(ids.to(self.device), classes, strict=True)
        ]

    def small(self) -> Workload:
        """The same kind of model, small and in float32, for errors."""
        sizes = {"layers": 2, "hidden": 64, "intermediate": 172, "vocabulary": 256, "heads": 4}
        shape = replace(self.shape, **sizes, key_heads=self.shape.key_heads and 2)
        return Workload(shape, 24, 4, 2, device=self.device)


def small_llama(layers: int, hidden: int) -> Shape:
    """A LLaMA with heads of 64 and the proportions of small ones."""
    return Shape(layers, hidden, hidden * 43 // 16, 16 * hidden, hidden // 64)


def with_lora(model: nn.Module, rank: int) -> nn.Module:
    """LoRA of random factors on all linears."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear", init_lora_weights=False)).eval()
