"""FILet against its formulas with explicit covariances, its targets, and what it says and refuses."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import fishkern as fk
from tests.support import zoo
from tests.support.energies import covariances

pytest.importorskip("transformers")
pytestmark = [pytest.mark.matrix, pytest.mark.filterwarnings("ignore:.*chosen scores are at most floor:UserWarning")]


def batches(make=zoo.text_batch, count: int = 3) -> list[dict]:
    return [make(4, 12, seed=seed) for seed in range(count)]


def llama(**changes) -> nn.Module:
    torch.manual_seed(0)
    return zoo.llama(**changes).model


@pytest.mark.filterwarnings("ignore:of FILet's targets", "ignore:.*has none of FILet's")
@pytest.mark.parametrize("basis", ["svd", "power"])
@pytest.mark.parametrize("fisher", ["kronecker", "joint"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_it_equals_its_formulas_with_explicit_covariances(family, fisher, basis):
    torch.manual_seed(0)
    specimen = zoo.FAMILIES[family]()
    model, data = specimen.model.double(), batches(specimen.batch)
    options = {"rank": 4, "fisher": fisher, "basis": basis, "distinct": None}
    raw = fk.filet(model, data, floor=1e-30, **options)
    floor = float(torch.cat([one.A.double().norm(dim=1).square() for one in raw.values()]).median())
    init = fk.filet(model, data, floor=floor, **options)
    names = {path: facts["weight"] for path, facts in init.provenance["modules"].items()}
    truth = covariances(model, data, specimen.loss, names.values())
    sizes = []
    for path, name in names.items():
        W = truth[name].M
        if basis == "svd":
            U, _, Vh = torch.linalg.svd(W, full_matrices=False)
            V = Vh.T
        else:  # as in the copy of the code, with matrices [I, I]
            V = W.T @ W
            V = V / V.norm(dim=0)
            U = W @ V
            U = U / U.norm(dim=0)
        energy = truth[name].joint(U, V) if fisher == "joint" else truth[name].kronecker(U, V)
        chosen = energy.sort().indices[:4].sort().values
        assert init[path].chosen.tolist() == chosen.tolist(), path
        size = energy[chosen].clamp_min(floor)
        sizes += size.tolist()
        expected = U[:, chosen] * size @ V[:, chosen].T
        torch.testing.assert_close(init[path].delta().double(), expected, rtol=1e-3, atol=1e-3 * size.min().item())
    assert min(sizes) == floor < max(sizes)


def test_the_published_targets_where_a_model_has_them():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        init = fk.filet(llama(), batches(), rank=4, floor=1e-14)
    ends = {path.rpartition(".")[2] for path in init}
    assert ends == {"q_proj", "k_proj", "v_proj", "up_proj", "down_proj"}
    assert len(init) == 10
    assert init.provenance["method"] == {"name": "FILet", "targets": [f"{path}.weight" for path in init]}
    assert init.provenance["modules"]["model.layers.0.self_attn.q_proj"]["order"] == "smallest"


def test_other_targets():
    with pytest.warns(
        UserWarning, match="of FILet's targets OPTForCausalLM has q_proj, k_proj, v_proj in its layers, wh"
    ):
        init = fk.filet(zoo.opt().model, batches(), rank=2)
    assert len(init) == 6
    message = "BertForSequenceClassification has none of FILet's targets q_proj, .* all of their 12 linear weights are"
    with pytest.warns(UserWarning, match=message):
        init = fk.filet(zoo.bert_classifier().model, batches(zoo.class_batch), rank=2)
    assert len(init) == 12
    assert list(fk.filet(llama(), batches(), rank=2, targets="gate_proj", floor=1e-14)) == [
        "model.layers.0.mlp.gate_proj", "model.layers.1.mlp.gate_proj"
    ]  # fmt: skip


def test_the_start_is_as_small_as_the_energies():
    init = fk.filet(llama(), batches(), rank=4)
    for one in init.values():
        norms = one.A.double().norm(dim=1).square()
        assert (norms >= 0.999e-8).all()
        assert (norms < 1e-2).all()


def test_sizes_of_ones_own():
    model = llama()
    for path, one in fk.filet(model, batches(), rank=4, magnitude="uniform", size=0.05).items():
        assert one.delta().norm().item() == pytest.approx(
            0.05 * model.get_submodule(path).weight.norm().item(), rel=1e-4
        )
    sigma = fk.filet(model, batches(), rank=4, magnitude="sigma")
    least = fk.filet(model, batches(), rank=4, floor=1e-14)
    assert all(torch.equal(sigma[path].chosen, least[path].chosen) for path in least)


def test_order_and_fisher_choose_others():
    model = llama()
    inits = [
        fk.filet(model, batches(), rank=4, **options) for options in ({}, {"order": "largest"}, {"fisher": "joint"})
    ]
    least, most, joint = ([one.chosen.tolist() for one in init.values()] for init in inits)
    assert all(set(few).isdisjoint(many) for few, many in zip(least, most, strict=True))
    assert joint != least


def test_too_few_positions():
    model, data = llama(), [zoo.text_batch(2, 12, low=12)]
    message = (
        r"10 of 10 weights have met fewer positions than 4 \* rank = 32 \(.*; model.layers.0.self_attn.q_proj.weight "
        r"has met 24\): take more examples"
    )
    with pytest.raises(ValueError, match=message):
        fk.filet(model, data, rank=8)
    with pytest.warns(UserWarning, match=r"have met fewer positions than their smaller side") as caught:
        fk.filet(llama(hidden_size=48), data, rank=4, magnitude="uniform")
    assert any("has met 24 for 48" in str(warning.message) for warning in caught)


def test_a_rank_above_the_smaller_side():
    with pytest.raises(
        ValueError, match="rank 13 of model.layers.0.self_attn.k_proj.weight exceeds the smaller side of "
    ):
        fk.filet(llama(), [], rank=13)  # before the data are read


def test_dead_directions_are_counted_or_left_out():
    """The norm before the module silences eight features, and its weight does not mix them with others."""
    model = llama(num_hidden_layers=1)
    layer = model.model.layers[0]
    with torch.no_grad():
        layer.input_layernorm.weight[16:] = 0
        layer.self_attn.q_proj.weight[:16, 16:] = 0
        layer.self_attn.q_proj.weight[16:, :16] = 0
    settings = {"rank": 4, "targets": "q_proj", "magnitude": "uniform"}
    with pytest.warns(UserWarning, match="4 of 4 chosen directions are dead, in 1 of 1 modules"):
        kept = fk.filet(model, batches(), **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        skipped = fk.filet(model, batches(), dead="skip", **settings)
    (dead,), (alive,) = kept.values(), skipped.values()
    assert not dead.A[:, :16].abs().max() > 1e-6
    assert not alive.A[:, 16:].abs().max() > 1e-6


def test_the_power_basis_has_no_singular_values():
    with pytest.raises(ValueError, match="needs singular values"):
        fk.filet(llama(), batches(), rank=2, basis="power", magnitude="sigma")


def test_a_stored_transposed_weight_and_all_positions():
    data = batches()
    model = zoo.gpt2().model
    with pytest.warns(UserWarning, match="GPT2LMHeadModel has none of FILet's targets"):
        attended, everything = (fk.filet(model, data, rank=2, positions=which) for which in ("attended", "all"))
    assert attended["transformer.h.0.mlp.c_fc"].shape == (96, 24)
    assert any(not torch.equal(attended[path].chosen, everything[path].chosen) for path in attended)
