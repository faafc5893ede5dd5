"""FARSS against its formulas with explicit covariances, its boundary, its search, and what it refuses."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fishkern as fk
from fishkern.initialization import probe_losses
from fishkern.methods.farss import _standardised
from tests.support import zoo
from tests.support.energies import covariances

pytest.importorskip("transformers")

RANKS = fk.InverseImportance(average=4, most=9)


def batches(make=zoo.text_batch, count: int = 3) -> list[dict]:
    return [make(4, 9, seed=seed) for seed in range(count)]


def llama(**changes) -> nn.Module:
    torch.manual_seed(0)
    return zoo.llama(**{"num_hidden_layers": 4, **changes}).model


def farss(model: nn.Module, data: list[dict] | None = None, **options) -> fk.AdapterInit:
    settings = {"shallow": 1, "rank": 6, "ranks": RANKS, **options}
    return fk.farss(model, data or batches(), **settings)


@pytest.mark.parametrize("fisher", ["kronecker", "joint"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert-classifier"])
def test_it_equals_its_formulas_with_explicit_covariances(family, fisher):
    """In float64: grouped queries, transposed weights, an encoder with a mean over rows; padding does not count."""
    torch.manual_seed(0)
    specimen = zoo.FAMILIES[family]()
    model, data = specimen.model.double(), batches(specimen.batch)
    init = farss(model, data, shallow=0, fisher=fisher)
    names = {path: facts["weight"] for path, facts in init.provenance["modules"].items()}
    assert len(names) == {"llama": 14, "gpt2": 8, "bert-classifier": 12}[family]
    truth = covariances(model, data, specimen.loss, names.values())
    shallow = [path for path in names if ".0." in path]
    importances = {names[path]: truth[names[path]].importance(fisher) for path in shallow}
    assert init.provenance["method"]["importances"] == pytest.approx(importances, rel=1e-9)
    largest = {name: min(truth[name].M.shape) for name in importances}
    ranks = fk.allocate_ranks(importances, RANKS, largest=largest)
    assert sum(ranks.values()) == 4 * len(shallow)
    for path, name in names.items():
        one = truth[name]
        U, sigma, Vh = torch.linalg.svd(one.M, full_matrices=False)
        energy = one.joint(U, Vh.T) if fisher == "joint" else one.kronecker(U, Vh.T)
        order = (sigma.square() * energy).sort(descending=path not in shallow).indices
        chosen = order[: ranks.get(name, 6)]
        assert init[path].chosen.tolist() == chosen.sort().values.tolist(), path
        expected = U[:, chosen] * sigma[chosen] @ Vh[chosen]
        torch.testing.assert_close(init[path].delta().double(), expected, rtol=1e-4, atol=1e-6)


def test_layers_decide_what_is_shallow_and_ranks_do_not():
    """The published code took every layer for shallow where the rank was below 128."""
    model = llama()
    init = farss(model)
    for path, facts in init.provenance["modules"].items():
        shallow = int(path.split(".")[2]) <= 1
        assert facts["order"] == ("smallest" if shallow else "largest")
        assert init[path].scaling == 1.0
    deep = [rank for path, rank in init.ranks.items() if ".2." in path or ".3." in path]
    assert deep == [6] * 14
    assert sum(init.ranks.values()) == 4 * 14 + sum(deep)
    assert init.provenance["method"]["shallow"] == 1
    everything = farss(model, shallow=3)
    assert sum(everything.ranks.values()) == 4 * 28
    assert {facts["order"] for facts in everything.provenance["modules"].values()} == {"smallest"}


def test_the_scale_of_the_loss_matters_to_neither_ranks_nor_components():
    model = llama().double()

    def loss(model: nn.Module, batch: dict, by: float) -> Tensor:
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
        return by * F.cross_entropy(logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none").sum(1)

    one, other = (farss(model, likelihood=lambda m, b, by=by: loss(m, b, by)) for by in (1.0, 1000.0))
    assert one.ranks == other.ranks
    assert all(torch.equal(one[path].chosen, other[path].chosen) for path in one)


def test_uniform_ranks_need_no_importance():
    init = farss(llama(), ranks=fk.UniformRank(3))
    assert {rank for path, rank in init.ranks.items() if ".0." in path or ".1." in path} == {3}
    assert "importance" not in init.provenance["energies"]["definition"]


def test_targets_by_the_last_part_of_their_paths():
    init = farss(llama(), targets=["q_proj", "*.down_proj"])
    assert {path.rpartition(".")[2] for path in init} == {"q_proj", "down_proj"}
    assert len(init) == 8
    with pytest.raises(ValueError, match="targets='query' matches none of 28 weights"):
        farss(llama(), targets="query")


def test_by_default_all_linear_weights_in_the_layers():
    init = farss(zoo.bert_classifier().model, batches(zoo.class_batch), shallow=0)
    assert len(init) == 12
    assert all(".encoder.layer." in path for path in init)


def test_a_model_of_two_stacks_counts_layers_in_each():
    init = farss(zoo.t5().model, batches(zoo.answer_batch), shallow=0, positions="all")
    assert {path.split(".")[0] for path in init} == {"encoder", "decoder"}
    for path, facts in init.provenance["modules"].items():
        assert facts["order"] == ("smallest" if ".block.0." in path else "largest")


@pytest.mark.gpu
def test_the_same_on_a_gpu():
    model = llama().double()
    here = farss(model)
    there = farss(model.cuda())
    assert there.ranks == here.ranks
    for path, start in here.items():
        assert torch.equal(there[path].chosen, start.chosen)
        torch.testing.assert_close(there[path].delta(), start.delta(), rtol=1e-5, atol=1e-6)


def test_a_rank_that_some_matrices_do_not_have():
    with pytest.warns(UserWarning, match="rank=20 is more than 4 of 28 matrices have components"):
        init = farss(llama(), rank=20)
    assert init.ranks["model.layers.3.self_attn.k_proj"] == 12
    assert init.ranks["model.layers.3.self_attn.q_proj"] == 20


def test_max_examples_and_frozen_weights():
    model = llama().requires_grad_(False)
    init = farss(model, batches(count=8))
    assert init.provenance["energies"]["count"] == 16
    assert farss(model, batches(count=8), max_examples=8).provenance["energies"]["count"] == 8
    assert not any(parameter.requires_grad for parameter in model.parameters())


class Experts(nn.Module):
    """Experts as modules of their own, mixed by a router that never takes the last."""

    def __init__(self, *, routed: bool) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.router = nn.Linear(6, 2)
        self.routed = routed

    def forward(self, x: Tensor) -> Tensor:
        share = torch.cat([self.router(x).softmax(-1), torch.zeros_like(x[..., :1])], -1)
        if not self.routed:  # every expert sees every position
            return x + sum(share[..., e : e + 1] * expert(x).tanh() for e, expert in enumerate(self.experts))
        rows, share = x.flatten(0, 1), share.flatten(0, 1)
        y = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            places = (share.argmax(-1) == e).nonzero()[:, 0]
            y = y.index_add(0, places, share[places, e : e + 1] * expert(rows[places]).tanh())
        return x + y.view_as(x)


class Mixture(nn.Module):
    def __init__(self, *, routed: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.layers = nn.ModuleList(Experts(routed=routed) for _ in range(2))
        self.head = nn.Linear(6, 11)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@pytest.mark.filterwarnings("ignore:.*slower path", "ignore:.*generic")
@pytest.mark.parametrize("routed", [False, True])
def test_an_expert_that_no_example_reaches(routed):
    torch.manual_seed(0)
    model, data = Mixture(routed=routed), [(torch.randint(11, (4, 8)), torch.randint(11, (4, 8))) for _ in range(3)]
    ranks = fk.InverseImportance(average=2, most=5)
    with pytest.warns(UserWarning, match=r"no example reaches 2 of 8 modules \(layers.0.experts.2, layers.1.experts.2"):
        init = fk.farss(model, data, shallow=0, rank=2, ranks=ranks, likelihood=fk.TokenClassification(class_axis=-1))
    assert list(init) == [
        f"layers.{n}.{m}" for n in range(2) for m in ("experts.0", "experts.1", "experts.2", "router")
    ]
    assert init["layers.1.experts.2"].chosen.tolist() == [0, 1]
    rank = init.ranks["layers.0.experts.2"]
    assert init["layers.0.experts.2"].chosen.tolist() == list(range(rank))
    importances = init.provenance["method"]["importances"]
    others = sorted(value for name, value in importances.items() if "experts.2" not in name)
    assert importances["layers.0.experts.2.weight"] == others[1]  # the median of three
    assert sum(init.ranks[path] for path in init if ".0." in path[:9]) == 8


# The search


def test_the_search_takes_the_best_of_its_table():
    model, data = llama(num_hidden_layers=4), batches()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    task, retention = [zoo.text_batch(4, 9, seed=7)], [zoo.text_batch(4, 9, seed=8)]
    search = fk.ShallowSearch(task, retention, steps=4, lr=1e-2, candidates=[2, 0, 1])
    init = farss(model, data, shallow="search", search=search)
    found = init.provenance["method"]["search"]
    assert (found["steps"], found["lr"]) == (4, 1e-2)
    table = found["table"]
    assert [row["shallow"] for row in table] == [0, 1, 2]
    assert len({row["task"] for row in table}) == 3
    losses = torch.tensor([[row["task"], row["retention"]] for row in table], dtype=torch.float64)
    z = ((losses.mean(0) - losses) / losses.std(0, correction=0)).sum(1)  # a lower loss is better
    assert [row["z"] for row in table] == pytest.approx(z.tolist())
    best = max(table, key=lambda row: row["z"])
    assert init.provenance["method"]["shallow"] == best["shallow"]
    assert init == farss(model, data, shallow=best["shallow"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    assert farss(model, data, shallow="search", search=search).provenance == init.provenance


def test_a_probe_trains_as_an_adapter_of_peft_does():
    peft = pytest.importorskip("peft")
    model, data = llama(num_hidden_layers=2).double().eval(), batches()
    init = farss(model, data, shallow=0)
    found = probe_losses(model, init, data, {"task": data[:1]}, steps=5, lr=1e-2)
    pattern = {f"^{path}$": rank for path, rank in init.ranks.items()}
    config = peft.LoraConfig(r=1, lora_alpha=1, rank_pattern=pattern, alpha_pattern=pattern, target_modules=list(init))
    adapted = peft.get_peft_model(model, config).double().eval()
    for path, start in init.items():
        module = adapted.get_submodule(f"base_model.model.{path}")
        with torch.no_grad():
            module.lora_A["default"].weight.copy_(start.A)
            module.lora_B["default"].weight.copy_(start.B)
            module.base_layer.weight -= start.scaling * start.B.double() @ start.A.double()
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)

    def losses(batch: dict) -> Tensor:
        rows = [{key: value[n : n + 1] for key, value in batch.items()} for n in range(4)]
        return torch.stack([adapted(**row).loss for row in rows])

    for batch in [*data, *data][:5]:
        optimizer.zero_grad()
        losses(batch).mean().backward()
        optimizer.step()
    assert found["task"] == pytest.approx(losses(data[0]).mean().item(), rel=1e-6)


def test_by_default_it_tries_sixteenths_of_the_layers():
    model = llama(
        num_hidden_layers=16, hidden_size=8, intermediate_size=8, num_attention_heads=2, num_key_value_heads=1
    )
    search = fk.ShallowSearch(batches(count=1), batches(count=1), steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = {"rank": 2, "ranks": fk.UniformRank(1), "targets": "q_proj"}
        init = farss(model, shallow="search", search=search, **settings)
    assert [row["shallow"] for row in init.provenance["method"]["search"]["table"]] == [1, 2, 3, 4]


def test_equal_losses_have_no_preference():
    assert _standardised([2.0, 2.0]) == [0.0, 0.0]
    assert _standardised([1.0, 3.0]) == [-1.0, 1.0]


def test_a_search_that_cannot_be():
    model = llama()
    search = fk.ShallowSearch(batches(count=1), batches(count=1), steps=2)
    with pytest.raises(ValueError, match=r"shallow='search' takes search=ShallowSearch\(task=..., retention=...\)"):
        farss(model, shallow="search")
    with pytest.raises(ValueError, match="shallow='search' takes search=ShallowSearch"):
        farss(model, shallow=1, search=search)
    with pytest.raises(
        ValueError,
        match="to train the probe on ended after 0 of 2 steps and cannot be read again: pass a list or",
    ):
        farss(model, iter(batches()), shallow="search", search=search)
    with pytest.raises(
        ValueError, match="ended after 3 of 5 steps and cannot be read again: pass a list or a DataLoader"
    ):
        probe_losses(model, farss(model), iter(batches()), {}, steps=5, lr=1e-3)
    with pytest.raises(ValueError, match="a loss is not finite after training with lr=1e\\+30: take a lower one"):
        probe_losses(model, farss(model), batches(), {"task": batches()}, steps=1, lr=1e30)
    with pytest.raises(ValueError, match="there are no batches to measure the loss of the retention on"):
        farss(model, shallow="search", search=fk.ShallowSearch(batches(), []))
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        fk.ShallowSearch([], [], steps=0)
    with pytest.raises(ValueError, match="lr must be positive, got 0"):
        fk.ShallowSearch([], [], lr=0)
    with pytest.raises(ValueError, match="candidates must name at least one layer"):
        fk.ShallowSearch([], [], candidates=[])


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"shallow": 4}, ValueError, "from 0 to 3 in this model, got 4"),
        ({"shallow": -1}, ValueError, "from 0 to 3 in this model, got -1"),
        ({"shallow": "first"}, TypeError, "shallow must be an integer, got 'first'"),
        ({"ranks": 16}, TypeError, "ranks must be a rule for ranks such as InverseImportance"),
        ({"rank": 0}, ValueError, "ranks? must be at least 1, got 0"),
        ({"fisher": "exact"}, ValueError, "fisher must be one of"),
        (
            {"ranks": fk.InverseImportance(50)},
            ValueError,
            "average=50 of 14 matrices is 700 ranks, and they can have 288",
        ),
    ],
)
def test_what_is_refused(options, error, match):
    with pytest.raises(error, match=match):
        farss(llama(), **options)


def test_a_model_that_has_an_adapter_already():
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(fk.UnsupportedModuleError, match="has an adapter already, and a start is made from the weights"):
        farss(adapted)


def test_a_model_without_layers():
    with pytest.raises(ValueError, match="Sequential has no linear weights in transformer layers"):
        fk.farss(nn.Sequential(nn.Linear(3, 3)), [], shallow=0)
