"""What training still costs: which layers are back-propagated through, seen in a forward pass, and what requires it."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import nn

import fishkern as fk
from fishkern.optim import SkippedLayers, training_cost

transformers = pytest.importorskip("transformers")
LAYERS, BATCH = 3, {"input_ids": torch.arange(10).view(2, 5), "labels": torch.arange(10).view(2, 5)}


def llama(tied: bool = False) -> nn.Module:
    torch.manual_seed(0)
    sizes = dict(hidden_size=8, intermediate_size=12, num_attention_heads=2, num_key_value_heads=1, vocab_size=16)
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=LAYERS, tie_word_embeddings=tied)
    return transformers.LlamaForCausalLM(config).train()


def without(model: nn.Module, *parts: str) -> fk.Selection:
    """Everything but the parameters with one of these texts in their names."""
    shapes = {name: p.shape for name, p in model.named_parameters()}
    return fk.Selection(shapes, {}, whole=[name for name in shapes if not any(part in name for part in parts)])


LOWEST_TWO = ("embed_tokens", "layers.0.", "layers.1.")


def test_the_lowest_layers_are_skipped():
    """As autograd has it: no output of theirs requires a gradient, in training mode."""
    model = llama()
    optimizer = fk.MaskedAdamW(model, without(model))
    model(**BATCH).loss.backward()
    optimizer.step()
    before = training_cost(optimizer, model, BATCH)
    assert before.skipped["model.layers"][:2] == (0, LAYERS)
    assert "model.embed_tokens.weight" in before.skipped["model.layers"].held_by
    assert before.state_bytes >= 8 * before.total
    optimizer.reselect(without(model, *LOWEST_TWO), freeze=True)
    state = {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()}
    after = training_cost(optimizer, model, BATCH)
    assert (after.entries, after.total) == (optimizer.selection.count, before.total)
    assert after.state_bytes == optimizer.state_bytes < before.state_bytes
    assert after.frozen == tuple(n for n in state if any(part in n for part in LOWEST_TWO))
    assert after.skipped["model.layers"].count == 2
    assert all(name.startswith("model.layers.2.") for name in after.skipped["model.layers"].held_by)
    assert {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()} == state
    assert model.training
    outputs = model(**BATCH, output_hidden_states=True).hidden_states
    assert [one.requires_grad for one in outputs] == [False, False, False, True]


def test_a_trained_embedding_or_an_input_is_in_the_way():
    """A frozen layer above something that requires a gradient is back-propagated through; its name is said."""
    model = llama()
    optimizer = fk.MaskedAdamW(model, without(model))
    optimizer.reselect(without(model, "layers.0.", "layers.1."), freeze=True)
    assert training_cost(optimizer, model, BATCH).skipped == {
        "model.layers": SkippedLayers(0, LAYERS, ("model.embed_tokens.weight",))
    }
    optimizer.reselect(without(model, *LOWEST_TWO), freeze=True)
    model.enable_input_require_grads()
    assert training_cost(optimizer, model, BATCH).skipped["model.layers"] == SkippedLayers(0, LAYERS, ("an input",))
    model.disable_input_require_grads()
    optimizer.reselect(without(model, "layers", "embed"), freeze=True)
    assert training_cost(optimizer, model, BATCH).skipped["model.layers"] == SkippedLayers(LAYERS, LAYERS, ())


def test_a_tied_embedding_holds_all_layers():
    model = llama(tied=True)
    optimizer = fk.MaskedAdamW(model, without(model))
    optimizer.reselect(without(model, "layers"), freeze=True)
    held = training_cost(optimizer, model, BATCH).skipped["model.layers"]
    assert held == SkippedLayers(0, LAYERS, ("model.embed_tokens.weight",))


def test_model_and_batch_go_together():
    model = llama()
    with pytest.raises(ValueError, match="give both model and batch"):
        training_cost(fk.MaskedAdamW(model, without(model)), model)


@pytest.mark.parametrize("reentrant", [True, False])
def test_reentrant_checkpointing_without_an_input_that_requires_a_gradient_is_warned_of(reentrant, recwarn):
    """There what still trains would get no gradient; without reentrance it does."""
    model = llama()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.disable_input_require_grads()
    optimizer = fk.MaskedAdamW(model, without(model))
    model(**BATCH).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.reselect(without(model, "embed", "layers.0.mlp"), freeze=True)
    model(**BATCH).loss.backward()
    optimizer.step()
    said = [str(one.message) for one in recwarn if "Reentrant activation checkpointing gives none" in str(one.message)]
    assert len(said) == reentrant
    assert (model.model.layers[0].self_attn.q_proj.weight.grad is None) is reentrant
    if reentrant:
        assert "model.layers.0.self_attn.q_proj.weight" in said[0]
        optimizer.zero_grad()
        model.enable_input_require_grads()
        model(**BATCH).loss.backward()
        assert model.model.layers[0].self_attn.q_proj.weight.grad is not None


@pytest.fixture
def process_group():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel_would_wait(process_group):
    """Refused before anything is changed; with find_unused_parameters it does not wait, and training goes on."""
    model = llama()
    optimizer = fk.MaskedAdamW(model, without(model))
    narrow = without(model, "embed")
    several = mock.patch("fishkern.optim.data_parallel.several_processes", return_value=True)
    wrapped = nn.parallel.DistributedDataParallel(model)
    with several, pytest.raises(RuntimeError, match=r"\(model.embed_tokens.weight\).*find_unused_parameters=True"):
        optimizer.reselect(narrow, freeze=True)
    assert (optimizer.frozen, optimizer.selection) == ((), without(model))
    assert model.model.embed_tokens.weight.requires_grad
    del wrapped
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    with several:
        optimizer.reselect(narrow, freeze=True)
        for _ in range(2):
            wrapped(**BATCH).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        with pytest.raises(RuntimeError, match="exchanges no gradient of a parameter that was frozen when"):
            optimizer.reselect(without(model))
        model.model.embed_tokens.weight.requires_grad_(True)
        optimizer.reselect(without(model))
    assert optimizer.frozen == ()


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
def test_a_distributed_checkpoint_keeps_what_is_frozen(flat):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    options = StateDictOptions(flatten_optimizer_state_dict=flat, strict=False)
    model, again = llama(), llama()
    optimizer = fk.MaskedAdamW(model, without(model))
    optimizer.reselect(without(model, *LOWEST_TWO), freeze=True)
    model(**BATCH).loss.backward()
    optimizer.step()
    weights, state = get_state_dict(model, optimizer, options=options)
    resumed = fk.MaskedAdamW(again, optimizer.selection)
    set_state_dict(again, resumed, model_state_dict=weights, optim_state_dict=state, options=options)
    assert resumed.frozen == optimizer.frozen
    assert not again.model.embed_tokens.weight.requires_grad
