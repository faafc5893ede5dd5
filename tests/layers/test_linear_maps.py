"""The linear maps of a model: which modules they are, and the matrices that they multiply by."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from torch import nn

from fishkern.layers import UnsupportedModuleError, linear_maps
from tests.models.test_quantized import Buffered, Float8, FloatStorage, Packed, Repacking, Subclassed
from tests.support import zoo

pytest.importorskip("transformers")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "vit"])
def test_a_module_multiplies_by_the_matrix_of_its_map(kind):
    model = getattr(zoo, kind)().model.double()
    maps = linear_maps(model)
    assert list(maps) == [name for name, _ in model.named_parameters() if name in maps]
    for name, linear in maps.items():
        assert model.get_submodule(linear.path) is linear.module
        assert name == f"{linear.path}.weight"
        O, I = linear.shape
        assert linear.matrix().shape == (O, I)
        if isinstance(linear.module, nn.Conv2d):
            x = torch.randn(2, *linear.weight.shape[1:], dtype=torch.float64)
            y, x = linear.module(x).flatten(1), x.flatten(1)
        else:
            x = torch.randn(2, I, dtype=torch.float64)
            y = linear.module(x)
        bias = 0 if linear.module.bias is None else linear.module.bias
        torch.testing.assert_close(y, x @ linear.matrix().T + bias)
    assert {linear.transposed for linear in maps.values()} == ({True} if kind == "gpt2" else {False})


def test_weights_that_an_embedding_shares_and_vectors_are_not_among_them():
    tied = zoo.llama(tie_word_embeddings=True).model
    free = zoo.llama(tie_word_embeddings=False).model
    assert "lm_head.weight" in linear_maps(free)
    assert not any("embed" in name or "norm" in name or "head" in name for name in linear_maps(tied))
    assert all(name.endswith("_proj.weight") for name in linear_maps(tied))


@pytest.mark.parametrize("kind", [Packed, Buffered, Repacking, FloatStorage, Subclassed, Float8])
def test_a_quantised_linear_gives_the_matrix_that_it_multiplies_by(kind, monkeypatch):
    monkeypatch.setattr(import_module("fishkern.layers.linear_maps"), "_ROWS", 4)  # several pieces
    linear = kind(8, 6)
    model = nn.Sequential(linear).eval()
    (found,) = linear_maps(model).values()
    assert (found.name, found.path, found.stored, found.shape) == ("0.weight", "0", True, (8, 6))
    torch.testing.assert_close(found.matrix().double(), linear.dequantize(), rtol=1e-6, atol=1e-6)
    assert not getattr(linear, "packed", False)


def test_the_bias_of_a_quantised_linear_is_no_part_of_its_matrix():
    class Shifted(Packed):
        def forward(self, x):
            return super().forward(x) + 100

    linear = Shifted(8, 6)
    (found,) = linear_maps(nn.Sequential(linear)).values()
    torch.testing.assert_close(found.matrix().double(), linear.dequantize(), rtol=1e-5, atol=1e-5)


def test_a_quantised_linear_that_takes_no_identity_is_refused_by_name():
    class Grouped(Packed):
        def forward(self, x):
            raise RuntimeError("rows must come in groups of 32")

    (found,) = linear_maps(nn.Sequential(Grouped(8, 6))).values()
    with pytest.raises(UnsupportedModuleError, match=r"'0' \(Grouped\) is quantised"):
        found.matrix()
