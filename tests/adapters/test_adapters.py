"""Bottleneck, prefix and UniPELT: their sizes, training them alone, removing them, and their exact Fisher."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from fishkern import adapters, hosts
from fishkern.adapters import BottleneckAdapter, PrefixAdapter, UniPELTAdapter
from tests.support import zoo
from tests.support.exactness import assert_exact, paths
from tests.support.layered import FAMILIES
from tests.support.oracle import next_token, one_class

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

SMALL = {
    "bottleneck": BottleneckAdapter(width=3, layers=(0, 1)),
    "prefix": PrefixAdapter(length=4, layers=(1,)),
    "unipelt": UniPELTAdapter(rank=2, length=2, width=3),
}


def bert(attention: str = "sdpa", **settings) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        **{
            "vocab_size": 50,
            "hidden_size": 16,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "max_position_embeddings": 32,
            "num_labels": 3,
            "attn_implementation": attention,
            **settings,
        }
    )
    return transformers.BertForSequenceClassification(config).eval()


def llama(attention: str = "sdpa") -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation=attention,
    )
    return transformers.LlamaForCausalLM(config).eval()


def batch(N: int = 4, T: int = 7) -> dict:
    ids = torch.randint(3, 50, (N, T))
    mask = torch.ones_like(ids)
    for n in range(N):
        mask[n, T - n % 3 :] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask, "labels": torch.arange(N) % 3}


def text(N: int = 4, T: int = 7) -> dict:
    inputs = batch(N, T)
    return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


def logits(model: nn.Module, batch: dict) -> torch.Tensor:
    with torch.no_grad():
        return model(**{key: value for key, value in batch.items() if key != "labels"}).logits


def output(model: nn.Module, inputs: dict) -> torch.Tensor:
    """The first tensor that a model of whatever task returns: logits or hidden states."""
    with torch.no_grad():
        return next(leaf for leaf in tree_leaves(dict(model(**inputs))) if isinstance(leaf, torch.Tensor))


@pytest.mark.parametrize(
    "adapter, each_layer",
    [
        (BottleneckAdapter(width=48), 149_088),
        (PrefixAdapter(length=30), 46_080),
        (UniPELTAdapter(), 21_515),
    ],
)
def test_counts_on_bert_base(adapter, each_layer):
    """The numbers of entries in the percentages that FISH-Tuning prints, on 1 to 4 layers."""
    with torch.device("meta"):
        config = transformers.BertConfig(vocab_size=28_996)
        model = transformers.BertForSequenceClassification(config)
    assert sum(p.numel() for name, p in model.named_parameters() if "classifier" not in name) == 108_310_272
    model.bert.encoder.layer = model.bert.encoder.layer.to_empty(device="cpu")
    names = adapters.attach(model, type(adapter)(**{**vars(adapter), "layers": (0, 3)}))
    named = dict(model.named_parameters())
    assert sum(named[name].numel() for name in names) == 2 * each_layer
    trained = {name for name, parameter in named.items() if parameter.requires_grad}
    assert trained == {*names, "classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("make", [bert, llama])
def test_detaching_gives_the_model_back(make, kind):
    model, data = make(), batch()
    before, outputs = copy.deepcopy(model.state_dict()), logits(model, data)
    names = adapters.attach(model, SMALL[kind])
    assert not torch.equal(logits(model, data), outputs)
    assert names == adapters.adapter_parameters(model)
    adapters.detach(model)
    assert adapters.adapter_parameters(model) == []
    assert torch.equal(logits(model, data), outputs)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("kind", SMALL)
def test_the_fisher_of_an_adapter_is_exact(kind):
    """And served by the rules of layers, all of it: every part of an adapter is a module that has one."""
    model = bert()
    adapters.attach(model, SMALL[kind])
    specimen = zoo.Specimen(model, batch, one_class)
    statistics = assert_exact(specimen, [batch(3), batch(1), batch(5)])
    assert paths(statistics).keys() - {"left out"} == {"fused"}
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == set(statistics)
    assert all(bool(statistics[name].any()) for name in statistics)  # FISH-Tuning ranks them all


@pytest.mark.parametrize("kind", SMALL)
def test_the_fisher_in_a_causal_model_is_exact(kind):
    model = llama()
    adapters.attach(model, SMALL[kind])
    assert_exact(zoo.Specimen(model, text, next_token), [text(3), text(2)])


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma3", "mixtral"])
def test_a_prefix_is_that_of_peft(family):
    model, data = FAMILIES[family].model(), text()
    data["input_ids"] %= model.config.vocab_size
    wrapped = peft.get_peft_model(
        copy.deepcopy(model), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    ).eval()
    adapters.attach(model, PrefixAdapter(length=4))
    table = wrapped.prompt_encoder["default"].embedding.weight.detach()  # [length, layers x (keys, values)]
    size = model.model.layers[0].self_attn.base_layer.k_proj.out_features
    for number, layer in enumerate(model.model.layers):
        rows = table[:, 2 * number * size :][:, : 2 * size]
        layer.self_attn.prefix.weight.data.copy_(rows)
    # PEFT counts the prefix among the positions; so that rotary embeddings agree, the text is told where it stands
    positions = torch.arange(4, 4 + data["input_ids"].shape[1]).expand_as(data["input_ids"])
    ours = logits(model, {**data, "position_ids": positions})
    attended = data["attention_mask"].bool()
    torch.testing.assert_close(ours[attended], logits(wrapped, data)[attended])


@pytest.mark.parametrize("kind", ["prefix", "unipelt"])
@pytest.mark.parametrize("make", [bert, llama])
@pytest.mark.parametrize("padded", [True, False])
def test_attention_implementations_agree(make, kind, padded):
    data = batch()
    if not padded:
        data = {"input_ids": data["input_ids"]}
    outputs = []
    for implementation in ("sdpa", "eager"):
        model = make(implementation)
        adapters.attach(model, SMALL[kind])
        attended = data.get("attention_mask", torch.ones_like(data["input_ids"])).bool()
        outputs.append(logits(model, data) if make is bert else logits(model, data)[attended])
    torch.testing.assert_close(*outputs)


def test_a_prefix_leaves_a_causal_model_causal():
    model = llama()
    adapters.attach(model, PrefixAdapter(length=4))
    ids = torch.randint(3, 50, (2, 7))
    changed = ids.clone()
    changed[:, 5] = 1
    one, other = logits(model, {"input_ids": ids}), logits(model, {"input_ids": changed})
    torch.testing.assert_close(one[:, :5], other[:, :5])
    assert not torch.allclose(one[:, 5:], other[:, 5:])


def test_generation_with_a_cache_is_that_without():
    model = llama()
    adapters.attach(model, PrefixAdapter(length=4))
    ids = torch.randint(3, 50, (2, 5))
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(ids, use_cache=True, **options), model.generate(ids, use_cache=False, **options))


@pytest.mark.parametrize("kind", SMALL)
def test_only_the_adapter_and_the_head_train_and_checkpointing_works(kind):
    model, data = bert(), batch()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    names = adapters.attach(model, SMALL[kind])
    model.gradient_checkpointing_enable()
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0, weight_decay=0.1)
    model(**data).loss.backward()
    optimizer.step()
    adapters.detach(model)
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {"classifier.weight", "classifier.bias"}
    assert names


@pytest.mark.parametrize("kind", SMALL)
def test_saved_and_loaded(kind, tmp_path):
    model, data = bert(), batch()
    adapters.attach(model, SMALL[kind], seed=3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1
    path = adapters.save(model, SMALL[kind], tmp_path / "adapter.safetensors")
    other = bert()
    assert adapters.load(other, path) == SMALL[kind]
    assert torch.equal(logits(other, data), logits(model, data))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == [name for name, parameter in other.named_parameters() if parameter.requires_grad]


def test_the_seed_is_the_adapters_own():
    models = [bert(), bert(), bert()]
    state = torch.get_rng_state()
    for model, seed in zip(models, (1, 1, 2), strict=True):
        adapters.attach(model, SMALL["bottleneck"], seed=seed)
    assert torch.equal(torch.get_rng_state(), state)
    one, same, other = (model.bert.encoder.layer[0].output.dense.down.weight for model in models)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_refusals(tmp_path):
    model = bert()
    with pytest.raises(ValueError, match=r"has the layers 0 to 2, and the adapter names \[3\]"):
        adapters.attach(model, BottleneckAdapter(layers=(0, 3)))
    with pytest.raises(ValueError, match="no adapter to save"):
        adapters.save(model, BottleneckAdapter(), tmp_path / "a")
    adapters.attach(model, SMALL["prefix"])
    with pytest.raises(ValueError, match="already has an adapter"):
        adapters.attach(model, SMALL["prefix"])
    path = adapters.save(model, SMALL["prefix"], tmp_path / "a")
    other = bert(num_labels=5)
    other.bert.embeddings.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in other.named_parameters()}
    with pytest.raises(ValueError, match=r"holds classifier.weight \(3, 16\), and BertFor.* has it as \(5, 16\)"):
        adapters.load(other, path)
    assert before == {name: parameter.requires_grad for name, parameter in other.named_parameters()}
    with pytest.raises(ValueError, match="no attention and feed-forward part in MambaBlock, a layer of Mamba"):
        adapters.attach(FAMILIES["mamba"].model(), BottleneckAdapter())
    with pytest.raises(ValueError, match="has no list of layers"):
        adapters.attach(nn.Linear(2, 2), BottleneckAdapter())


@pytest.mark.parametrize("family", ["vit", "gpt2", "opt", "bert", "llama"])
def test_the_fisher_of_bottlenecks_is_exact_in_other_families(family):
    specimen = zoo.FAMILIES[family]()
    names = adapters.attach(specimen.model, SMALL["bottleneck"], train=())
    statistics = assert_exact(specimen, [specimen.batch(3, 7), specimen.batch(2, 6, seed=5)])
    assert list(statistics) == names
    assert paths(statistics).keys() - {"left out"} == {"fused"}
    assert all(bool(statistics[name].any()) for name in names)


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {"mamba", "mixtral", "t5", "t5-gated"}))
def test_bottlenecks_go_into_every_family_and_come_out_again(name):
    family = FAMILIES[name]
    model, inputs = family.model().requires_grad_(False), family.inputs()  # SigLIP's pooler rounds by requires_grad
    state, before = list(model.state_dict()), output(model, inputs)
    for stack in hosts.stacks(model):
        names = adapters.attach(model, SMALL["bottleneck"], stack=stack)
        assert {layer.number for layer in map(hosts.layer_of(model).get, names)} == {0, 1}
        assert len(names) == 2 * 2 * 4  # layers, bottlenecks, weights and biases
        assert not torch.equal(output(model, inputs), before)
        adapters.detach(model)
        assert list(model.state_dict()) == state
        assert torch.equal(output(model, inputs), before)


@pytest.mark.parametrize("name", ["mixtral", "t5", "t5-gated"])
def test_a_feed_forward_part_without_an_end_for_a_bottleneck_is_refused(name):
    model = FAMILIES[name].model()
    for stack in hosts.stacks(model):
        with pytest.raises(ValueError, match="and (Mixtral|T5).* has none that can be wrapped: use a PrefixAdapter"):
            adapters.attach(model, SMALL["bottleneck"], stack=stack)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["prefix", "unipelt"])
@pytest.mark.parametrize("name", ["vit", "dinov2", "gpt2", "opt", "bart", "t5"])
def test_a_prefix_is_refused_where_nobody_has_compared_it(name, kind):
    model = FAMILIES[name].model()
    for stack in hosts.stacks(model):
        with pytest.raises(ValueError, match=r"Attention (does not take|.*is not built like the attention of BERT)"):
            adapters.attach(model, SMALL[kind], stack=stack)


def test_one_of_several_stacks(tmp_path):
    family = FAMILIES["clip"]
    model, inputs = family.model(), family.inputs()
    with pytest.raises(ValueError, match=r"text_model.encoder.layers, vision_model.encoder.layers: choose one with"):
        adapters.attach(model, SMALL["bottleneck"])
    names = adapters.attach(model, SMALL["bottleneck"], stack="vision_model.encoder.layers", seed=3)
    assert {hosts.layer_of(model)[name].stack for name in names} == {"vision_model.encoder.layers"}
    path = adapters.save(model, SMALL["bottleneck"], tmp_path / "adapter.safetensors")
    other = family.model()
    adapters.load(other, path)
    assert torch.equal(output(other, inputs), output(model, inputs))


@pytest.mark.parametrize("kind", ["prefix", "unipelt"])
@pytest.mark.parametrize("family", ["Esm", "ConvBert", "LayoutLM", "Nystromformer"])
def test_a_prefix_that_attention_would_not_see_is_refused(family, kind):
    """Layers like BERT's, around attention that takes no cache; ESM's would swallow it without a word."""
    sizes = dict(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    config = getattr(transformers, f"{family}Config")(**sizes, pad_token_id=0)
    model = getattr(transformers, f"{family}ForSequenceClassification")(config)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match=rf"{family}SelfAttention does not take: use a BottleneckAdapter"):
        adapters.attach(model, SMALL[kind])
    assert before == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    adapters.attach(model, SMALL["bottleneck"])
