"""The comparison of cheaper rivals: equal search, arms that are what they say, and no run twice."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")
import transformers

import fishkern as fk
from benchmarks.studies import cheaper_rivals
from benchmarks.studies.cheaper_rivals import arms, sparse, uses
from benchmarks.studies.cheaper_rivals.arms import ARMS, Trained
from benchmarks.studies.cheaper_rivals.setting import WIDE_RATES, Setting
from benchmarks.studies.cheaper_rivals.subjects import (
    Loaded,
    Task,
    class_losses,
    freeze_all_but_linears,
    of_pictures,
    of_tokens,
    token_losses,
)
from benchmarks.studies.cheaper_rivals.table import first_of, table, values
from benchmarks.studies.comparing.limit import Limit
from benchmarks.studies.comparing.low_rank import low_rank

FEW = Setting(
    "tiny", epochs=1, lr=1e-2, examples=8, few=2, passes=4, small_passes=2, choosing=4, scored=4, batch_size=8,
    densities=(0.05, 0.2), pruned=(0.3,), shares=(0.3, 0.7), penalties=(0.1, 1.0), sparse=0.05, rates=(1e-3, 1e-2),
)  # fmt: skip


def tiny(seed: int, setting: Setting = FEW) -> Loaded:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=17, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, initializer_range=0.3, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    freeze_all_but_linears(model, ".layers.")
    draws = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 8, (24,), generator=draws).tolist()
    tasks = [[torch.randint(low, low + 8, (n,), generator=draws).tolist() for n in lengths] for low in (1, 9)]
    tasks = tuple(Task.of(f"from {rows[0][0]}", rows, setting) for rows in tasks)
    return Loaded(model, tasks, of_tokens, token_losses, {"model": "tiny"})


QUICK = ("exact", "few", "adam", "sketch-8", "ones")


@pytest.fixture(scope="module")
def trained() -> Trained:
    return cheaper_rivals.learn(tiny(0), 0, FEW, 0)


@pytest.fixture(scope="module", params=["quick", pytest.param("all", marks=pytest.mark.slow)])
def log(request, tmp_path_factory):
    """The records of some arms, or of all that can run here."""
    path = tmp_path_factory.mktemp("results") / "cheaper_rivals.jsonl"
    with pytest.MonkeyPatch.context() as patched:
        if request.param == "quick":
            patched.setattr(cheaper_rivals, "ARMS", {name: ARMS[name] for name in QUICK})
            choosers = {name: sparse.CHOOSERS[name] for name in ("exact", "lift", "random", "whole")}
            patched.setattr(cheaper_rivals, "CHOOSERS", choosers)
        cheaper_rivals.measure(tiny, 0, FEW, path, Limit(None))
        yield cheaper_rivals.found(path, FEW)


def of(records: list[dict], quantity: str) -> dict[str, dict]:
    return {record["label"]: record for record in records if record["quantity"] == quantity}


def by_hand(trained: Trained) -> dict[str, torch.Tensor]:
    """The mean of squared gradients of single examples, in float64."""
    model = trained.loaded.fresh()
    model.load_state_dict(trained.model.state_dict())
    model.double()
    pool = {name: p for name, p in model.named_parameters() if p.requires_grad}
    squares = dict.fromkeys(pool, 0.0)
    for row in trained.rows:
        (loss,) = trained.loaded.losses(model, trained.loaded.collate([row]))
        for name, gradient in zip(pool, torch.autograd.grad(loss, list(pool.values())), strict=True):
            squares[name] = squares[name] + gradient.square() / len(trained.rows)
    return squares


def test_the_exact_arm_is_exact_and_so_are_batches_of_one(trained):
    truth = by_hand(trained)
    one = arms.estimated(lambda _: fk.DiagonalFisher(unit="batch"), size=lambda _: 1)
    for way in (ARMS["exact"].way, one):
        importance = way(trained)
        assert importance.keys() == trained.pool.keys() == truth.keys()
        for name, squares in truth.items():
            torch.testing.assert_close(importance[name].double(), squares, rtol=1e-3, atol=1e-6 * squares.max().item())


def test_few_are_the_first_examples(trained):
    truth = by_hand(replace(trained, rows=trained.rows[: FEW.few]))
    for name, squares in ARMS["few"].way(trained).items():
        torch.testing.assert_close(squares.double(), truth[name], rtol=1e-3, atol=1e-6 * truth[name].max().item())


def test_the_diagonal_along_eigenvectors():
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0] for n in (3, 4))
    L = torch.rand(3, 4, generator=generator, dtype=torch.float64)
    basis = torch.kron(U, V)
    dense = basis @ torch.diag(L.flatten()) @ basis.mT
    torch.testing.assert_close(arms.diagonal_along(U, L, V), dense.diagonal().view(3, 4))


def test_ekfac_has_the_trace_of_the_exact_fisher(trained):
    """It turns the gradients of examples, and a rotation leaves the sum of squares."""
    pytest.importorskip("kronfluence")
    exact, ekfac = ARMS["exact"].way(trained), ARMS["ekfac"].way(trained)
    for name, squares in exact.items():
        assert ekfac[name].shape == squares.shape
        assert ekfac[name].sum().item() == pytest.approx(squares.sum().item(), rel=1e-3)


def test_the_kronecker_diagonal_is_that_of_kronfluence(trained):
    pytest.importorskip("kronfluence")
    factors = arms.kronfluence_factors(trained, "kfac")
    ours = ARMS["kfac"].way(trained)
    scales = []
    for name in trained.pool:
        module = name.removesuffix(".weight")
        G, A = (factors[f"{side}_covariance"][module] for side in ("gradient", "activation"))
        theirs = torch.outer(G.diagonal(), A.diagonal())
        scales.append((ours[name].sum() / theirs.sum()).item())
        torch.testing.assert_close(ours[name], theirs * scales[-1], rtol=1e-3, atol=1e-6)
    assert max(scales) / min(scales) == pytest.approx(1, rel=1e-3)  # a ranking over all weights is the same, too


def test_random_values_are_the_exact_ones(trained):
    exact, dealt = (torch.cat([v.flatten() for v in ARMS[arm].way(trained).values()]) for arm in ("exact", "random"))
    assert torch.equal(exact.sort().values, dealt.sort().values)
    assert not torch.equal(exact, dealt)


def test_importances_have_mean_one_and_their_order():
    scaled = uses.with_mean_one({"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([[8.0]])})
    assert {name: score.tolist() for name, score in scaled.items()} == {"a": [0.25, 0.75], "b": [[2.0]]}


def test_the_best_on_the_rows_for_choosing_is_scored():
    """By the mean over both tasks, and never by the rows that are scored."""

    class Model(torch.nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.value = value

    task = Task("t", [], [], choosing=[0.0], scored=[10.0])
    other = Task("u", [], [], choosing=[1.0], scored=[0.0])
    losses = lambda model, batch: (batch["rows"] - model.value).abs()  # noqa: E731
    loaded = Loaded(Model(0.0), (task, other), lambda rows: {"rows": torch.tensor(rows)}, losses, {})
    search = uses.Search(loaded)
    for value in (10.0, 0.5, 2.0, math.nan):
        search.offer(Model(value), value=value)
    result = search.result()
    assert (result["value"], result["scored"], len(result["tried"])) == (0.5, [9.5, 0.5], 4)
    empty = uses.Search(loaded)
    empty.offer(Model(math.nan), value=math.nan)
    with pytest.raises(ValueError, match="nothing to choose from"):
        empty.result()


def test_an_approximation_of_low_rank():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(16, 24, generator=generator, dtype=torch.float64)
    rest = torch.linalg.svdvals(matrix - low_rank(matrix))
    torch.testing.assert_close(rest[:-2], torch.linalg.svdvals(matrix)[2:])  # the best one of rank 16 / 8
    assert torch.linalg.matrix_rank(low_rank(matrix)) == 2


def test_every_arm_searches_the_same(log):
    records = list(of(log, "uses").values())
    assert [record["label"] for record in records] == [n for n, arm in cheaper_rivals.ARMS.items() if not arm.missing]
    for record in records:
        assert [one["share"] for one in record["merged"]["tried"]] == list(FEW.shares)
        assert [one["weight"] for one in record["consolidated"]["tried"]] == list(FEW.penalties)
        assert list(record["overlap"]) == ["0.05", "0.2"]
        assert (record["before"], record["free"]) == (records[0]["before"], records[0]["free"])
    cost = {record["label"]: record["cost"] for record in records}
    assert cost["few"] < cost["exact"] < cost["sketch-8"]
    assert cost["adam"] == cost["ones"] == 0
    choosers = of(log, "sparse")
    assert choosers.keys() == cheaper_rivals.CHOOSERS.keys()
    assert all([one["lr"] for one in record["tried"]] == list(WIDE_RATES) for record in choosers.values())
    budget = {label: record["trained"] for label, record in choosers.items() if label not in ("whole", "lift")}
    assert len(set(budget.values())) == 1
    assert 0 < choosers["lift"]["trained"] <= choosers["exact"]["trained"]  # rounded down in each matrix
    assert choosers["whole"]["trained"] == choosers["whole"]["of"]


def test_nothing_runs_twice(log, tmp_path, monkeypatch):
    path = tmp_path / "cheaper_rivals.jsonl"
    path.write_text("".join(f"{json.dumps(record)}\n" for record in log[:-1]))  # as if stopped before the last
    cheaper_rivals.measure(tiny, 0, FEW, path, Limit(None))
    again = cheaper_rivals.found(path, FEW)
    assert [(r["quantity"], r["label"]) for r in again] == [(r["quantity"], r["label"]) for r in log]
    assert again[-1]["scored"] == log[-1]["scored"]
    monkeypatch.setattr(cheaper_rivals, "Bench", None)
    cheaper_rivals.measure(tiny, 0, FEW, path, Limit(None))
    assert not cheaper_rivals.found(path, replace(FEW, lr=1.0))


def test_a_missing_package_is_named(monkeypatch, capsys, tmp_path):
    missing = replace(ARMS["ekfac"], package="no_such_package")
    assert "no_such_package" in missing.missing
    monkeypatch.setattr(cheaper_rivals, "ARMS", {"ekfac": missing})
    monkeypatch.setattr(cheaper_rivals, "CHOOSERS", {})
    cheaper_rivals.measure(tiny, 0, FEW, tmp_path / "none.jsonl", Limit(None))
    assert "ekfac is left out: the package no_such_package" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_table_says_every_arm(log):
    text = table(log)
    assert all(f"\n{record['label']} " in text for record in log)
    records = list(of(log, "uses").values())
    exact = of(log, "uses")["exact"]
    merged = exact["merged"]["scored"]
    assert f"{sum(merged) / 2:.3f} ± 0.000" in text
    assert first_of(records, "exact", "merged") == merged[:1]
    assert values(records, "exact", "pruned", "0.3") == [exact["pruned"]["0.3"]]


def test_losses_of_rows_are_those_of_the_model():
    loaded = tiny(1)
    for row in loaded.tasks[0].ours[:3]:
        batch = loaded.collate([row, loaded.tasks[0].ours[4]])
        alone = loaded.base(**loaded.collate([row])).loss
        torch.testing.assert_close(loaded.losses(loaded.base, batch)[0], alone)
    pictures = of_pictures([(torch.zeros(1, 8, 8), 3), (torch.ones(1, 8, 8), 1)])
    config = transformers.ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_labels=10,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config).eval()
    torch.testing.assert_close(class_losses(model, pictures).mean(), model(**pictures).loss)
