"""Places that people recognise, out of the names of real models."""

from __future__ import annotations

import pytest

from fishkern.report import Layout, Place


def places(*names: str) -> list[tuple[str | None, str]]:
    layout = Layout(names)
    return [(layout[name].layer, layout[name].module) for name in names]


def test_a_llama():
    assert places(
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.11.mlp.up_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
    ) == [
        (None, "embed_tokens"),
        ("layer 0", "q_proj"),
        ("layer 11", "up_proj"),
        (None, "norm"),
        (None, "lm_head"),
    ]


def test_modules_of_one_last_name_are_told_apart():
    """A BERT layer has three that end in dense."""
    assert places(
        "bert.encoder.layer.0.attention.output.dense.weight",
        "bert.encoder.layer.0.intermediate.dense.weight",
        "bert.encoder.layer.0.output.dense.bias",
        "bert.pooler.dense.weight",
    ) == [
        ("layer 0", "attention.output.dense"),
        ("layer 0", "intermediate.dense"),
        ("layer 0", "output.dense"),
        (None, "pooler.dense"),
    ]


def test_two_stacks_are_told_apart():
    assert places(
        "encoder.block.0.layer.0.SelfAttention.q.weight",
        "decoder.block.0.layer.1.EncDecAttention.q.weight",
    ) == [("encoder.block 0", "SelfAttention.q"), ("decoder.block 0", "EncDecAttention.q")]


def test_experts_are_taken_together():
    names = [f"model.layers.0.mlp.experts.{n}.w1.weight" for n in range(3)]
    assert set(places(*names)) == {("layer 0", "w1")}


def test_an_adapter():
    assert places(
        "base_model.model.model.layers.2.self_attn.q_proj.lora_A.default.weight",
        "base_model.model.model.layers.2.self_attn.q_proj.lora_B.default.weight",
        "base_model.model.model.layers.2.self_attn.k_proj.lora_A.default.weight",
        "base_model.model.model.layers.2.self_attn.k_proj.ia3_l.default",
    ) == [
        ("layer 2", "q_proj.lora_A"),
        ("layer 2", "lora_B"),
        ("layer 2", "k_proj.lora_A"),
        ("layer 2", "ia3_l"),
    ]


@pytest.mark.parametrize(
    ("name", "place"),
    [("weight", Place(None, "weight")), ("0.weight", Place("layer 0", "weight")), ("a.default", Place(None, "a"))],
)
def test_short_names(name, place):
    assert Layout([name])[name] == place
