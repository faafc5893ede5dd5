"""Layers do what the formula says, whatever the model: which tokens stay, in which order, what the rest becomes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fishkern import tokens
from fishkern.tokens import TokenReduction
from fishkern.tokens import layer as room
from fishkern.tokens.reduce import class_attention, kept_count, reduce_tokens, split_tokens
from tests.tokens.reference import SPECIAL, SUPPORTED, classifier, layers, made, worst_layer

pytest.importorskip("transformers")

EXACT = 1e-11


@pytest.mark.parametrize("place", ["before_mlp", "after_layer"])
@pytest.mark.parametrize("name", SUPPORTED)
def test_a_layer_is_the_formula(name, place):
    """The second of two layers gets the merged token of the first, and treats it as any image token."""
    assert worst_layer(name, TokenReduction([0, 1], 0.6, place=place)) < EXACT
    assert worst_layer(name, TokenReduction([1], 0.3, merge=False, place=place)) < EXACT


def test_a_layer_is_the_formula_under_eager_attention():
    """Which has its softmax in float32, where that of SDPA is in float64."""
    assert worst_layer("deit", TokenReduction([0, 2], 0.5), attn_implementation="eager") < 1e-6


@pytest.mark.parametrize("name", ["vit", "dinov2-registers", "clip-vision"])
def test_sdpa_and_eager_attention_agree(name):
    """No implementation is asked for its attention map. Eager attention has its softmax in float32."""
    outputs = []
    for implementation in ("sdpa", "eager"):
        model, inputs = made(name, attn_implementation=implementation)
        assert model.config._attn_implementation == implementation
        outputs.append(tokens.attach(model, TokenReduction([0, 2], 0.5))(**inputs)[0])
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)


def least(attention: Tensor, special: int, count: int) -> room.Split:
    split = split_tokens(-attention, special, count)
    return split._replace(weights=-split.weights)


def unordered(attention: Tensor, special: int, count: int) -> room.Split:
    split = split_tokens(attention, special, count)
    return split._replace(kept=split.kept.flip(1))


def uniform(attention: Tensor, special: int, count: int) -> room.Split:
    split = split_tokens(attention, special, count)
    return split._replace(weights=torch.ones_like(split.weights))


def unprotected(attention: Tensor, special: int, count: int) -> room.Split:
    return split_tokens(attention, special - 1, count)


def first_head(hidden: Tensor, q_proj: nn.Module, k_proj: nn.Module, head_dim: int, scaling: float) -> Tensor:
    query, keys = q_proj(hidden[:, 0, None])[..., :head_dim], k_proj(hidden)[..., :head_dim]
    return (query @ keys.mT * scaling).softmax(-1)[:, 0].detach()


def with_gradient(*args) -> Tensor:
    return class_attention(*args) * args[0].mean(-1).exp()


PLANTED = {
    "the least attended stay": ("split_tokens", least),
    "the order is lost": ("split_tokens", unordered),
    "a plain mean": ("split_tokens", uniform),
    "the distillation token is ranked": ("split_tokens", unprotected),
    "one token more": ("kept_count", lambda count, share: kept_count(count, share) + 1),
    "one head alone": ("class_attention", first_head),
    "no scaling": ("class_attention", lambda *args: class_attention(*args[:-1], 1.0)),
    "a gradient through the weights": ("class_attention", with_gradient),
    "the mean is in front": (
        "reduce_tokens",
        lambda y, split, special, merge: reduce_tokens(y, split, special, merge=merge).roll(1, dims=1),
    ),
}


@pytest.mark.parametrize("error", PLANTED)
def test_planted_errors_are_found(error, monkeypatch):
    function, planted = PLANTED[error]
    monkeypatch.setattr(room, function, planted)
    assert worst_layer("deit", TokenReduction([1], 0.5)) > 1e-6


@pytest.mark.parametrize("place", ["before_mlp", "after_layer"])
@pytest.mark.parametrize("name", SUPPORTED)
def test_keep_1_is_the_model(name, place):
    """To the bit, in training mode as well: the same modules draw the same dropout in the same order."""
    names = ["attention_dropout"] if name == "clip-vision" else ["hidden_dropout_prob", "attention_probs_dropout_prob"]
    dropout = dict.fromkeys(names, 0.2)
    drop_path = {"drop_path_rate": 0.3} if "dino" in name else {}
    model, inputs = made(name, torch.float32, **dropout, **drop_path)
    results = []
    for reduced in (False, True):
        if reduced:
            tokens.attach(model, TokenReduction([0, 1, 2], 1.0, place=place))
        for mode in (True, False):
            torch.manual_seed(3)
            output = model.train(mode)(**inputs)[0]
            results.append([output, *torch.autograd.grad(output.square().sum(), model.parameters(), allow_unused=True)])
    for before, after in zip(results[:2], results[2:], strict=True):
        assert all((a is b is None) or torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not torch.equal(results[0][0], results[1][0])  # there is dropout


def test_dropout_acts_on_the_tokens_that_are_left():
    model, inputs = made("dinov2", torch.float32, drop_path_rate=0.5, hidden_dropout_prob=0.5)
    tokens.attach(model, TokenReduction([1], 0.5))
    outputs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outputs.append(model.train()(**inputs).logits)
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("name", ["deit", "dinov2-registers", "clip-vision"])
def test_alone_is_as_in_a_batch(name):
    model, _ = made(name)
    tokens.attach(model, TokenReduction([0, 2], 0.5))
    images = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    together = model(pixel_values=images)[0]
    alone = torch.cat([model(pixel_values=one[None])[0] for one in images])
    torch.testing.assert_close(alone, together, rtol=1e-11, atol=1e-11)
    turned = model(pixel_values=images.flip(0))[0]
    torch.testing.assert_close(turned.flip(0), together, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["vit", "dinov2-registers", "clip-vision"])
def test_the_order_of_the_patches_does_not_matter(name):
    """Permuted with their positions, they give the same class token; the ranks of ties aside, which are not here."""
    model, inputs = made(name)
    tokens.attach(model, TokenReduction([0, 1], 0.5))
    tower = model.vit if name == "vit" else model
    before = tower(**inputs).last_hidden_state[:, 0]
    order = torch.randperm(16, generator=torch.Generator().manual_seed(5)) + SPECIAL[name]
    order = torch.cat([torch.arange(SPECIAL[name]), order])
    tower.embeddings.register_forward_hook(lambda module, args, output: output[:, order])
    torch.testing.assert_close(tower(**inputs).last_hidden_state[:, 0], before, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("keep", "expected"), [(1.0, 10), (0.29, 2), (0.3, 3), (0.01, 1), (0.999, 9), (0.1 + 0.2, 3)])
def test_how_many_stay(keep, expected):
    assert kept_count(10, TokenReduction([0], keep).share) == expected
    assert kept_count(100, TokenReduction([0], 0.29).share) == 29


def test_ties_go_to_the_earlier_token():
    split = split_tokens(torch.tensor([[0.5, 0.1, 0.2, 0.1, 0.1]]), special=1, count=2)
    assert split.kept.tolist() == [[1, 2]]
    assert split.rest.tolist() == [[3, 4]]


def test_equal_tokens_merge_into_one_like_them():
    hidden = torch.randn(2, 1, 8).expand(2, 7, 8).to(torch.bfloat16)
    split = split_tokens(torch.rand(2, 7), special=1, count=2)
    assert torch.equal(reduce_tokens(hidden, split, 1, merge=True), hidden[:, :4])


def test_attention_of_zero_gives_the_plain_mean():
    """Where every dropped token's attention is below the smallest float32."""
    attention = torch.zeros(2, 6)
    attention[1, 1:] = torch.tensor([0.5, 0.4, 1e-45, 0.0, 0.0])
    hidden = torch.randn(2, 6, 3, dtype=torch.float64)
    merged = reduce_tokens(hidden, split_tokens(attention, special=1, count=2), 1, merge=True)[:, -1]
    torch.testing.assert_close(merged, torch.stack([hidden[0, 3:].mean(0), hidden[1, 3]]))


def test_keys_of_any_module():
    """Keys that are not a plain linear layer's are computed by their module, with the same result."""
    torch.manual_seed(0)
    hidden, q_proj, k_proj = torch.randn(3, 9, 16).double(), nn.Linear(16, 24).double(), nn.Linear(16, 24).double()
    plain = class_attention(hidden, q_proj, k_proj, 6, 0.3)
    by_module = class_attention(hidden, q_proj, nn.Sequential(k_proj), 6, 0.3)
    torch.testing.assert_close(plain, by_module, rtol=1e-12, atol=0)
    torch.testing.assert_close(plain.sum(1), torch.ones(3).double())


@pytest.mark.parametrize("N", [1, 6])
def test_a_reducing_layer_computes_one_query_more_and_no_keys(N):
    model, inputs = classifier()
    tokens.attach(model, TokenReduction([1], 0.5))
    calls = {"q_proj": [], "k_proj": [], "v_proj": []}
    for name, seen in calls.items():
        projection = getattr(layers(model)[1].attention, name)
        projection.register_forward_hook(lambda module, args, output, seen=seen: seen.append((args[0], output)))
    model(**{key: value[:N] for key, value in inputs.items()})
    shapes = {name: [tuple(args.shape[:2]) for args, _ in seen] for name, seen in calls.items()}
    assert shapes == {"q_proj": [(N, 17), (N, 1)], "k_proj": [(N, 17)], "v_proj": [(N, 17)]}
    assert [(args.requires_grad, output.requires_grad) for args, output in calls["q_proj"]] == [
        (True, True), (False, False)
    ]  # fmt: skip


def test_attention_maps_and_hidden_states_have_the_tokens_that_are_left():
    model, inputs = classifier(attn_implementation="eager")
    tokens.attach(model, TokenReduction([1], 0.5))
    output = model(**inputs, output_attentions=True, output_hidden_states=True)
    assert [tuple(map.shape[-2:]) for map in output.attentions] == [(17, 17), (17, 17), (10, 10)]
    assert [states.shape[1] for states in output.hidden_states] == [17, 17, 10, 10]


def test_a_mask_is_refused():
    model, inputs = classifier()
    tokens.attach(model, TokenReduction([1], 0.5))
    mask = torch.ones(6, 17, dtype=torch.bool)
    mask[0, -1] = False
    with pytest.raises(ValueError, match="ViTLayer reduces tokens and got an attention_mask"):
        model(**inputs, attention_mask=mask)
