"""Rotary embeddings that choose their frequencies by the longest example: found, and refused in packed rows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fishkern as fk
from fishkern import hosts
from tests.models.test_packed import Wide, alone, documents, flat, in_rows, made, worst
from tests.support import zoo

transformers = pytest.importorskip("transformers")

SIZES = dict(vocab_size=zoo.V, hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4)


def longrope() -> nn.Module:
    torch.manual_seed(0)
    scaled = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 3, long_factor=[3.0, 5.0, 7.0])
    special = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, original_max_position_embeddings=8)
    config = transformers.Phi3Config(
        **SIZES, **special, num_key_value_heads=2, max_position_embeddings=64,
        rope_parameters={**scaled, "original_max_position_embeddings": 8},
    )  # fmt: skip
    return transformers.Phi3ForCausalLM(config).double().eval()


def dynamic() -> nn.Module:
    torch.manual_seed(0)
    scaled = dict(rope_type="dynamic", rope_theta=1e4, factor=4.0)
    config = transformers.LlamaConfig(**SIZES, max_position_embeddings=8, rope_parameters=scaled)
    return transformers.LlamaForCausalLM(config).double().eval()


def test_limits_are_found():
    assert hosts.length_limits(longrope()) == {(8, "longrope")}
    assert hosts.length_limits(dynamic()) == {(8, "dynamic")}
    assert hosts.length_limits(zoo.gemma3().model) == hosts.length_limits(made()) == set()


def test_of_each_kind_of_layer():
    """As Gemma 3 has it, with other frequencies in layers with a window."""
    module, parameters = nn.Module(), {"original_max_position_embeddings": 16}
    module.rope_type = {"full_attention": "longrope", "sliding_attention": "default"}
    module.config = type("Config", (), {"rope_parameters": {"full_attention": parameters}})
    assert hosts.length_limits(nn.Sequential(module)) == {(16, "longrope")}


@pytest.mark.parametrize("model", [longrope, dynamic])
def test_documents_on_both_sides_of_the_limit_are_refused(model):
    """The two that show that documents are kept apart are short, and so show nothing of it."""
    model, docs = model(), documents((5, 4, 12))
    with pytest.raises(ValueError, match="batch 0 .* longest document reaches 12 positions, beyond the 8 .* down to 4"):
        fk.estimate(model, [flat(docs)])
    with pytest.raises(ValueError, match="batch 1 .* longest document reaches 12"):
        fk.estimate(model, [flat(docs[:2]), in_rows(docs, [(0, 1), (2,)])])
    assert worst(fk.estimate(model, [flat(docs[:2])], Wide()), alone(model, docs[:2])) < 1e-10


def test_documents_on_one_side_serve():
    """Beyond the limit longrope has one set of frequencies, and dynamic scaling one for each length."""
    model, docs = longrope(), documents((9, 12, 10))
    assert worst(fk.estimate(model, [flat(docs)], Wide()), alone(model, docs)) < 1e-10
    with pytest.raises(ValueError, match="reaches 12 positions"):
        fk.estimate(dynamic(), [flat(docs)])
