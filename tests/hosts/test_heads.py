"""The head of a language model, and what the config says of its output."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fishkern import hosts
from tests.support import zoo

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize(
    ("make", "path"),
    [
        (zoo.llama, "lm_head"),
        (zoo.gpt2, "lm_head"),
        (zoo.bert, "cls.predictions.decoder"),
        (zoo.modernbert, "decoder"),
    ],
    ids=["llama", "gpt2", "bert", "modernbert"],
)
def test_it_is_found(make, path):
    model = make().model
    head = hosts.head_of(model)
    assert head.module is model.get_submodule(path)
    assert (head.bound, head.divisor, head.factor) == (None, None, None)
    assert not head.operations


def test_inside_peft_it_is_the_module_that_is_called():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(zoo.llama().model, peft.LoraConfig(r=2, target_modules=["lm_head"]))
    assert hosts.head_of(model).module is model.base_model.model.lm_head
    assert hasattr(hosts.head_of(model).module, "lora_A")


def test_a_module_of_ones_own():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.lm_head = nn.Linear(3, 5)

    model = Own()
    assert hosts.head_of(model).module is model.lm_head
    assert hosts.head_of(nn.Linear(3, 5)) is None
    model.lm_head = None
    assert hosts.head_of(model) is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("final_logit_softcapping", lambda z: 3 * torch.tanh(z / 3)),
        ("logits_soft_cap", lambda z: 3 * torch.tanh(z / 3)),
        ("logits_scaling", lambda z: z / 3),
        ("logit_scale", lambda z: z * 3),
        ("lm_head_multiplier", lambda z: z * 3),
    ],
)
def test_what_the_config_says(name, expected):
    model = zoo.llama().model
    setattr(model.config, name, 3.0)
    z = torch.linspace(-5, 5, 11, dtype=torch.float64)
    head = hosts.head_of(model)
    torch.testing.assert_close(head.then(z), expected(z))
    shown = head.then(z.clone().requires_grad_()).grad_fn
    while shown.next_functions and shown.next_functions[0][0] is not None and "Accumulate" not in type(shown).__name__:
        assert type(shown).__name__ in head.operations
        shown = shown.next_functions[0][0]
