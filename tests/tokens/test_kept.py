"""Which patches stay, followed through several layers, and a model that does not notice."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fishkern import tokens
from fishkern.tokens import TokenReduction
from tests.tokens.reference import SPECIAL, SUPPORTED, classifier, made

pytest.importorskip("transformers")


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("name", SUPPORTED)
def test_patches_are_followed(name, merge):
    """Every patch is marked by a feature of its own, which nothing but a merger mixes with others."""
    model, inputs = made(name, torch.float32)
    tower = getattr(model, model.base_model_prefix, model)
    special, numbers = SPECIAL[name], (0, 1, 2)
    states = []
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if any(part in path for part in ("o_proj", "out_proj", "fc2", "down_proj")):
                parameter.zero_()  # so the layers add nothing to their tokens
    tokens.attach(model, TokenReduction(numbers, 0.7, merge=merge))
    stack = next(module for module in tower.modules() if isinstance(module, nn.ModuleList))

    def mark(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, special:, :16] = 100 * torch.eye(16)
        return output

    first = tower.pre_layrnorm if name == "clip-vision" else tower.embeddings
    first.register_forward_hook(mark)
    for layer in stack:
        layer.register_forward_hook(lambda module, args, output: states.append(output))
    kept = tokens.kept_tokens(model, inputs["pixel_values"])
    assert [entry.layer for entry in kept] == list(numbers)
    assert [entry.kept.sum(1).tolist() for entry in kept] != [[16, 16]] * 3
    for entry, state in zip(kept, states, strict=True):
        assert entry.grid == (4, 4)
        assert entry.kept.dtype == torch.bool
        marks = state[:, special:, :16] > 99.99
        assert torch.equal(entry.kept, marks.any(1))


def test_the_model_does_not_notice():
    model, inputs = classifier(hidden_dropout_prob=0.5)
    tokens.attach(model.train(), TokenReduction([1], 0.5))
    model.vit.layernorm.eval()
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    first, second = (tokens.kept_tokens(model, inputs["pixel_values"])[0].kept for _ in range(2))
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(ValueError, match="doesn't match model"):
        tokens.kept_tokens(model, inputs["pixel_values"][..., :8])
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert [module.training for module in model.modules()] == modes


def test_images_of_another_size():
    model, inputs = classifier()
    tokens.attach(model, TokenReduction([0], 0.25))
    images = torch.cat([inputs["pixel_values"], inputs["pixel_values"]], dim=-1)[..., :24]
    (entry,) = tokens.kept_tokens(model, images, interpolate_pos_encoding=True)
    assert entry.grid == (4, 6)
    assert entry.kept.view(6, *entry.grid).sum((1, 2)).tolist() == [6] * 6


def test_where_all_stay():
    model, inputs = classifier()
    tokens.attach(model, TokenReduction([0, 1], 1.0))
    assert all(entry.kept.all() for entry in tokens.kept_tokens(model, inputs["pixel_values"]))


def test_a_model_without_reduction():
    model, inputs = classifier()
    with pytest.raises(ValueError, match=r"does not reduce tokens: fishkern.tokens.attach a recipe first"):
        tokens.kept_tokens(model, inputs["pixel_values"])
