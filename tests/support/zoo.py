"""Small, randomly initialised models of the families that people use, each with the batches and the loss it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from tests.support import oracle

V = 41

WORDS = ["<pad>", "<unk>", "</s>", "[MASK]"]
WORDS += ["the", "sea", "rain", "falls", "on", "old", "stones", "all", "night", "long"]


@dataclass(frozen=True)
class Specimen:
    """A model, how to make its batches, and the loss of one example written out by hand."""

    model: nn.Module
    batch: Callable[..., dict]
    loss: oracle.Loss


def text_batch(N: int = 5, T: int = 7, *, pad: str = "right", low: int = 3, seed: int = 0) -> dict:
    """Rows of unequal length; labels are the tokens, -100 at padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, V, (N, T), generator=generator)
    mask = torch.zeros(N, T, dtype=torch.long)
    for n in range(N):
        length = T if n == 0 else int(torch.randint(min(low, T), T + 1, (), generator=generator))
        mask[n, :length] = 1
    if pad == "left":
        mask = mask.flip(1)
    ids = torch.where(mask.bool(), ids, 0)
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask.bool(), ids, -100)}


def masked_batch(N: int = 5, T: int = 7, **options) -> dict:
    batch = text_batch(N, T, **options)
    hidden = torch.rand(N, T, generator=torch.Generator().manual_seed(1)) < 0.5
    hidden[:, 1] = True
    if options.get("pad") == "left":
        hidden[:, -1] = True
    return {**batch, "labels": torch.where(hidden, batch["labels"], -100)}


def answer_batch(N: int = 5, T: int = 7, **options) -> dict:
    """Inputs of one length, answers of another."""
    labels = text_batch(N, max(T - 2, 2), seed=7)["labels"]
    return {**text_batch(N, T, **options), "labels": labels}


def class_batch(N: int = 5, T: int = 7, **options) -> dict:
    labels = torch.randint(0, 3, (N,), generator=torch.Generator().manual_seed(2))
    return {**text_batch(N, T, **options), "labels": labels}


def image_batch(N: int = 5, T: int = 0, **options) -> dict:
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 3, (N,), generator=generator)
    return {"pixel_values": torch.randn(N, 3, 16, 16, generator=generator), "labels": labels}


def tokenizer():
    """A tokenizer of transformers that knows :data:`WORDS`, undivided, and nothing else."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = dict(pad_token="<pad>", unk_token="<unk>", eos_token="</s>", mask_token="[MASK]")
    return PreTrainedTokenizerFast(tokenizer_object=words, **special, model_max_length=32)


_SMALL = dict(vocab_size=V, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)


def llama(**changes) -> Specimen:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{**_SMALL, "num_key_value_heads": 2, "tie_word_embeddings": False, **changes})
    return Specimen(LlamaForCausalLM(config), text_batch, oracle.next_token)


def qwen3() -> Specimen:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(**_SMALL, num_key_value_heads=2, head_dim=8, tie_word_embeddings=False)
    return Specimen(Qwen3ForCausalLM(config), text_batch, oracle.next_token)


def gemma() -> Specimen:
    from transformers import GemmaConfig, GemmaForCausalLM

    config = GemmaConfig(**_SMALL, num_key_value_heads=1, head_dim=8)
    return Specimen(GemmaForCausalLM(config), text_batch, oracle.next_token)


def gemma3() -> Specimen:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(**_SMALL, num_key_value_heads=1, head_dim=8, sliding_window=4)
    return Specimen(Gemma3ForCausalLM(config), text_batch, oracle.next_token)


def gpt2(**changes) -> Specimen:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = dict(vocab_size=V, n_embd=24, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0)
    return Specimen(GPT2LMHeadModel(GPT2Config(**{**sizes, **changes})), text_batch, oracle.next_token)


def opt() -> Specimen:
    from transformers import OPTConfig, OPTForCausalLM

    sizes = dict(vocab_size=V, hidden_size=24, ffn_dim=40, num_hidden_layers=2, num_attention_heads=4)
    config = OPTConfig(**sizes, max_position_embeddings=32, word_embed_proj_dim=24)
    return Specimen(OPTForCausalLM(config), text_batch, oracle.next_token)


def bert_for(head: str, **changes) -> nn.Module:
    """BERT with one of the heads of transformers, such as ``"TokenClassification"``."""
    import transformers

    config = transformers.BertConfig(**{**_SMALL, "max_position_embeddings": 32, **changes})
    return getattr(transformers, f"BertFor{head}")(config)


def bert() -> Specimen:
    return Specimen(bert_for("MaskedLM"), masked_batch, oracle.per_token)


def bert_classifier(**changes) -> Specimen:
    model = bert_for("SequenceClassification", **{"num_labels": 3, **changes})
    return Specimen(model, class_batch, oracle.one_class)


def modernbert() -> Specimen:
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    special = dict(pad_token_id=0, bos_token_id=1, eos_token_id=1, cls_token_id=1, sep_token_id=1)
    config = ModernBertConfig(**_SMALL, **special, local_attention=4, max_position_embeddings=32)
    return Specimen(ModernBertForMaskedLM(config), masked_batch, oracle.per_token)


def deberta() -> Specimen:
    from transformers import DebertaV2Config, DebertaV2ForMaskedLM

    config = DebertaV2Config(**_SMALL, max_position_embeddings=32, relative_attention=True, pos_att_type=["p2c", "c2p"])
    return Specimen(DebertaV2ForMaskedLM(config), masked_batch, oracle.per_token)


def t5(**changes) -> Specimen:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = dict(vocab_size=V, d_model=24, d_kv=6, d_ff=40, num_layers=2, num_heads=4, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(T5Config(**{**sizes, "pad_token_id": 0, **changes}))
    return Specimen(model, answer_batch, oracle.decoder_tokens)


def vit(**changes) -> Specimen:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)
    config = ViTConfig(**{**sizes, "image_size": 16, "patch_size": 4, "num_labels": 3, **changes})
    return Specimen(ViTForImageClassification(config), image_batch, oracle.one_class)


def mixtral(experts: str = "eager") -> Specimen:
    """The default experts refuse float64."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**_SMALL, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
    config._experts_implementation = experts
    return Specimen(MixtralForCausalLM(config), text_batch, oracle.next_token)


def experts(family: str, implementation: str = "eager", seed: int = 0) -> Specimen:
    """A model of :data:`EXPERTS`, no parameter of which is zero."""
    import transformers

    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(
        **{**_SMALL, "num_key_value_heads": 2, "num_experts_per_tok": 2, **EXPERTS[family]}, head_dim=6
    )
    config._experts_implementation = implementation
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    return Specimen(model, text_batch, oracle.next_token)


def swin() -> Specimen:
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(
        image_size=16, patch_size=2, embed_dim=12, depths=[2], num_heads=[2], window_size=4, num_labels=3
    )
    return Specimen(SwinForImageClassification(config), image_batch, oracle.one_class)


EXPERTS: dict[str, dict] = {
    "Mixtral": dict(num_local_experts=5),
    "Qwen3Moe": dict(moe_intermediate_size=12, num_experts=5, norm_topk_prob=True),
    "GptOss": dict(num_local_experts=5, intermediate_size=12, num_hidden_layers=1),
    "DeepseekV3": dict(
        moe_intermediate_size=12, n_routed_experts=6, n_group=2, topk_group=1, n_shared_experts=1,
        first_k_dense_replace=1, num_key_value_heads=4, q_lora_rank=12, kv_lora_rank=12, qk_rope_head_dim=6,
        qk_nope_head_dim=6, v_head_dim=6,
    ),
    "Olmoe": dict(num_experts=5),
}  # fmt: skip
"""Families whose experts are stored in one tensor, with their sizes."""

FAMILIES: dict[str, Callable[[], Specimen]] = {
    "llama": llama,
    "qwen3": qwen3,
    "gemma": gemma,
    "gemma3": gemma3,
    "gpt2": gpt2,
    "opt": opt,
    "bert": bert,
    "bert-classifier": bert_classifier,
    "modernbert": modernbert,
    "deberta": deberta,
    "t5": t5,
    "vit": vit,
    "swin": swin,
    "mixtral": mixtral,
}
