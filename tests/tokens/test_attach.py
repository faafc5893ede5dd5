"""Token reduction goes into a model and comes out again: names, files, copies, training, and what is refused."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import fishkern as fk
from fishkern import adapters, tokens
from fishkern.tokens import TokenReduction
from tests.support.layered import FAMILIES, VISION
from tests.support.oracle import one_class, squares_one_by_one, worst_error
from tests.tokens.reference import SUPPORTED, classifier, layers, made

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

HALF = TokenReduction([0, 2], 0.5)
PLACES = ["before_mlp", "after_layer"]


def logits(model: nn.Module, inputs: dict) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def gradients(model: nn.Module, inputs: dict) -> dict[str, Tensor]:
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def found(model: nn.Module) -> list:
    """All that an outsider sees of a model: classes, attributes, hooks, values."""
    return [(path, type(module), dict(vars(module))) for path, module in model.named_modules()]


@pytest.mark.parametrize("name", SUPPORTED)
def test_the_model_comes_back_as_it_was(name):
    model, inputs = made(name)
    before, state, names = model(**inputs)[0], list(model.state_dict()), [n for n, _ in model.named_modules()]
    as_found = found(model)
    assert tokens.detach(model) is model
    for _ in range(2):
        assert tokens.attach(model, HALF) is model
        assert tokens.attached(model) == HALF
        assert [isinstance(one, type(two)) for one, two in zip(layers(model), layers(made(name)[0]), strict=True)]
        assert list(model.state_dict()) == state
        assert [n for n, _ in model.named_modules()] == names
        assert not torch.equal(model(**inputs)[0][:, 0], before[:, 0])
        assert tokens.detach(model) is model
        assert tokens.attached(model) is None
        assert found(model) == as_found
        assert torch.equal(model(**inputs)[0], before)


def test_a_printed_model_says_so():
    model, _ = classifier()
    before = repr(model)
    assert repr(tokens.attach(model, HALF)).count("ReducingViTLayer(\n        keep=0.5, place='before_mlp'") == 2
    assert repr(tokens.detach(model)) == before


def test_copies_reduce_too_and_are_detached_alone():
    model, inputs = classifier()
    tokens.attach(model, HALF)
    expected, file = logits(model, inputs), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), torch.load(file, weights_only=False)]
    copies += [pickle.loads(pickle.dumps(model, protocol)) for protocol in (0, 2, pickle.HIGHEST_PROTOCOL)]
    for one in copies:
        assert tokens.attached(one) == HALF
        assert torch.equal(logits(one, inputs), expected)
        assert {type(layers(one)[number]) for number in (0, 2)} == {type(layers(model)[0])}
        tokens.detach(one)
        assert type(layers(one)[0]) is transformers.models.vit.modeling_vit.ViTLayer
    assert torch.equal(logits(model, inputs), expected)


def test_a_checkpoint_is_that_of_the_model_without_reduction(tmp_path):
    model, inputs = classifier()
    before = logits(model, inputs)
    tokens.attach(model, HALF)
    model.save_pretrained(tmp_path)
    HALF.save(tmp_path / "token_reduction.json")
    loaded = transformers.ViTForImageClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(loaded, inputs), before)
    tokens.attach(loaded, TokenReduction.load(tmp_path / "token_reduction.json"))
    torch.testing.assert_close(logits(loaded, inputs), logits(model, inputs))
    assert not torch.allclose(logits(loaded, inputs), before, atol=1e-3)


@pytest.mark.parametrize("place", PLACES)
def test_the_fisher_is_that_of_the_loop(place):
    model, batch = classifier(torch.float64)
    tokens.attach(model, TokenReduction([0, 2], 0.5, place=place))
    statistics = fk.estimate(model, [batch])
    truth = squares_one_by_one(model, [batch], one_class)
    error, name = worst_error(statistics, truth, torch.float32)
    assert error < 1e-6, name
    assert {name for name, covered in statistics.coverage.items() if covered.path != "fused"} == {
        "vit.embeddings.position_embeddings"  # as without reduction
    }
    assert fk.verify(model, [batch], statistics).ok
    tokens.detach(model)
    whole = fk.estimate(model, [batch])
    assert worst_error(whole, truth)[0] > 1e-3
    with pytest.raises(ValueError, match=r"differ in alterations \(\[.TokenReduction\(layers=.*\] and absent\)"):
        fk.merge(statistics, whole)


def test_the_fisher_of_training_steps():
    model, batch = classifier()
    tokens.attach(model.train(), HALF)
    with fk.OnlineFisher(model, decay=0.0) as online:
        gradients(model, batch)
    error, name = worst_error(dict(online.statistics.items()), dict(fk.estimate(model, [batch]).items()), torch.float32)
    assert error < 1e-4, name
    assert online.statistics.provenance["definition"]["alterations"] == [repr(HALF)]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(reentrant, place):
    model, batch = classifier(hidden_dropout_prob=0.1)
    tokens.attach(model.train(), TokenReduction([0, 2], 0.5, place=place))
    runs, calls = [], []
    layers(model)[0].mlp.register_forward_hook(lambda *args: calls.append(args))
    for times in (1, 2):
        torch.manual_seed(1)
        calls.clear()
        runs.append(gradients(model, batch))
        assert len(calls) == times
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_layers_in_a_wrapper_of_torch():
    model, inputs = classifier()
    expected = logits(tokens.attach(model, HALF), inputs)
    tokens.detach(model)
    model.vit.layers = nn.ModuleList(checkpoint_wrapper(layer) for layer in model.vit.layers)
    assert torch.equal(logits(tokens.attach(model, HALF), inputs), expected)


@pytest.mark.parametrize("place", PLACES)
def test_autocast_gives_every_weight_a_gradient(place):
    """Autocast keeps what it has cast, also for the query and keys that are computed without gradient."""
    model, batch = classifier()
    tokens.attach(model.train(), TokenReduction([0, 2], 0.5, place=place))
    full = gradients(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    model.zero_grad()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if not name.endswith("k_proj.bias"):  # 0 but for rounding
            assert torch.cosine_similarity(parameter.grad.flatten(), full[name].flatten(), dim=0) > 0.9, name


def test_16_bit_weights():
    model, inputs = classifier()
    expected = logits(tokens.attach(model, HALF), inputs)
    output = logits(model.bfloat16(), inputs)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, rtol=0.1, atol=0.1)


@pytest.mark.slow
def test_compiled():
    """In one graph; what is attached after a compiled run counts, and kept tokens are those of an eager one."""
    torch._dynamo.reset()
    model, inputs = classifier()
    images = {"pixel_values": inputs["pixel_values"]}
    before = logits(model, images)
    kept, reduced = tokens.kept_tokens(tokens.attach(model, HALF), **images), logits(model, images)
    tokens.detach(model)
    model.vit.compile(backend="eager", fullgraph=True, dynamic=False)
    for _ in range(2):
        assert torch.equal(logits(model, images), before)
        assert torch.equal(logits(tokens.attach(model, HALF), images), reduced)
        with torch.no_grad():
            model.vit(**images)  # of which no hook is a part
        again = tokens.kept_tokens(model, **images)
        assert all(torch.equal(one.kept, other.kept) for one, other in zip(again, kept, strict=True))
        tokens.detach(model)
    torch._dynamo.reset()


@pytest.mark.parametrize("first", ["tokens", "lora"])
def test_lora(first):
    model, inputs = classifier(torch.float64)
    config = peft.LoraConfig(target_modules=["q_proj", "k_proj", "fc1"], init_lora_weights=False)
    torch.manual_seed(0)
    if first == "tokens":
        adapted = peft.get_peft_model(tokens.attach(model, HALF), config)
    else:
        adapted = tokens.attach(peft.get_peft_model(model, config), HALF)
    adapted.eval()
    expected = logits(adapted, inputs)
    merged = adapted.merge_and_unload()  # the keys of plain linear layers are computed in another way
    assert tokens.attached(merged) == HALF
    torch.testing.assert_close(logits(merged, inputs), expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(logits(tokens.detach(merged), inputs), expected, atol=1e-3)


@pytest.mark.parametrize("first", ["tokens", "adapter"])
def test_adapters_of_fishkern(first):
    model, inputs = classifier()
    if first == "tokens":
        tokens.attach(model, HALF)
    adapters.attach(model, adapters.BottleneckAdapter(width=2))
    if first == "adapter":
        tokens.attach(model, HALF)
    names = adapters.adapter_parameters(model)
    assert all(grad.abs().max() > 0 for name, grad in gradients(model, inputs).items() if name in names)
    adapters.detach(model)  # it leaves the weights frozen, which must not change the ranks of tokens
    reduced, _ = classifier()
    assert torch.equal(logits(model, inputs), logits(tokens.attach(reduced, HALF), inputs))


def test_clip_reduces_images_and_not_texts():
    model, inputs = VISION["clip"].model(), VISION["clip"].inputs()
    before = model(**inputs)
    tokens.attach(model, HALF)
    after = model(**inputs)
    assert torch.equal(before.text_embeds, after.text_embeds)
    assert not torch.equal(before.image_embeds, after.image_embeds)
    assert {path.split(".")[0] for path, module in model.named_modules() if hasattr(module, "recipe")} == {
        "vision_model"
    }


class OwnHead(nn.Module):
    """A model of a user's own, around a vision transformer."""

    def __init__(self, *backbones: nn.Module) -> None:
        super().__init__()
        self.backbones = nn.ModuleList(backbones)
        self.head = nn.Linear(24, 3)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head(sum(backbone(pixel_values).pooler_output for backbone in self.backbones))


def test_a_model_around_it():
    backbone = made("dinov2-registers", torch.float32)[0]
    model, images = OwnHead(backbone), SUPPORTED["vit"].inputs()
    before = model(**images)
    tokens.attach(model, HALF)
    assert tokens.attached(backbone) == tokens.attached(model) == HALF
    assert not torch.equal(model(**images), before)


def test_parts_with_recipes_of_their_own():
    one, other = (made("dinov2-gated")[0] for _ in range(2))
    model = OwnHead(one, other)
    with pytest.raises(ValueError, match=r"several vision transformers, 'backbones.0', 'backbones.1': take one of"):
        tokens.attach(model, HALF)
    tokens.attach(one, HALF)
    tokens.attach(other, TokenReduction([1]))
    with pytest.raises(ValueError, match="by 2 recipes: ask for one part"):
        tokens.attached(model)
    assert tokens.attached(other) == TokenReduction([1])
    tokens.detach(model)
    assert tokens.attached(one) is tokens.attached(other) is None


def own_forward(layer: nn.Module) -> None:
    """Give a layer another forward pass, as a subclass would."""

    class Doubled(type(layer)):
        def forward(self, *args, **kwargs) -> Tensor:
            return 2 * super().forward(*args, **kwargs)

    layer.__class__ = Doubled


def test_a_layer_with_a_forward_pass_of_its_own():
    model, inputs = classifier()
    own_forward(layers(model)[2])
    plain = logits(model, inputs)
    with pytest.raises(ValueError, match="layer 2, a Doubled, has a forward pass of its own.*place='after_layer'"):
        tokens.attach(model, HALF)
    assert tokens.attached(model) is None
    tokens.attach(model, TokenReduction([2], 1.0, place="after_layer"))
    assert torch.equal(logits(model, inputs), plain)
    tokens.detach(model)
    assert type(layers(model)[2]).__name__ == "Doubled"


def wrapped_forward(layer: nn.Module) -> None:
    layer.forward = functools.partial(layer.forward)


def test_a_forward_pass_that_is_set_on_the_layer():
    """As accelerate does: a new class of the layer would not be asked."""
    model, inputs = classifier()
    wrapped_forward(layers(model)[2])
    with pytest.raises(ValueError, match="layer 2 has a forward pass set on the module itself.*attach before that"):
        tokens.attach(model, HALF)
    assert tokens.attached(model) is None
    del layers(model)[2].forward
    tokens.attach(model, HALF)
    reduced = logits(model, inputs)
    wrapped_forward(layers(model)[2])
    assert torch.equal(logits(model, inputs), reduced)
    with pytest.raises(ValueError, match=r"vit.layers.2 has a forward pass set on the module itself.*undo that first"):
        tokens.detach(model)
    assert tokens.attached(model) == HALF
    del layers(model)[2].forward
    own_forward(layers(model)[0])
    with pytest.raises(ValueError, match=r"the class of vit.layers.0 has been changed to Doubled"):
        tokens.detach(model)
    assert tokens.attached(model) == HALF


def of(name: str, **settings) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        cls = getattr(transformers, name)
        return cls(cls.config_class(**{**VISION["vit"].settings, **settings}))

    return make


def llava() -> nn.Module:
    vision = transformers.CLIPVisionConfig(**VISION["vit"].settings)
    text = transformers.LlamaConfig(**FAMILIES["llama"].settings)
    return transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(vision_config=vision, text_config=text))


REFUSED = {
    "text": (FAMILIES["roberta"].model, "RobertaForSequenceClassification has no vision transformer"),
    "decoder": (FAMILIES["llama"].model, "LlamaForCausalLM has no vision transformer"),
    "module": (lambda: nn.Linear(2, 2), "Linear has no vision transformer of transformers"),
    "siglip": (VISION["siglip"].model, "SiglipModel has no class token"),
    "dinov3": (VISION["dinov3"].model, "DINOv3ViTModel rotates queries and keys by the place of each patch"),
    "beit": (VISION["beit"].model, "BeitForImageClassification adds a bias to attention for each pair of places"),
    "data2vec": (of("Data2VecVisionModel"), "Data2VecVisionModel adds a bias to attention"),
    "yolos": (VISION["yolos"].model, "YolosModel adds positions between its layers"),
    "swin": (VISION["swin"].model, "SwinForImageClassification attends inside windows"),
    "mae": (of("ViTMAEForPreTraining"), "ViTMAEForPreTraining drops patches at random"),
    "backbone": (of("Dinov2Backbone"), "Dinov2Backbone gives feature maps"),
    "reconstruction": (of("ViTForMaskedImageModeling", encoder_stride=4), "ViTForMaskedImageModeling is not known to"),
    "depth": (of("DPTForDepthEstimation", backbone_out_indices=[0, 1, 2, 2]), "DPTForDepthEstimation has no vision"),
    "language": (llava, "LlavaForConditionalGeneration is not known to read the class token"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused(kind):
    make, message = REFUSED[kind]
    model = make()
    before = found(model)
    with pytest.raises(ValueError, match=message):
        tokens.attach(model, TokenReduction([0]))
    assert found(model) == before


def without_projections(model: nn.Module) -> None:
    layers(model)[1].attention = nn.Identity()


WRONG = {
    "no such layer": (
        TokenReduction([1, 3, 7]), None, ValueError, r"ViTModel has the layers 0 to 2, and the recipe names \[3, 7\]"
    ),
    "no recipe": (0.95, None, TypeError, "attach takes a TokenReduction, got float"),
    "no attention": (
        TokenReduction([0, 1]), without_projections, ValueError, "layer 1, a ViTLayer, is not built as those of ViT"
    ),
    "twice": (
        HALF, lambda model: tokens.attach(model, TokenReduction([1])), ValueError,
        "ViTForImageClassification reduces tokens already: fishkern.tokens.detach it first",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_an_error_leaves_the_model_as_it_was(what):
    recipe, before, error, message = WRONG[what]
    model, _ = classifier()
    if before is not None:
        before(model)
    as_found = found(model)
    with pytest.raises(error, match=message):
        tokens.attach(model, recipe)
    assert found(model) == as_found
