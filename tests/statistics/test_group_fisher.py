"""Sums of exact per-example squares over groups of entries."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

import fishkern as fk
from tests.support import zoo

pytest.importorskip("transformers")
pytestmark = [pytest.mark.matrix, pytest.mark.filterwarnings("error:.*slow exact path")]

BY = ("row", "column", "tensor", "layer", lambda name: name.rpartition(".")[2])


def lora() -> zoo.Specimen:
    peft = pytest.importorskip("peft")
    specimen = zoo.llama()
    model = peft.get_peft_model(specimen.model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)  # at zero no gradient reaches A
    return zoo.Specimen(model, specimen.batch, specimen.loss)


MODELS = {
    "llama": zoo.llama,
    "tied llama": lambda: zoo.llama(tie_word_embeddings=True),
    "gpt2": zoo.gpt2,
    "vit": zoo.vit,
    "lora": lora,
}


def of_dtype(kind: str, dtype: torch.dtype) -> tuple[nn.Module, list[dict]]:
    specimen = MODELS[kind]()
    batches = [specimen.batch(3), specimen.batch(2)]
    if kind == "vit":
        batches = [{**batch, "pixel_values": batch["pixel_values"].to(dtype)} for batch in batches]
    return specimen.model.to(dtype), batches


@dataclass(frozen=True)
class Kept(fk.DiagonalFisher):
    """The diagonal before its entries become float32."""

    sums: list[Tensor] = field(default_factory=list)

    def result(self, state, count):
        self.sums.append(state / count)
        return super().result(state, count)


@dataclass(frozen=True)
class KeptGroups(fk.GroupFisher):
    sums: list[Tensor] = field(default_factory=list)

    def result(self, state, count):
        self.sums.append(state / count)
        return super().result(state, count)


def summed(squares: Tensor, by: str) -> Tensor:
    if by == "row" and squares.ndim > 1:
        return squares.flatten(1).sum(1)
    if by == "column" and squares.ndim > 1:
        return squares.sum(0)
    return squares if by in ("row", "column") else squares.sum()


@pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["float64", "float32"])
@pytest.mark.parametrize("by", ["row", "column", "tensor"])
@pytest.mark.parametrize("kind", MODELS)
def test_equals_the_sums_of_the_diagonal(kind, by, dtype, limit):
    model, batches = of_dtype(kind, dtype)
    groups, entries = KeptGroups(by=by), Kept()
    fk.estimate(model, batches, groups)
    diagonal = fk.estimate(model, batches, entries)
    largest = max(value.abs().max().item() for value in entries.sums)
    for name, ours, squares in zip(diagonal, groups.sums, entries.sums, strict=True):
        truth = summed(squares.double(), by)
        # a key's bias is zero but for rounding
        floor = (256 * torch.finfo(dtype).eps) ** 2 * largest * squares.numel()
        error = (ours - truth).abs().max() / max(truth.max().item(), floor)
        assert error < limit, f"{name}: {error:.1e}"


@pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["float64", "float32"])
@pytest.mark.parametrize("by", [*BY[3:], lambda name: "all"], ids=["layer", "own names", "all"])
@pytest.mark.parametrize("kind", MODELS)
def test_groups_of_parameters_are_sums_over_them_and_say_which(kind, by, dtype, limit):
    """Before their sums become float32, and as the result has them."""
    model, batches = of_dtype(kind, dtype)
    estimator, entries = KeptGroups(by=by), Kept()
    groups = fk.estimate(model, batches, estimator)
    diagonal = fk.estimate(model, batches, entries)
    members = groups.provenance["definition"]["groups"]
    assert sorted(name for names in members.values() for name in names) == sorted(diagonal)
    assert members.keys() == groups.keys()
    ours, truth = dict(zip(diagonal, estimator.sums, strict=True)), dict(zip(diagonal, entries.sums, strict=True))
    for group, names in members.items():
        expected = sum(truth[name].double().sum() for name in names)
        torch.testing.assert_close(sum(ours[name] for name in names), expected, rtol=limit, atol=0.0)
        assert groups[group].shape == ()
        torch.testing.assert_close(groups[group].double(), expected, rtol=1e-5, atol=0.0)
    assert groups.coverage == diagonal.coverage  # in the size of the parameters
    assert f"{len(groups)} group{'s' * (len(groups) > 1)}, " in repr(groups)


def test_a_layer_is_a_transformer_layer_and_every_other_parameter_is_its_own():
    layers = {kind: fk.estimate(*of_dtype(kind, torch.float32), fk.GroupFisher(by="layer")).keys() for kind in MODELS}
    outside = {"model.embed_tokens.weight", "model.norm.weight"}
    assert layers["tied llama"] == {"model.layers.0", "model.layers.1"} | outside
    assert layers["llama"] == layers["tied llama"] | {"lm_head.weight"}
    assert layers["lora"] == {f"base_model.model.model.layers.{number}" for number in (0, 1)}
    assert layers["gpt2"] >= {"transformer.h.0", "transformer.wte.weight", "transformer.wpe.weight"}
    assert {"vit.layers.0", "vit.layers.1", "classifier.weight"} < layers["vit"]


@pytest.mark.parametrize("by", BY[3:])
def test_renamed_groups_list_their_parameters_by_the_new_names(by, tmp_path):
    specimen = zoo.llama()
    groups = fk.estimate(specimen.model, [specimen.batch()], fk.GroupFisher(by=by))
    renamed = groups.rename(lambda name: f"base_model.model.{name}")
    members = renamed.provenance["definition"]["groups"]
    assert members.keys() == renamed.keys()
    assert {name for names in members.values() for name in names} == set(renamed.coverage)
    assert fk.Statistics.load(renamed.save(tmp_path / "groups")) == renamed
    assert renamed.rename(lambda name: name.removeprefix("base_model.model.")) == groups


def test_a_conv1d_has_its_rows_where_it_stores_them():
    specimen = zoo.gpt2()
    statistics = fk.estimate(specimen.model, [specimen.batch(3)], fk.GroupFisher(by="row"))
    shapes = {name: parameter.shape for name, parameter in specimen.model.named_parameters()}
    name = "transformer.h.0.attn.c_attn.weight"
    assert statistics[name].shape == shapes[name][:1]
    assert statistics["transformer.h.0.ln_1.weight"].shape == shapes["transformer.h.0.ln_1.weight"]


@pytest.mark.parametrize("kind", ["mc", "type-2"])
def test_draws_and_labels_are_those_of_the_diagonal(kind):
    model, batches = zoo.llama().model, [zoo.text_batch(3)]
    groups = fk.estimate(model, batches, fk.GroupFisher("tensor", kind, mc_samples=2, seed=5))
    diagonal = fk.estimate(model, batches, fk.DiagonalFisher(kind, mc_samples=2, seed=5))
    for name, value in diagonal.items():
        torch.testing.assert_close(groups[name], value.double().sum().float(), rtol=1e-5, atol=0.0)


def test_groups_of_other_parameters_do_not_merge():
    model, batches = zoo.llama().model, [zoo.text_batch(3)]
    one, other = (
        fk.estimate(model, batches, fk.GroupFisher(by=by)) for by in (lambda name: "all", lambda name: name[:5])
    )
    with pytest.raises(ValueError, match=r"differ in groups"):
        fk.merge(one, other)


def test_verify_compares_groups_within_a_parameter_and_refuses_others():
    specimen = zoo.llama()
    batches = [specimen.batch(3)]
    for by in ("row", "column", "tensor"):
        assert fk.verify(specimen.model, batches, estimator=fk.GroupFisher(by=by)).ok
    with pytest.raises(ValueError, match=r"statistics are of groups of parameters: verify GroupFisher\(by='tensor'\)"):
        fk.verify(specimen.model, batches, estimator=fk.GroupFisher(by="layer"))


@pytest.mark.parametrize("by", ["row", "layer"])
def test_a_rule_has_no_scores_of_entries_to_choose_by(by):
    specimen = zoo.llama()
    statistics = fk.estimate(specimen.model, [specimen.batch(3)], fk.GroupFisher(by=by))
    with pytest.raises(ValueError, match=r"a rule chooses entries by one score for each, and these .*fishkern.Rows"):
        fk.select(statistics, fk.GlobalTopK(k=3))


def test_refused_in_one_sentence():
    with pytest.raises(ValueError, match=r"by must be one of \('row', 'column', 'tensor', 'layer'\) or a function"):
        fk.GroupFisher(by="head")
    with pytest.raises(ValueError, match="fisher_type must be one of"):
        fk.GroupFisher(fisher_type="true")
    with pytest.raises(TypeError, match="the function of by= must name a group, by a str, for .*; it gave 7"):
        fk.estimate(zoo.llama().model, [zoo.text_batch()], fk.GroupFisher(by=lambda name: 7))
