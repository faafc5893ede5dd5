"""Layers and types of module that people recognise, from the names of real models."""

from __future__ import annotations

import pytest

from fishkern import hosts
from fishkern.report import Cell, cells_of
from tests.support.layered import FAMILIES


def cells(*names: str) -> list[tuple[str | None, str]]:
    return [(cell.layer, cell.module) for cell in cells_of(names).values()]


def test_a_llama():
    assert cells(
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
    assert cells(
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
    assert cells(
        "encoder.block.0.layer.0.SelfAttention.q.weight",
        "decoder.block.0.layer.1.EncDecAttention.q.weight",
    ) == [("encoder.block 0", "SelfAttention.q"), ("decoder.block 0", "EncDecAttention.q")]


def test_experts_are_taken_together():
    names = [f"model.layers.0.mlp.experts.{n}.w1.weight" for n in range(3)]
    assert set(cells(*names)) == {("layer 0", "w1")}


def test_an_adapter():
    assert cells(
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
    ("name", "cell"),
    [
        ("weight", Cell(None, "weight")),
        ("0.weight", Cell(None, "0")),
        ("h.0.weight", Cell("layer 0", "weight")),
        ("a.default", Cell(None, "a")),
    ],
)
def test_short_names(name, cell):
    assert cells_of([name]) == {name: cell}


def test_stages_are_told_apart():
    assert cells(
        "swin.encoder.layers.0.blocks.1.mlp.fc1.weight",
        "swin.encoder.layers.0.downsample.norm.weight",
        "swin.encoder.layers.1.blocks.0.mlp.fc1.weight",
        "classifier.1.weight",
    ) == [("layers.0.blocks 1", "fc1"), (None, "norm"), ("layers.1.blocks 0", "fc1"), (None, "classifier.1")]


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_those_of_hosts(family):
    pytest.importorskip("transformers")
    model = FAMILIES[family].model()
    cells, layers = cells_of(hosts.layer_of(model)), hosts.layer_of(model)
    pairs = {(cells[name].layer, layer) for name, layer in layers.items()}
    assert len(pairs) == len({label for label, _ in pairs}) == len({layer for _, layer in pairs})
    assert (None, None) in pairs
