"""The published formulas of FARSS and FILet against plain float64 ones, quirk by quirk."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from benchmarks.studies.starts import published

ROWS, LENGTH, WIDTH, INNER = 6, 5, 6, 4


class Model(nn.Module):
    """Two linear maps between an embedding and one output, with the mean loss of a batch, as transformers has it."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, WIDTH)
        self.up = nn.Linear(WIDTH, INNER)
        self.down = nn.Linear(INNER, WIDTH)
        self.dropout = nn.Dropout(0.5)
        self.out = nn.Linear(WIDTH, 1)
        self.modes = []

    def forward(self, input_ids, attention_mask, labels):
        self.modes.append(self.training)
        hidden = self.down(self.up(self.embedding(input_ids)).tanh()).tanh()
        pooled = (hidden * attention_mask[:, :, None]).sum(1) / attention_mask.sum(1, keepdim=True)
        losses = (self.out(pooled)[:, 0] - labels).square()
        return SimpleNamespace(loss=losses.mean())


@pytest.fixture
def model() -> Model:
    return Model().double().eval()


def rows(padding: int = 0) -> list[dict[str, Tensor]]:
    """Batches of four and two rows of one length, and so many positions of padding."""
    draws = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 11, (ROWS, LENGTH), generator=draws)
    labels = torch.randn(ROWS, generator=draws, dtype=torch.float64)
    mask = nn.functional.pad(torch.ones_like(ids), (0, padding))
    ids = nn.functional.pad(ids, (0, padding))
    parts = (slice(0, 4), slice(4, 6))
    return [{"input_ids": ids[n], "attention_mask": mask[n], "labels": labels[n]} for n in parts]


def modules(model: Model) -> dict[str, nn.Linear]:
    return {"layers.0.up": model.up, "layers.1.down": model.down}


def tokens(model: Model, batches: list[dict[str, Tensor]]) -> list[dict[str, tuple[Tensor, Tensor]]]:
    """Of each batch and module the inputs and the output gradients ``[tokens, size]``, by autograd alone."""
    result = []
    for batch in batches:
        embedded = model.embedding(batch["input_ids"])
        up = model.up(embedded).detach().requires_grad_()
        inner = up.tanh()
        down = model.down(inner)
        pooled = (down.tanh() * batch["attention_mask"][:, :, None]).sum(1) / batch["attention_mask"].sum(1)[:, None]
        loss = (model.out(pooled)[:, 0] - batch["labels"]).square().mean()
        at_up, at_down = torch.autograd.grad(loss, [up, down])
        result.append(
            {
                "layers.0.up": (embedded.detach().flatten(0, 1), at_up.flatten(0, 1)),
                "layers.1.down": (inner.detach().flatten(0, 1), at_down.flatten(0, 1)),
            }
        )
    return result


def quadratic(vector: Tensor, rows: Tensor) -> float:
    return sum(float(vector @ row) ** 2 for row in rows) / len(rows)


def farss(model, batches, **changed):
    settings = dict(shallow=lambda path: path == "layers.0.up", rank=4, average=2, seed=0) | changed
    return published.farss(model, batches, modules(model), **settings)


@pytest.mark.parametrize("switch", [128, 3])
def test_farss_equals_its_formulas(model, switch):
    """Scores of all singular directions one by one; below the switch the lowest are taken, also in deep layers."""
    batches = rows(padding=2)
    starts = farss(model, batches, switch=switch)
    seen = tokens(model, batches)
    for path, module in modules(model).items():
        h, d = (torch.cat([batch[path][side] for batch in seen]) for side in (0, 1))
        U, sigma, Vh = torch.linalg.svd(module.weight.detach(), full_matrices=False)
        scores = [
            float(sigma[k]) ** 2 * quadratic(Vh[k], h) * quadratic(U[:, k], d)
            for k in range(len(sigma))
        ]  # fmt: skip
        own = len(starts[path].A)
        largest = own >= switch
        chosen = sorted(sorted(range(len(scores)), key=lambda k: scores[k], reverse=largest)[:own])
        product = sum(float(sigma[k]) * torch.outer(U[:, k], Vh[k]) for k in chosen)
        torch.testing.assert_close((starts[path].B @ starts[path].A).double(), product, rtol=1e-5, atol=1e-6)
        assert starts[path].scaling == 4 / own  # uncompensated: the runtime's factor is not taken out of B and A
    assert [len(start.A) for start in starts.values()] == [2, 4]


def test_importance_is_the_trace(model):
    h, d = tokens(model, rows())[0]["layers.0.up"]
    Sh, Sd, W = h.T @ h / len(h), d.T @ d / len(d), model.up.weight.detach()
    expected = torch.trace(Sd @ W @ Sh @ W.T) / (W.shape[0] * W.shape[1])
    assert published.importance(W, Sh, Sd) == pytest.approx(float(expected))
    assert published.importance(W, None, Sd) == pytest.approx(float((W**2).mean()))  # another unit


def test_ranks_are_rounded_then_clipped_and_miss_their_average():
    """Inverse shares of a budget of 8: 6.67, 0.67, 0.67; the largest is cut to 4, and nothing is dealt out again."""
    importances = {"a": 1.0, "b": 10.0, "c": 10.0}
    ranks = published.ranks_of(importances, average=8 / 3, most=4)
    inverse = {name: 1 / (value / 21 + 1e-12) for name, value in importances.items()}
    shares = {name: 8 * value / sum(inverse.values()) for name, value in inverse.items()}
    assert ranks == {name: max(1, min(4, round(share))) for name, share in shares.items()} == {"a": 4, "b": 1, "c": 1}
    assert published.ranks_of({"a": math.nan, "b": 1.0}, average=3, most=4) == {"a": 3, "b": 3}
    assert published.ranks_of({"a": 1.0, "b": 1.0}, average=9, most=4) == {"a": 4, "b": 4}


def test_farss_counts_padding(model):
    """The positions of padding are in the averages: with them the energies are others."""
    short, long = (
        published.covariances(model, rows(n), modules(model), seed=0, subsample=1024, training=False)[0]["layers.0.up"]
        for n in (0, 3)
    )
    pad = model.embedding.weight[0].detach()
    expected = (LENGTH * short + 3 * torch.outer(pad, pad)) / (LENGTH + 3)
    torch.testing.assert_close(long.double(), expected.double(), rtol=1e-5, atol=1e-6)


def test_farss_looks_at_few_tokens_which_a_seed_draws(model):
    def inputs(seed: int, subsample: int) -> Tensor:
        settings = dict(seed=seed, subsample=subsample, training=False)
        return published.covariances(model, rows(), modules(model), **settings)[0]["layers.0.up"]

    assert torch.equal(inputs(1, 7), inputs(1, 7))
    assert not torch.equal(inputs(1, 7), inputs(2, 7))
    assert not torch.allclose(inputs(1, 7), inputs(1, 1024))


def test_farss_runs_in_training_mode_and_filet_does_not(model):
    farss(model, rows())
    assert model.modes == [True, True]
    assert not model.training
    published.filet(model, rows(), modules(model), rank=2)
    assert model.modes[2:] == [False, False]


@pytest.mark.parametrize("clamp", [1e-8, 1e-3])
def test_filet_equals_its_formulas(model, clamp):
    """The power basis, candidate by candidate; batches of different size have the same weight."""
    batches = rows(padding=2)
    starts = published.filet(model, batches, modules(model), rank=2, clamp=clamp)
    seen = tokens(model, batches)
    for path, module in modules(model).items():
        W = module.weight.detach()
        candidates = []
        for k in range(W.shape[1]):
            v = W.T @ W[:, k]
            v = v / v.norm()
            u = W @ v
            u = u / u.norm()
            energy = [sum(quadratic(w, batch[path][side]) for batch in seen) / 2 for w, side in ((v, 0), (u, 1))]
            candidates.append((energy[0] * energy[1], u, v))
        smallest = sorted(candidates, key=lambda candidate: candidate[0])[:2]
        product = sum(max(clamp, energy) * torch.outer(u, v) for energy, u, v in smallest)
        found = starts[path].scaling * (starts[path].B @ starts[path].A).double()
        torch.testing.assert_close(found, product, rtol=1e-4, atol=1e-10)
        sizes = starts[path].A.norm(dim=1).double()
        expected = torch.tensor([math.sqrt(max(clamp, energy)) for energy, *_ in smallest], dtype=torch.float64)
        torch.testing.assert_close(sizes.sort().values, expected.sort().values, rtol=1e-4, atol=0)


def test_filet_depends_on_the_size_of_batches(model):
    """The gradients are those of a mean loss: the same rows, repeated in one batch, have a quarter of the energy."""
    (batch, _) = rows()
    twice = {name: torch.cat([values, values]) for name, values in batch.items()}
    once, doubled = (published.filet(model, [b], modules(model), rank=2, clamp=0.0) for b in (batch, twice))
    for path in modules(model):
        product = [starts[path].B @ starts[path].A for starts in (once, doubled)]
        torch.testing.assert_close(product[1], product[0] / 4, rtol=1e-4, atol=1e-9)
