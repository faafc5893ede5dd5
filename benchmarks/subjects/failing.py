"""Tiny models and data on which rivals are known to fail."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.rivals import vmap_grad

Batches = list[dict[str, Tensor]]
SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, pad_token_id=None
)
DECODER = dict(**SIZES, num_key_value_heads=2)

_generator = torch.Generator().manual_seed(1)
_ids = torch.randint(3, 64, (4, 8), generator=_generator)
_mask = torch.arange(8) < torch.tensor([[8], [3], [5], [2]])
_vectors = torch.randn(1024, 8, generator=_generator)
_labels = torch.randint(8, (1024,), generator=_generator)
TOKENS: Batches = [{"input_ids": _ids, "labels": _ids}]
CLASSES: Batches = [{"input_ids": _ids, "labels": torch.tensor([0, 1, 2, 0])}]
RAGGED: Batches = [{"input_ids": _ids, "attention_mask": _mask.long(), "labels": _ids.where(_mask, -100)}]
VECTORS: Batches = [{"input": _vectors[:16], "labels": _labels[:16]}]
MANY: Batches = [{"input": _vectors, "labels": _labels}]


def llama(**changes: object) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**DECODER, "tie_word_embeddings": False, **changes})).eval()


def llama_bf16() -> nn.Module:
    return llama().bfloat16()


def checkpointed(reentrant: bool) -> nn.Module:
    """In training mode, without which transformers checkpoints nothing; the model has no dropout."""
    model = llama()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model.train()


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = dict(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=1)
    dropout = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
    return GPT2LMHeadModel(GPT2Config(**sizes, **dropout, tie_word_embeddings=False)).eval()


def mixtral() -> nn.Module:
    """Its experts by batched products: vmap cannot take them one by one, and grouped products have no float64."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    experts = dict(num_local_experts=4, num_experts_per_tok=2, experts_implementation="batched_mm")
    return MixtralForCausalLM(MixtralConfig(**DECODER, **experts, tie_word_embeddings=False)).eval()


def modernbert() -> nn.Module:
    """Its norms have no bias."""
    from transformers import ModernBertConfig, ModernBertForSequenceClassification

    torch.manual_seed(0)
    ids = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)
    config = ModernBertConfig(**{**SIZES, **ids}, num_labels=3, attn_implementation="sdpa")
    return ModernBertForSequenceClassification(config).eval()


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    dropout = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    return BertForSequenceClassification(BertConfig(**SIZES, **dropout, num_labels=3)).eval()


class _Linears(nn.Module):
    """Two linears with a nonlinearity between, of vectors of 8."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8, bias=False)
        self.second = nn.Linear(8, 8, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        return self.second(self.first(input).tanh())


def tied_linears() -> nn.Module:
    torch.manual_seed(0)
    model = _Linears()
    model.second.weight = model.first.weight
    return model.eval()


def linear(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return _Linears().to(dtype).eval()


def cross_entropies(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """One loss for each vector ``[N]``, computed from logits of at least float32."""
    logits = model(batch["input"].to(next(model.parameters()).dtype))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return nn.functional.cross_entropy(logits, batch["labels"], reduction="none")


def small_cross_entropies(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The same, small enough for squares of gradients to leave the range of float16."""
    return 1e-3 * cross_entropies(model, batch)


def vmap_with_mask(model: nn.Module, batches: Batches) -> dict[str, Tensor]:
    """As in :func:`benchmarks.rivals.vmap_grad`, with the attention mask."""
    return vmap_grad(model, batches, keep_mask=True)
