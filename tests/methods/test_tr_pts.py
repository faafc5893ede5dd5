"""TR-PTS: the rule on the exact Fisher of what has rows, the rest whole or never, and the sparsest layers."""

from __future__ import annotations

import warnings
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from torch import nn

import fishkern as fk
from fishkern import hosts
from fishkern.statistics import Covered
from tests.support import zoo

transformers = pytest.importorskip("transformers")

LAYERS = 6
SIZES = dict(hidden_size=16, num_hidden_layers=LAYERS, num_attention_heads=2, intermediate_size=24)
IMAGE = dict(image_size=16, patch_size=4, num_labels=3)


def vit(**changes) -> nn.Module:
    torch.manual_seed(0)
    return transformers.ViTForImageClassification(transformers.ViTConfig(**{**SIZES, **IMAGE, **changes})).eval()


def dinov2() -> nn.Module:
    torch.manual_seed(0)
    sizes = {name: value for name, value in SIZES.items() if name != "intermediate_size"}
    config = transformers.Dinov2WithRegistersConfig(**sizes, **IMAGE, mlp_ratio=2, num_register_tokens=2)
    return transformers.Dinov2WithRegistersForImageClassification(config).eval()


def clip() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.CLIPConfig(vision_config={**SIZES, **IMAGE, "projection_dim": 8}, num_labels=3)
    return transformers.CLIPForImageClassification(config).eval()


def batches(seed: int = 0, classes: int = 3) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(8, 3, 16, 16, generator=generator)
    labels = torch.randint(classes, (8,), generator=generator)
    return [{"pixel_values": images[:4], "labels": labels[:4]}, {"pixel_values": images[4:], "labels": labels[4:]}]


@pytest.fixture(scope="module")
def relevance() -> fk.TaskRelevance:
    return fk.tr_pts(vit(), batches())


NEVER = ("*norm*", "*token*", "*position_embedding*", "*layer_scale*")  # also layer scales, which are vectors
ALWAYS = ("classifier.*",)


@pytest.mark.parametrize(("make", "biases"), [(vit, True), (vit, False), (dinov2, True), (clip, False)])
def test_the_selection_is_that_of_the_rule_on_the_exact_fisher(make, biases):
    """Written with patterns, over statistics of every parameter."""
    model = make()
    names = [name for name, _ in model.named_parameters()]
    linear = [name for name in names if name.endswith(".bias") and "norm" not in name and "classifier" not in name]
    never = [pattern for pattern in NEVER if any(pattern.strip("*") in name for name in names)]
    never += ["*class_embedding"] if make is clip else []
    rule = fk.ContributionTopK(
        top=0.3,
        least_per_row=2,
        most_per_row=7,
        always=(*ALWAYS, *(linear if biases else ())),
        never=(*never, *(() if biases else linear)),
    )
    expected = fk.select(fk.estimate(make(), batches()), rule)
    found = fk.tr_pts(model, batches(), top=0.3, least_per_row=2, most_per_row=7, biases=biases)
    assert found.selection == expected
    assert list(found.selection.names) == names
    assert found.contributions == fk.selection.Contributions.of(expected)


def test_nothing_in_the_model_changes():
    model, fresh = vit().train(), vit().train()
    model.vit.layers[1].eval()
    fresh.vit.layers[1].eval()
    model.vit.layernorm.weight.requires_grad_(False)
    fk.tr_pts(model, batches())
    assert [type(module) for module in model.modules()] == [type(module) for module in fresh.modules()]
    assert [module.training for module in model.modules()] == [module.training for module in fresh.modules()]
    values = dict(fresh.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, values[name])
        assert parameter.grad is None
        assert parameter.requires_grad == (name != "vit.layernorm.weight")


def test_what_trains_whole_and_what_never_does(relevance):
    selection = relevance.selection
    linear = {
        f"{path}.bias"
        for path, module in vit().named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }  # fmt: skip
    assert set(selection.whole) == linear | {"classifier.weight"}
    untouched = {name for name, count in selection.counts.items() if not count}
    assert untouched == {
        name for name in selection.names if "norm" in name or name.endswith(("cls_token", "position_embeddings"))
    }
    per_row = relevance.contributions.per_row
    assert {*per_row, *selection.whole, *untouched} == set(selection.names)
    for name, connections in per_row.items():  # every neuron has as many
        assert (selection.mask(name).flatten(1).sum(1) == connections).all(), name
    assert relevance.contributions.count == sum(selection.counts[name] for name in per_row)


def test_by_default_the_top_fifth_counts(relevance):
    assert relevance.contributions.top == fk.tr_pts(vit(), batches(), top=0.2).contributions.top == 0.2
    assert relevance.reduction.keep == 0.95


def test_a_density_is_solved_for():
    contributions = fk.tr_pts(vit(), batches(), density=0.12, token_layers=[]).contributions
    assert contributions.count / contributions.total == pytest.approx(0.12, abs=0.02)


def planted(monkeypatch, tops: list[int]) -> None:
    """Scores in which layer ``n`` has ``tops[n]`` entries of the highest, and the patch embedding one."""

    def estimate(model, batches, estimator, *, parameters, **options):
        named = {name: value for name, value in model.named_parameters() if parameters(name, value)}
        scores = {name: torch.rand(value.shape) for name, value in named.items()}
        for number, count in enumerate(tops):
            scores[f"vit.layers.{number}.mlp.fc1.weight"].view(-1)[:count] = 5.0
        scores["vit.embeddings.patch_embeddings.projection.weight"].view(-1)[0] = 5.0
        coverage = {name: Covered("fused", value.numel()) for name, value in named.items()}
        provenance = {"definition": {"estimator": "DiagonalFisher"}, "runs": []}
        return fk.Statistics(scores, count=8, provenance=provenance, coverage=coverage)

    monkeypatch.setattr(import_module("fishkern.methods.tr_pts"), "estimate", estimate)


@pytest.mark.parametrize(
    ("tops", "layers"),
    [
        ([9, 8, 7, 6, 5, 4], (4, 5)),
        ([1, 9, 8, 7, 6, 5], (4, 5)),  # layer 0 is the sparsest, and keeps its tokens
        ([0, 3, 0, 9, 0, 9], (2, 4)),
        ([2, 3, 3, 3, 3, 2], (1, 5)),  # of equal ones the lower number
        ([7, 7, 7, 7, 7, 7], (1, 2)),
    ],
)
def test_the_sparsest_third_drops_tokens(monkeypatch, tops, layers):
    planted(monkeypatch, tops)
    model = vit()
    ranked = sum(p.numel() for n, p in model.named_parameters() if p.ndim in (2, 4) and "classifier" not in n)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # so few in the top set make some layers grow
        found, alone = (
            fk.tr_pts(model, batches(), top=(sum(tops) + 1.5) / ranked, by=by, keep=0.7)
            for by in ("layer", "parameter")
        )
    assert alone.reduction == found.reduction
    assert found.contributions.top_count == sum(tops) + 1
    assert found.reduction == fk.tokens.TokenReduction(layers, 0.7)


def test_the_sparsest_layers_are_of_the_vision_tower():
    """Layers are those of the stack that images run through, whatever its path."""
    for make in (dinov2, clip):
        found = fk.tr_pts(make(), batches(), top=0.2)
        counts = {
            one.layer.number: one.top_count for one in found.contributions.layers.values() if one.layer is not None
        }
        assert len(counts) == LAYERS
        expected = sorted(range(1, LAYERS), key=lambda number: (counts[number], number))[:2]
        assert found.reduction.layers == tuple(sorted(expected))
        fk.tokens.attach(make(), found.reduction)


def test_a_density_leaves_the_token_layers_where_they_are(monkeypatch):
    """The top set that a density is solved with may hold one layer alone."""
    tops = [9, 8, 7, 2, 3, 9]
    planted(monkeypatch, tops)
    torch.manual_seed(1)
    usual = fk.tr_pts(vit(), batches())
    torch.manual_seed(1)
    dense = fk.tr_pts(vit(), batches(), density=0.3)
    assert dense.contributions.top != usual.contributions.top
    assert dense.reduction == usual.reduction


def test_layers_may_be_named_and_left_out():
    assert fk.tr_pts(vit(), batches(), token_layers=[0, 3], keep=0.5).reduction == fk.tokens.TokenReduction((0, 3), 0.5)
    assert fk.tr_pts(vit(), batches(), token_layers=[]).reduction is None
    assert fk.tr_pts(vit(), batches(), keep=None).reduction is None
    few = fk.tr_pts(vit(num_hidden_layers=2), batches()).reduction
    assert few.layers == (1,), "a third of two layers is one, and not layer 0"


def test_a_decoder_has_the_parameter_half_alone():
    model, rows = zoo.llama().model.eval(), [zoo.text_batch(4, 6)]
    with pytest.raises(
        ValueError, match=r"no vision transformer .* To select parameters alone, pass token_layers=\[\]"
    ):
        fk.tr_pts(model, rows)
    found = fk.tr_pts(model, rows, token_layers=[])
    assert found.reduction is None
    counts = found.selection.counts
    assert not counts["model.embed_tokens.weight"]
    assert not any(count for name, count in counts.items() if "norm" in name)
    assert all(counts[name] for name in counts if "proj" in name or name == "lm_head.weight")


def test_a_tuned_model_is_its_base_a_delta_and_a_recipe(tmp_path, relevance):
    relevance = replace(relevance, reduction=replace(relevance.reduction, keep=0.5))
    model = fk.tokens.attach(vit(), relevance.reduction)
    optimizer = fk.MaskedAdamW(model, relevance.selection, lr=1e-2)
    for batch in batches():
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    fk.delta(model, relevance.selection).save(tmp_path / "delta.safetensors")
    relevance.save(tmp_path)
    again = vit()
    fk.apply_delta(again, fk.Delta.load(tmp_path / "delta.safetensors"))
    plain = again(**batches()[0]).logits
    fk.tokens.attach(again, fk.TaskRelevance.load(tmp_path).reduction)
    assert torch.equal(again(**batches()[0]).logits, model(**batches()[0]).logits)
    assert not torch.equal(again(**batches()[0]).logits, plain), "the recipe belongs to the model"
    size = (tmp_path / "delta.safetensors").stat().st_size
    header = 400 * len(relevance.selection.names)
    assert size < 8 * relevance.selection.count + header, "at most eight bytes for an entry: its value, and its place"


def test_it_is_saved_and_loaded(tmp_path, relevance):
    relevance.save(tmp_path / "a")
    again = fk.TaskRelevance.load(str(tmp_path / "a"))
    assert again == relevance
    assert fk.tokens.TokenReduction.load(tmp_path / "a" / "token_reduction.json") == relevance.reduction
    assert again.contributions == relevance.contributions
    without = fk.TaskRelevance(relevance.selection, None)
    assert fk.TaskRelevance.load(without.save(tmp_path / "a")) == without, "the recipe of before is gone"
    assert {file.name for file in (tmp_path / "a").iterdir()} == {"selection.safetensors"}
    fk.select({"w": torch.rand(4, 4)}, fk.GlobalTopK(k=2)).save(tmp_path / "a" / "selection.safetensors")
    with pytest.raises(ValueError, match="select with ContributionTopK"):
        fk.TaskRelevance.load(tmp_path / "a")
    with pytest.raises(FileNotFoundError):
        fk.TaskRelevance.load(tmp_path / "b")


def test_tasks_overlap_in_part(relevance):
    """Two tasks of one model: what both select lies between what they must share and everything."""
    other = fk.tr_pts(vit(), batches(seed=1, classes=2)).selection
    overlap = relevance.selection.overlap(other)
    assert overlap == other.overlap(relevance.selection)
    whole = sum(relevance.selection.counts[name] for name in relevance.selection.whole)
    union = (relevance.selection | other).count
    assert whole / union < overlap < 1


class Stack(nn.Module):
    """Experts in one tensor, in a layer of a list, beside a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Module()])
        self.layers[0].experts = nn.Parameter(torch.rand(2, 3, 3))
        self.layers[0].gate = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("ni,eoi->no", self.layers[0].gate(x), self.layers[0].experts)


def test_matrices_that_are_not_of_linear_layers_are_named():
    with pytest.warns(UserWarning, match=r"not trained, .*: layers.0.experts \(18 entries\)"):
        found = fk.tr_pts(
            Stack(),
            [(torch.rand(4, 3), torch.rand(4, 3))],
            token_layers=[],
            likelihood=lambda model, batch: (model(batch[0]) - batch[1]).square().sum(1),
        )
    assert found.selection.counts["layers.0.experts"] == 0
    assert found.selection.counts["layers.0.gate.weight"] == 3


REFUSED = {
    "top and density": (vit, dict(top=0.1, density=0.1), ValueError, "either top or density"),
    "another word": (vit, dict(token_layers="dense"), ValueError, "'sparsest' or the numbers of layers, got 'dense'"),
    "no such layer": (vit, dict(token_layers=[9]), ValueError, r"layers 0 to 5, .* pass token_layers=\[\]"),
    "keep 0": (vit, dict(keep=0), ValueError, r"keep must be above 0 and at most 1, got 0.0\.$"),
    "small density": (vit, dict(density=1e-3), ValueError, r"less than least_per_row=1 of each row .* the smallest"),
    "small top": (vit, dict(top=1e-9), ValueError, r"is none: the smallest top is"),
    "one layer": (lambda: vit(num_hidden_layers=1), {}, ValueError, "only layer is layer 0"),
    "reduced": (
        lambda: fk.tokens.attach(vit(), fk.tokens.TokenReduction([1])), {}, ValueError, "tokens.detach it first"
    ),
    "no tokens": (lambda: zoo.swin().model, {}, ValueError, r"windows .* pass token_layers=\[\]"),
    "no linear layer": (
        lambda: nn.Sequential(nn.LayerNorm(3)), dict(token_layers=[]), ValueError, "no linear layer or convolution"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "options", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_before_anything_is_read(make, options, error, message):
    def unread():
        raise AssertionError("a batch was read")
        yield

    model = make()
    classes = [type(module) for module in model.modules()]
    with pytest.raises(error, match=message):
        fk.tr_pts(model, unread(), **options)
    assert [type(module) for module in model.modules()] == classes


def test_an_adapter_is_refused():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(vit(), peft.LoraConfig(r=1, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"has an adapter, and tr_pts trains entries of the model itself"):
        fk.tr_pts(model, batches())
    assert hosts.unwrap(model) is model
