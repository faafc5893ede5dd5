"""Tiny transformers of many families, each with inputs for a forward pass and its lists of layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

V = 41
_TEXT = dict(vocab_size=V, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4)
_SPECIAL = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
_PATCHES = dict(hidden_size=24, num_hidden_layers=3, num_attention_heads=4, image_size=16, patch_size=4)
_IMAGE = dict(**_PATCHES, intermediate_size=40)
_TWO = dict(
    vocab_size=V,
    d_model=24,
    encoder_layers=2,
    decoder_layers=3,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=40,
    decoder_ffn_dim=40,
    decoder_start_token_id=1,
    **_SPECIAL,
)


def words() -> dict:
    return {"input_ids": torch.randint(3, V, (2, 6), generator=torch.Generator().manual_seed(0))}


def image() -> dict:
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}


def question_and_answer() -> dict:
    return {**words(), "decoder_input_ids": words()["input_ids"][:, :4]}


def caption() -> dict:
    return {**words(), **image()}


def speech() -> dict:
    features = torch.randn(2, 80, 16, generator=torch.Generator().manual_seed(0))
    return {"input_features": features, "decoder_input_ids": words()["input_ids"]}


def sound() -> dict:
    return {"input_values": torch.randn(2, 64, generator=torch.Generator().manual_seed(0))}


@dataclass(frozen=True)
class Family:
    """How to make a model, its inputs, and how many layers each of its lists has."""

    name: str
    settings: dict
    inputs: Callable[[], dict]
    stacks: dict[str, int]

    def model(self) -> nn.Module:
        import transformers

        torch.manual_seed(0)
        cls = getattr(transformers, self.name)
        return cls(cls.config_class(**self.settings)).eval()


_T5 = dict(vocab_size=V, d_model=24, d_kv=6, d_ff=40, num_layers=2, num_decoder_layers=3, num_heads=4)
_BOTH_TOWERS = dict(text_config={**_TEXT, **_SPECIAL}, vision_config=_IMAGE)

VISION: dict[str, Family] = {
    "vit": Family("ViTForImageClassification", _IMAGE, image, {"vit.layers": 3}),
    "deit": Family("DeiTForImageClassificationWithTeacher", _IMAGE, image, {"deit.layers": 3}),
    "dinov2": Family("Dinov2ForImageClassification", _PATCHES, image, {"dinov2.encoder.layer": 3}),
    "dinov2-gated": Family("Dinov2Model", {**_PATCHES, "use_swiglu_ffn": True}, image, {"encoder.layer": 3}),
    "dinov2-registers": Family("Dinov2WithRegistersModel", _PATCHES, image, {"encoder.layer": 3}),
    "dinov3": Family("DINOv3ViTModel", {**_IMAGE, "num_attention_heads": 3}, image, {"model.layer": 3}),
    "clip": Family(
        "CLIPModel", _BOTH_TOWERS, caption, {"text_model.encoder.layers": 3, "vision_model.encoder.layers": 3}
    ),
    "clip-vision": Family("CLIPVisionModel", _IMAGE, image, {"encoder.layers": 3}),
    "siglip": Family(
        "SiglipModel", _BOTH_TOWERS, caption, {"text_model.encoder.layers": 3, "vision_model.encoder.layers": 3}
    ),
    "beit": Family("BeitForImageClassification", _IMAGE, image, {"beit.layers": 3}),
    "yolos": Family(
        "YolosModel", {**_IMAGE, "image_size": (16, 16), "num_detection_tokens": 2}, image, {"encoder.layer": 3}
    ),
    "swin": Family(
        "SwinForImageClassification",
        dict(image_size=16, patch_size=2, embed_dim=12, depths=[2, 3], num_heads=[2, 4], window_size=4),
        image,
        {"swin.encoder.layers.0.blocks": 2, "swin.encoder.layers.1.blocks": 3},
    ),
}

FAMILIES: dict[str, Family] = {
    "bert": Family("BertForMaskedLM", _TEXT, words, {"bert.encoder.layer": 3}),
    "roberta": Family("RobertaForSequenceClassification", _TEXT, words, {"roberta.encoder.layer": 3}),
    "distilbert": Family(
        "DistilBertForMaskedLM",
        dict(vocab_size=V, dim=24, hidden_dim=40, n_layers=3, n_heads=4),
        words,
        {"distilbert.transformer.layer": 3},
    ),
    "deberta": Family(
        "DebertaV2ForMaskedLM",
        dict(**_TEXT, relative_attention=True, pos_att_type=["p2c", "c2p"]),
        words,
        {"deberta.encoder.layer": 3},
    ),
    "modernbert": Family(
        "ModernBertForMaskedLM", dict(**_TEXT, **_SPECIAL, cls_token_id=1, sep_token_id=2), words, {"model.layers": 3}
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        dict(vocab_size=V, n_embd=24, n_layer=3, n_head=4, bos_token_id=1, eos_token_id=2),
        words,
        {"transformer.h": 3},
    ),
    "gpt-neox": Family("GPTNeoXForCausalLM", _TEXT, words, {"gpt_neox.layers": 3}),
    "bloom": Family(
        "BloomForCausalLM", dict(vocab_size=V, hidden_size=24, n_layer=3, n_head=4), words, {"transformer.h": 3}
    ),
    "falcon": Family(
        "FalconForCausalLM",
        dict(vocab_size=V, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, **_SPECIAL),
        words,
        {"transformer.h": 3},
    ),
    "llama": Family("LlamaForCausalLM", _TEXT, words, {"model.layers": 3}),
    "mistral": Family("MistralForCausalLM", {**_TEXT, "num_key_value_heads": 2}, words, {"model.layers": 3}),
    "qwen3": Family("Qwen3ForCausalLM", dict(**_TEXT, num_key_value_heads=2, head_dim=8), words, {"model.layers": 3}),
    "gemma3": Family("Gemma3ForCausalLM", dict(**_TEXT, num_key_value_heads=1, head_dim=8), words, {"model.layers": 3}),
    "phi3": Family("Phi3ForCausalLM", {**_TEXT, **_SPECIAL}, words, {"model.layers": 3}),
    "mixtral": Family(
        "MixtralForCausalLM", dict(**_TEXT, num_key_value_heads=2, num_local_experts=4), words, {"model.layers": 3}
    ),
    "opt": Family(
        "OPTForCausalLM",
        dict(vocab_size=V, hidden_size=24, ffn_dim=40, num_hidden_layers=3, num_attention_heads=4)
        | dict(word_embed_proj_dim=24),
        words,
        {"model.decoder.layers": 3},
    ),
    "mamba": Family(
        "MambaForCausalLM", dict(vocab_size=V, hidden_size=24, num_hidden_layers=3), words, {"backbone.layers": 3}
    ),
    "t5": Family("T5ForConditionalGeneration", _T5, question_and_answer, {"encoder.block": 2, "decoder.block": 3}),
    "t5-gated": Family(
        "T5ForConditionalGeneration",
        {**_T5, "feed_forward_proj": "gated-gelu"},
        question_and_answer,
        {"encoder.block": 2, "decoder.block": 3},
    ),
    "bart": Family(
        "BartForConditionalGeneration",
        _TWO,
        question_and_answer,
        {"model.encoder.layers": 2, "model.decoder.layers": 3},
    ),
    "whisper": Family(
        "WhisperForConditionalGeneration",
        dict(**_TWO, max_source_positions=8),
        speech,
        {"model.encoder.layers": 2, "model.decoder.layers": 3},
    ),
    "wav2vec2": Family(
        "Wav2Vec2Model",
        dict(**_TEXT, conv_dim=(8, 8), conv_stride=(2, 2), conv_kernel=(3, 3), num_feat_extract_layers=2)
        | dict(num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4),
        sound,
        {"encoder.layers": 3},
    ),
    **VISION,
}
