"""Saliencies against their formulas in float64, and pruning by a selection of them."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import fishkern as fk
from tests.support import zoo

pytest.importorskip("transformers")


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def data() -> list[tuple]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 5, generator=generator), torch.randint(3, (4,), generator=generator)) for _ in range(2)]


def estimated(model: nn.Module, *recipe, **options) -> fk.Statistics:
    return fk.estimate(model, data(), *recipe, likelihood=fk.Classification(), **options)


def test_what_is_selected_becomes_zero_and_nothing_else():
    model = net()
    fisher = estimated(model)
    selection = fk.select(fk.saliency(model, fisher), fk.GlobalTopK(density=0.5, order="smallest", never="2.*"))
    before = copy.deepcopy(model.state_dict())
    undo = fk.delta(model, selection)
    fk.prune_(model, selection)
    for name, value in model.state_dict().items():
        mask = selection.mask(name)
        assert torch.equal(value, torch.where(mask, torch.zeros(()), before[name])), name
        assert torch.equal(value != before[name], mask), "the weights here are not zero before"
    fk.apply_delta(model, undo)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_pruned_weights_stay_zero_in_training():
    model = net()
    everything = fk.select(dict(model.named_parameters()), fk.GlobalTopK(density=1.0))
    gone = fk.select(fk.saliency(model), fk.GlobalTopK(density=0.5, order="smallest"))
    fk.prune_(model, gone)
    optimizer = fk.MaskedAdamW(model, everything - gone, lr=0.1)
    for x, y in data():
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, p in model.named_parameters():
        assert torch.equal(p == 0, gone.mask(name)), name


def test_any_layout_of_memory():
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    selection = fk.Selection({"weight": (4, 3, 3, 3)}, {"weight": torch.tensor([1, 5, 107])})
    fk.prune_(model, selection)
    assert torch.equal(model.weight == 0, selection.mask("weight"))
    rows = fk.Selection({"weight": (4, 3, 3, 3)}, {}, ranges={"weight": fk.Rows((1, 3))})
    fk.prune_(model, rows)
    assert (model.weight[1:3] == 0).all()


def test_fisher_and_magnitude_are_their_formulas():
    model = net()
    fisher = estimated(model)
    ours, sizes = fk.saliency(model, fisher), fk.saliency(model)
    for name, p in model.named_parameters():
        w = p.detach().double()
        torch.testing.assert_close(ours[name].double(), fisher[name].double() * w * w, rtol=1e-6, atol=0)
        assert torch.equal(sizes[name], p.detach().abs())
        with pytest.raises(AssertionError):
            torch.testing.assert_close(ours[name].double(), fisher[name].double() * w.abs(), rtol=1e-6, atol=0)
    assert ours.count == fisher.count
    definition = ours.provenance["definition"]
    assert definition["of"] == fisher.provenance["definition"]
    assert definition["score"] == "fisher * weight^2"
    assert ours.provenance["runs"] == fisher.provenance["runs"]


def inputs_of(model: nn.Module, batches: list, read) -> dict[str, torch.Tensor]:
    """By hooks: the squares of what enters each linear map at positions that count, summed in float64."""
    sums: dict[str, torch.Tensor] = {}
    hooks, mask = [], []

    def keep(name):
        def hook(module, args):
            x = args[0].detach().double()
            x = x[mask[-1]] if mask[-1] is not None and x.ndim == 3 else x.flatten(0, -2)
            sums[name] = sums.get(name, 0) + x.square().sum(0)

        return hook

    for path, module in model.named_modules():
        if type(module).__name__ in ("Linear", "Conv1D"):
            hooks.append(module.register_forward_pre_hook(keep(f"{path}.weight")))
    for batch in batches:
        mask.append(read(batch))
        model(**batch) if isinstance(batch, dict) else model(batch[0])
    for hook in hooks:
        hook.remove()
    return sums


@pytest.mark.parametrize("family", [zoo.llama, zoo.gpt2, zoo.bert_classifier], ids=["llama", "gpt2", "bert"])
def test_wanda_is_the_magnitude_times_the_norm_of_the_input(family):
    specimen = family()
    model = specimen.model.eval()
    batches = [specimen.batch(3), specimen.batch(2, seed=1)]
    norms = fk.estimate(model, batches, fk.InputNorms())
    sums = inputs_of(model, batches, lambda batch: batch["attention_mask"].bool())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        scores = fk.saliency(model, norms)
    # rows of Conv1D are inputs, which Wanda does not compare within
    assert [str(one.message).partition(" is stored as ")[2][:19] for one in said] == (
        ["[inputs, outputs]: "] if family is zoo.gpt2 else []
    )
    assert scores.provenance["definition"]["score"] == "|weight| * norm of the input"
    named = dict(model.named_parameters())
    assert len(norms) > 4
    seen = 0
    for name, value in norms.items():
        torch.testing.assert_close(value.double() * norms.count, sums[name], rtol=1e-4, atol=1e-9)
        w, x = named[name].detach().double(), sums[name].sqrt()
        transposed = type(model.get_submodule(name.removesuffix(".weight"))).__name__ == "Conv1D"
        truth = w.abs() * (x[:, None] if transposed else x)
        torch.testing.assert_close(scores[name].double(), truth, rtol=1e-4, atol=1e-9)
        if w.shape[0] == w.shape[1]:
            seen += 1
            wrong = w.abs() * (x if transposed else x[:, None])  # the norm along the other axis
            assert not torch.allclose(scores[name].double(), wrong, rtol=1e-3)
    assert seen


def test_padding_counts_only_where_asked():
    model, batch = zoo.llama().model, zoo.text_batch(4)
    attended, everything = (
        fk.estimate(model, [batch], fk.InputNorms(positions=positions)) for positions in ("attended", "all")
    )
    name = "model.layers.0.mlp.up_proj.weight"
    assert (everything[name] > attended[name]).any()
    with pytest.raises(ValueError, match="positions must be one of"):
        fk.InputNorms(positions="some")


def test_a_convolution_is_scored_by_its_patches():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), nn.Flatten(), nn.Linear(3 * 4, 2))
    x = torch.randn(4, 2, 4, 4)
    norms = fk.estimate(model, [(x, torch.tensor([0, 1, 1, 0]))], fk.InputNorms(), likelihood=fk.Classification())
    patches = nn.functional.unfold(x.double(), 3)  # [N, I, T]
    truth = model[0].weight.detach().double().abs() * patches.square().sum((0, 2)).sqrt().view(1, 2, 3, 3)
    torch.testing.assert_close(fk.saliency(model, norms)["0.weight"].double(), truth, rtol=1e-5, atol=0)


def test_saliencies_merge_only_where_the_weights_are_the_same():
    model = net()
    parts = [fk.saliency(model, fk.estimate(model, [batch], likelihood=fk.Classification())) for batch in data()]
    merged = fk.merge(*parts)
    whole = fk.saliency(model, estimated(model))
    for name in whole:
        torch.testing.assert_close(merged[name], whole[name])
    with torch.no_grad():
        model[0].weight += 0.1
    with pytest.raises(ValueError, match=r"only statistics of one definition merge; these differ in weights"):
        fk.merge(parts[0], fk.saliency(model, estimated(model)))
    with pytest.raises(ValueError, match="only statistics of one definition merge"):
        fk.merge(parts[0], estimated(model))


def test_what_is_refused():
    model = net()
    fisher = estimated(model)
    with pytest.raises(TypeError, match=r"must be fishkern.Statistics, got dict"):
        fk.saliency(model, dict(fisher))
    with pytest.raises(ValueError, match="are a saliency already"):
        fk.saliency(model, fk.saliency(model, fisher))
    with pytest.raises(ValueError, match=r"hold 0.weight with shape \(7,\), in the model it has \(7, 5\)"):
        fk.saliency(model, estimated(model, fk.GroupFisher(by="row"), parameters="*weight"))
    with pytest.raises(ValueError, match="these statistics are of groups"):
        fk.saliency(model, estimated(model, fk.GroupFisher(by=lambda name: "all")))
    with pytest.raises(ValueError, match=r"Linear has no parameter 0.weight, 0.bias"):
        fk.saliency(model[0], fisher)
    with pytest.raises(ValueError, match="parameters='head' matches no name"):
        fk.saliency(model, fisher, parameters="head")
    other = fk.estimate(model, data(), fk.InputNorms(), likelihood=fk.Classification()).rename(
        lambda name: {"0.weight": "2.weight", "2.weight": "0.weight"}.get(name, name)
    )
    with pytest.raises(ValueError, match="is no weight of a linear map with"):
        fk.saliency(model, other)
    with pytest.raises(ValueError, match="the selection does not fit the model"):
        fk.prune_(model[0], fk.select(fisher, fk.GlobalTopK(density=0.1)))
    whole = fk.select({"weight": torch.ones(3, 3)}, fk.GlobalTopK(density=1.0))
    packed = nn.Linear(3, 3)
    packed.weight = nn.Parameter(torch.zeros(3, 3, dtype=torch.int8), requires_grad=False)
    for call in (lambda: fk.prune_(packed, whole), lambda: fk.saliency(packed)):
        with pytest.raises(fk.UnsupportedModuleError, match="weight is quantised and stored in another form"):
            call()
