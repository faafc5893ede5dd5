"""Hooks in ordinary training: weights require gradients, modules are in training mode, and nothing is frozen."""

from __future__ import annotations

import copy
from collections import defaultdict

import pytest
import torch
from torch import nn

from fishkern.layers import UnsupportedModuleError, watch
from tests.support import zoo

pytest.importorskip("transformers")


def linear_weights(model: nn.Module) -> list[str]:
    return [name for name, one in model.named_parameters() if one.ndim == 2 and (".layers." in name or ".h." in name)]


def step(model: nn.Module, batch: dict) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(0)  # of the dropout
    model(**batch).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "not reentrant"])
@pytest.mark.parametrize("make", [zoo.llama, zoo.gpt2], ids=["llama", "gpt2"])
def test_the_factors_of_a_training_step_make_up_its_gradients(make, checkpointing):
    specimen = make()
    model, batch = specimen.model.double().train(), specimen.batch(3)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    plain = step(copy.deepcopy(model), batch)
    seen = defaultdict(int)

    def add(name, grads):
        seen[name] = seen[name] + sum(grads.example(n) for n in range(grads.num_examples))

    with watch(model, linear_weights(model), add):
        grads = step(model, batch)
    assert all(torch.equal(grads[name], plain[name]) for name in plain)  # the step is what it was
    assert seen.keys() == set(linear_weights(model))
    for name, total in seen.items():
        torch.testing.assert_close(total, grads[name])
    assert not any(module._forward_hooks for name, module in model.named_modules() if "proj" in name)


def test_autocast_and_several_backward_passes():
    model, batches = zoo.llama().model.train(), [zoo.text_batch(2), zoo.text_batch(3, seed=1)]
    name = "model.layers.0.mlp.down_proj.weight"
    parts = []
    with watch(model, [name], lambda name, grads: parts.append(grads)):
        for batch in batches:  # gradients accumulate
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**batch).loss
            loss.backward()
    total = sum(part.example(n) for part in parts for n in range(part.num_examples))
    assert [part.num_examples for part in parts] == [2, 3]
    torch.testing.assert_close(total, model.get_parameter(name).grad, rtol=0.05, atol=1e-4)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight", "nowhere"])
def test_only_weights_of_linear_maps_have_factors(name):
    """A weight that an embedding shares with the head is none: the embedding's part would be missing."""
    model = zoo.llama(tie_word_embeddings=True).model
    watching = watch(model, [name], lambda *_: None)
    with pytest.raises(UnsupportedModuleError, match=f"'{name}'.* are not weights of linear maps alone"):
        watching.__enter__()
