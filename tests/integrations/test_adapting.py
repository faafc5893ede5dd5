"""Adapters by name: each trains itself and the head, keeps the model's answers, and says where it cannot go."""

from __future__ import annotations

import pytest
import torch

from tests.support import zoo

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from fishkern import hosts  # noqa: E402
from fishkern.integrations.adapting import ADAPTERS, adapt, check  # noqa: E402


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_trains_itself_and_the_head(kind):
    specimen = zoo.bert_classifier()
    frozen = {parameter: parameter.detach().clone() for parameter in specimen.model.parameters()}
    model, recipe = adapt(specimen.model, kind, task="sequence-classification", seed=1)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    heads = [name for name in trained if hosts.is_head(name)]
    assert heads
    assert len(heads) < len(trained)
    assert (recipe is None) == hasattr(model, "peft_config")
    if kind not in ("lora", "dora"):  # PiSSA takes its part out of the weights
        assert all(torch.equal(parameter, before) for parameter, before in frozen.items())


def test_the_head_of_an_image_classifier_is_trained():
    """PEFT has no type for this task."""
    model, _ = adapt(zoo.vit().model, "lora", task="image-classification")
    assert any(hosts.is_head(name) for name, parameter in model.named_parameters() if parameter.requires_grad)


@pytest.mark.parametrize("kind", ["bottleneck", "prefix", "unipelt"])
def test_the_seed_decides(kind):
    """And not the state of the process."""

    def values(seed: int, state: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        specimen = zoo.bert_classifier()
        torch.manual_seed(state)
        model, _ = adapt(specimen.model, kind, task="sequence-classification", seed=seed)
        return {name: parameter.detach() for name, parameter in model.named_parameters()}

    one, again, other = values(1, state=1), values(1, state=2), values(2, state=1)
    assert all(torch.equal(value, again[name]) for name, value in one.items())
    assert not all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize(
    ("kind", "layers", "message"),
    [
        ("lora", [0], "PEFT cannot choose layers in a vit model"),
        ("dora", [0], "PEFT cannot choose layers in a vit model"),
        ("ia3", None, r"PEFT does not know where \(IA\)\^3 goes in a vit model"),
        ("ia3", [0], "ia3 adapts all layers"),
    ],
)
def test_where_peft_cannot_go_is_refused(kind, layers, message):
    with pytest.raises(ValueError, match=message):
        adapt(zoo.vit().model, kind, task="image-classification", layers=layers)


def test_what_there_is_not_is_refused():
    with pytest.raises(
        ValueError, match="--adapter is one of lora, dora, ia3, bottleneck, prefix, unipelt, got 'lore'"
    ):
        check("lore", None)
    for kind in ("ia3", "unipelt"):
        with pytest.raises(ValueError, match=f"{kind} has no size"):
            check(kind, 4)
