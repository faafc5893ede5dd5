"""Training what FISH-Tuning selects: nothing else moves, in any family; what is saved is the model that was trained."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fishkern as fk
from fishkern import adapters
from tests.methods.test_fish_tuning import batches, classifier, lora

peft = pytest.importorskip("peft")


def attached(adapter: adapters.Adapter) -> nn.Module:
    model = classifier()
    adapters.attach(model, adapter)
    return model


FAMILIES = {
    "LoRA": lambda: lora(classifier()),
    "DoRA": lambda: lora(classifier(), use_dora=True),
    "(IA)^3": lambda: peft.get_peft_model(
        classifier(),
        peft.IA3Config(
            target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"], task_type="SEQ_CLS"
        ),
    ),
    "PEFT's prefix": lambda: peft.get_peft_model(
        classifier(), peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS")
    ),
    "bottleneck": lambda: attached(adapters.BottleneckAdapter(width=2)),
    "prefix": lambda: attached(adapters.PrefixAdapter(length=3, layers=(0, 2))),
    "UniPELT": lambda: attached(adapters.UniPELTAdapter(width=2)),
}


def train(model: nn.Module, selection: fk.Selection, steps: int = 4) -> None:
    optimizer = fk.MaskedAdamW(model, selection, lr=1e-2, weight_decay=0.1)
    model.train()
    for batch in batches(steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def logits(model: nn.Module) -> torch.Tensor:
    batch = {key: value for key, value in batches(1)[0].items() if key != "labels"}
    with torch.no_grad():
        return model.eval()(**batch).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_only_what_is_selected_moves(family):
    model = FAMILIES[family]()
    selection = fk.fish_tuning(model, batches(), density=0.3)
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    train(model, selection)
    for name, value in model.named_parameters():
        moved = value != start[name]
        allowed = selection.mask(name) if name in selection else torch.zeros_like(moved)
        assert not (moved & ~allowed).any(), name
        # nearly all: a few gradients are zero
        assert moved.sum() >= 0.9 * allowed.sum(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["LoRA", "DoRA", "(IA)^3", "PEFT's prefix"])
def test_plain_peft_loads_what_was_saved(family, dtype, tmp_path):
    """The head comes along; PiSSA takes the residual out of the base a second time."""
    model = FAMILIES[family]()
    base = copy.deepcopy(classifier()).to(dtype)
    if dtype is torch.bfloat16:
        config = model.peft_config["default"]
        torch.manual_seed(0)
        model = peft.get_peft_model(copy.deepcopy(base), config)
    train(model, fk.fish_tuning(model, batches(), density=0.3))
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    tolerance = dict(rtol=1e-4, atol=1e-5) if dtype is torch.float32 else dict(rtol=5e-2, atol=5e-2)
    torch.testing.assert_close(logits(loaded), logits(model), **tolerance)
