"""Layers of real architectures: each is found once, numbered as it runs, and owns the parameters inside it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from fishkern import hosts
from fishkern.hosts import Layer
from tests.support.layered import FAMILIES

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from transformers.modeling_layers import GradientCheckpointingLayer  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

pytestmark = pytest.mark.matrix

# transformers marks these, too, as layers that checkpoint themselves: a stage of layers, and convolutions
NOT_LAYERS = {"SwinStage", "Wav2Vec2GroupNormConvLayer", "Wav2Vec2NoLayerNormConvLayer"}


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


def test_the_layers_are_those_that_transformers_marks(family):
    model = family.model()
    marked = [
        module
        for module in model.modules()
        if isinstance(module, GradientCheckpointingLayer) and type(module).__name__ not in NOT_LAYERS
    ]
    stacks = hosts.stacks(model)
    assert {path: len(layers) for path, layers in stacks.items()} == family.stacks
    assert [layer for layers in stacks.values() for layer in layers] == marked


def test_numbers_are_in_the_order_of_the_forward_pass(family):
    model = family.model()
    calls: dict[str, list[int]] = {path: [] for path in family.stacks}
    for path, layers in hosts.stacks(model).items():
        for number, layer in enumerate(layers):
            layer.register_forward_pre_hook(lambda module, args, p=path, n=number: calls[p].append(n))
    with torch.no_grad():
        model(**family.inputs())
    assert calls == {path: list(range(count)) for path, count in family.stacks.items()}


def test_a_layer_owns_the_parameters_inside_it_and_no_others(family):
    model = family.model()
    owners = {
        parameter: Layer(path, number, len(layers))
        for path, layers in hosts.stacks(model).items()
        for number, layer in enumerate(layers)
        for parameter in layer.parameters()
    }
    named = hosts.named_parameters(model, remove_duplicate=False)
    assert hosts.layer_of(model) == {name: owners.get(parameter) for name, parameter in named.items()}
    assert all(model.get_submodule(layer.path) for layer in owners.values())


def test_names_alone_tell_the_same(family):
    layers = hosts.layer_of(family.model())
    assert hosts.layer_of(list(layers)) == layers
    for name, layer in layers.items():
        if "downsample" not in name:  # Swin's is in no layer because its list holds stages, which other names show
            (alone,) = hosts.layer_of([name]).values()
            assert (alone and (alone.stack, alone.number)) == (layer and (layer.stack, layer.number)), name


def test_adapters_of_peft_change_no_number(family):
    model = family.model()
    before = hosts.layer_of(model)
    linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    refused = [path for path in linear if path.endswith(("lm_head", "mixer.out_proj"))]  # PEFT warns of one: it is tied
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=linear, exclude_modules=refused))
    after = hosts.layer_of(wrapped)
    assert any("lora_A" in name for name in after)
    for name, layer in after.items():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        own = before[f"{plain.split('.lora_')[0]}.weight" if ".lora_" in plain else plain]
        assert layer == (own and Layer(f"base_model.model.{own.stack}", own.number, own.count)), name


def test_wrappers_of_torch_change_no_name():
    model = FAMILIES["llama"].model()
    before = hosts.layer_of(model)
    for number in range(3):
        model.model.layers[number] = checkpoint_wrapper(model.model.layers[number])
    for wrapped in (model, torch.compile(model), torch.optim.swa_utils.AveragedModel(copy.deepcopy(model))):
        assert hosts.layer_of(wrapped) == before
        assert {path: len(layers) for path, layers in hosts.stacks(wrapped).items()} == {"model.layers": 3}


@pytest.mark.parametrize(
    "name, roles",
    [
        ("t5", ["encoder", "decoder"]),
        ("clip", ["text", "vision"]),
        ("opt", ["decoder"]),
        ("bert", ["encoder"]),
        ("llama", [None]),
        ("vit", [None]),
    ],
)
def test_roles(name, roles):
    assert [Layer(path, 0, 1).role for path in hosts.stacks(FAMILIES[name].model())] == roles


@pytest.mark.parametrize(
    "name, layer",
    [
        ("model.layers.3.mlp.experts.7.w1.weight", ("model.layers", 3)),
        ("decoder.block.1.layer.2.DenseReluDense.wi.weight", ("decoder.block", 1)),
        ("backbone.layers.2.blocks.1.mlp.fc1.weight", ("backbone.layers.2.blocks", 1)),
        ("visual.transformer.resblocks.11.attn.in_proj_weight", ("visual.transformer.resblocks", 11)),
        ("model.layers.3", ("model.layers", 3)),
        ("layers.0.weight", ("layers", 0)),
        ("classifier.layers.0.weight", None),
        ("feature_extractor.conv_layers.0.conv.weight", None),
        ("0.weight", None),
        ("h.weight", None),
        ("layers", None),
    ],
)
def test_of_one_name(name, layer):
    (alone,) = hosts.layer_of([name]).values()
    assert (alone and (alone.stack, alone.number)) == layer


def test_without_the_model_the_highest_number_counts():
    layers = hosts.layer_of(["model.layers.4.mlp.weight", "model.layers.9.mlp.weight", "model.norm.weight"])
    assert list(layers.values()) == [Layer("model.layers", 4, 10), Layer("model.layers", 9, 10), None]


def test_a_shared_parameter_is_in_each_layer_that_names_it():
    model = FAMILIES["llama"].model()
    model.model.layers[2].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    layers = hosts.layer_of(model)
    assert [layers[f"model.layers.{n}.mlp.up_proj.weight"].number for n in (0, 2)] == [0, 2]


def test_a_layer_that_runs_several_times():
    """As in a universal transformer: the list holds one module three times, and each has names of its own."""
    model = FAMILIES["llama"].model()
    model.model.layers = nn.ModuleList([model.model.layers[0]] * 3)
    assert hosts.stacks(model) == {"model.layers": [model.model.layers[0]] * 3}
    name = "model.layers.{}.mlp.up_proj.weight"
    layers = hosts.layer_of(model)
    assert [layers[name.format(n)] for n in range(3)] == [Layer("model.layers", n, 3) for n in range(3)]


def test_a_layer_without_parameters_counts():
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2), nn.Identity()])})
    assert hosts.layer_of(model)["layers.0.weight"] == Layer("layers", 0, 2)
    assert len(hosts.stacks(model)["layers"]) == 2


def test_a_model_without_layers():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    assert hosts.layer_of(model) == dict.fromkeys(["0.weight", "0.bias", "1.weight", "1.bias"])
    assert hosts.stacks(model) == {}
    with pytest.raises(ValueError, match="Sequential has no list of layers: none of its parameters is in"):
        hosts.stack_of(model)


def test_the_stack_that_is_demanded():
    path, layers = hosts.stack_of(FAMILIES["gpt2"].model())
    assert (path, len(layers)) == ("transformer.h", 3)
    model = FAMILIES["t5"].model()
    with pytest.raises(ValueError, match=r"several lists of layers, encoder.block, decoder.block: choose one with"):
        hosts.stack_of(model)
    assert hosts.stack_of(model, "decoder.block") == ("decoder.block", list(model.decoder.block))
    with pytest.raises(ValueError, match=r"no list of layers 'decoder'; it has encoder.block, decoder.block"):
        hosts.stack_of(model, "decoder")
