"""A model that fishkern has looked at trains to the same bits as one that it never saw."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import fishkern as fk
from tests.support import zoo
from tests.support.exactness import as_dtype

pytest.importorskip("transformers")

pytestmark = pytest.mark.matrix

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def llama_with_lora() -> zoo.Specimen:
    peft = pytest.importorskip("peft")
    specimen = zoo.llama(attention_dropout=0.1)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.1, init_lora_weights="pissa")
    return zoo.Specimen(peft.get_peft_model(specimen.model, config), specimen.batch, specimen.loss)


def checkpointed(reentrant: bool) -> zoo.Specimen:
    specimen = zoo.llama()
    specimen.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return specimen


class Images(nn.Module):
    """All that moves in training: batch norm, spectral norm, dropout, activations in place, a shared module."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Conv2d(6, 6, 3, padding=1, groups=3)
        self.body = nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), shared, nn.GroupNorm(2, 6),
            nn.SiLU(inplace=True), shared, nn.Dropout(0.2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 3))
        self.norm = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))

    def forward(self, pixel_values):
        return self.norm(self.head(self.body(pixel_values)))


def images() -> zoo.Specimen:
    def loss(model, batch):
        return torch.nn.functional.cross_entropy(model(batch["pixel_values"]), batch["labels"])

    return zoo.Specimen(Images(), zoo.image_batch, loss)


KINDS: dict[str, Callable[[], zoo.Specimen]] = {
    **zoo.FAMILIES,
    "lora": llama_with_lora,
    "checkpointed": lambda: checkpointed(False),
    "reentrant": lambda: checkpointed(True),
    "images": images,
}


def losses(model, batch):
    logits = model(batch["pixel_values"])
    return torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none")


def looked_at(model: nn.Module, batch: dict, by: str) -> None:
    own = {"likelihood": losses} if isinstance(model, Images) else {}
    if by == "estimate":
        fk.estimate(model, [batch], **own)
    elif by == "verify":
        fk.verify(model, [batch], **own)
    else:
        pool = "adapter" if hasattr(model, "peft_config") else "model"
        fk.fish_tuning(model, [batch], density=0.1, pool=pool, **own)


def hooks_of(model: nn.Module) -> list:
    return [list(getattr(module, kind).values()) for module in model.modules() for kind in HOOKS]


def after_a_step(specimen: zoo.Specimen, batch: dict) -> dict[str, torch.Tensor]:
    """One step of ordinary training, dropout drawn; parameters, gradients, buffers, and the state of the generator."""
    model = specimen.model
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    specimen.loss(model, {name: value[:1].repeat_interleave(2, 0) for name, value in batch.items()}).backward()
    optimizer.step()
    found = {f"parameter {name}": value.detach() for name, value in model.named_parameters()}
    found |= {f"grad {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    found |= {f"buffer {name}": value for name, value in model.named_buffers()}
    return found | {"random": torch.get_rng_state()}


@pytest.mark.filterwarnings("ignore:.*slow exact path")
@pytest.mark.parametrize("by", ["estimate", "verify", "fish_tuning"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_training_step_afterwards(kind, by):
    torch.manual_seed(0)
    specimen = KINDS[kind]()
    specimen.model.train()
    calls: list[int] = []
    module = next(module for module in specimen.model.modules() if isinstance(module, nn.Linear))
    module.register_forward_hook(lambda module, args, output: calls.append(len(output)))
    twin = zoo.Specimen(copy.deepcopy(specimen.model), specimen.batch, specimen.loss)
    batch = as_dtype(specimen.batch(3, 6), torch.float32)
    found = [id(parameter) for parameter in specimen.model.parameters()]
    hooks = hooks_of(specimen.model)
    torch.manual_seed(7)
    looked_at(specimen.model, batch, by)
    assert [id(parameter) for parameter in specimen.model.parameters()] == found
    assert hooks_of(specimen.model) == hooks
    assert all(parameter.grad is None for parameter in specimen.model.parameters())
    ours = after_a_step(specimen, batch)
    torch.manual_seed(7)
    plain = after_a_step(twin, batch)
    assert ours.keys() == plain.keys()
    assert [name for name in plain if not torch.equal(ours[name], plain[name])] == []
