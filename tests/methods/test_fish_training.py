"""Training the selection of FISH-Tuning: nothing else moves, in any family, and the trained model is saved."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fishkern as fk
from fishkern import adapters
from tests.methods.test_fish_tuning import batches, classifier, lora

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.matrix


def attached(adapter: adapters.Adapter) -> nn.Module:
    model = classifier()
    adapters.attach(model, adapter)
    return model


def away_from_zero(model: nn.Module) -> nn.Module:
    """Where a fresh adapter does nothing, half of it or more has no Fisher information."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "classifier" not in name:
            nn.init.normal_(parameter, std=0.1)
    return model


OURS = {
    "bottleneck": adapters.BottleneckAdapter(width=2),
    "prefix": adapters.PrefixAdapter(length=3, layers=(0, 2)),
    "UniPELT": adapters.UniPELTAdapter(width=2),
}
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
    "VeRA": lambda: away_from_zero(
        peft.get_peft_model(classifier(), peft.VeraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS"))
    ),
    "OFT": lambda: away_from_zero(
        peft.get_peft_model(
            classifier(), peft.OFTConfig(oft_block_size=4, r=0, target_modules=["query"], task_type="SEQ_CLS")
        )
    ),
    "LoHa": lambda: away_from_zero(
        peft.get_peft_model(classifier(), peft.LoHaConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    ),
    **{name: lambda adapter=adapter: attached(adapter) for name, adapter in OURS.items()},
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
@pytest.mark.filterwarnings("ignore:.*slow exact path")
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


@pytest.mark.parametrize("family", OURS)
def test_our_own_files_hold_what_was_trained(family, tmp_path):
    model = attached(OURS[family])
    train(model, fk.fish_tuning(model, batches(), density=0.3))
    path = adapters.save(model, OURS[family], tmp_path / "adapter.safetensors")
    loaded = classifier()
    assert adapters.load(loaded, path) == OURS[family]
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("family", ["LoRA", "DoRA", "bottleneck", "prefix"])
def test_a_base_in_bfloat16_stays_as_it_is(family):
    """PEFT keeps its adapters in float32; ours have the dtype of the base, and master weights."""
    base = classifier().to(torch.bfloat16)
    if family in OURS:
        adapters.attach(base, OURS[family])
        model = base
    else:
        model = lora(base, use_dora=family == "DoRA")
    selection = fk.fish_tuning(model, batches(), density=0.3)
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    train(model, selection)
    moved = {name: value != start[name] for name, value in model.named_parameters()}
    for name, where in moved.items():
        assert not (where & ~selection.mask(name) if name in selection else where).any(), name
    # a step below half the spacing of bfloat16 moves the master weight alone
    assert sum(int(where.sum()) for where in moved.values()) > 0.8 * selection.count
