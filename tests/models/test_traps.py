"""Mistakes that implementations of the Fisher information are known for, as far as no other file tests for them."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import fishkern as fk
from tests.support import zoo
from tests.support.exactness import assert_exact, paths
from tests.support.oracle import squares_one_by_one, worst_error

pytest.importorskip("transformers")


def relative_gap(one: fk.Statistics, other: fk.Statistics, name: str) -> float:
    return ((one[name] - other[name]).norm() / other[name].norm()).item()


def test_squares_of_positions_are_another_quantity():
    """They equal the squares of examples after the last mixing of tokens, and are far off before it."""
    specimen = zoo.llama()
    batch = specimen.batch(6, 9)
    exact = fk.estimate(specimen.model, [batch])
    by_position = fk.estimate(specimen.model, [batch], fk.DiagonalFisher(unit="position"))
    for projection in ("k_proj", "v_proj"):
        assert relative_gap(by_position, exact, f"model.layers.0.self_attn.{projection}.weight") > 0.1
    one_token = {key: value[:, :2] for key, value in batch.items() if key != "attention_mask"}
    exact = fk.estimate(specimen.model, [one_token])
    by_position = fk.estimate(specimen.model, [one_token], fk.DiagonalFisher(unit="position"))
    torch.testing.assert_close(by_position["lm_head.weight"], exact["lm_head.weight"])


def test_squares_of_batch_gradients_are_another_quantity():
    """The squared gradient of each batch's mean loss is available as ``unit="batch"``, and never meant otherwise."""
    specimen = zoo.llama()
    model, batches = specimen.model.double(), [specimen.batch(4, 7), specimen.batch(3, 7, seed=1)]
    statistics = fk.estimate(model, batches, fk.DiagonalFisher(unit="batch"))
    assert statistics.count == 2
    expected = 0.0
    for batch in batches:
        rows = [{key: value[n : n + 1] for key, value in batch.items()} for n in range(len(batch["labels"]))]
        loss = sum(specimen.loss(model.eval(), row) for row in rows) / len(rows)
        (grad,) = torch.autograd.grad(loss, [model.lm_head.weight])
        expected = expected + grad.square() / 2
    torch.testing.assert_close(statistics["lm_head.weight"], expected.float())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_reduction_is_declared(reduction):
    """A mean is over the example's own tokens, whatever the others' lengths, and a sum is not divided."""
    specimen = zoo.llama()

    def loss(model, row):
        labels = row["labels"]
        logits = model(input_ids=row["input_ids"], attention_mask=row["attention_mask"]).logits
        return F.cross_entropy(logits[0, :-1], labels[0, 1:], reduction=reduction)

    specimen = zoo.Specimen(specimen.model, specimen.batch, loss)
    statistics = assert_exact(specimen, [specimen.batch(5, 8)], likelihood=fk.CausalLM(reduction=reduction))
    assert reduction in statistics.provenance["definition"]["likelihood"]


def test_position_embeddings_shared_by_the_batch():
    """One ``[1, T]`` lookup serves all rows, so its own output has no axis of examples."""
    specimen = zoo.gpt2()
    statistics = assert_exact(specimen, [specimen.batch(5, 7)])
    assert "transformer.wpe.weight" in paths(statistics)["fused"]


def test_squares_that_float16_cannot_hold():
    """Gradients of 2e-5 square to 4e-10, which float16 rounds to zero."""
    linear = torch.nn.Linear(8, 4).half()
    batch = (torch.full((3, 8), 0.02, dtype=torch.float16), torch.zeros(3))
    loss = lambda model, batch: model(batch[0]).float().sum(1) * 1e-3  # noqa: E731
    statistics = fk.estimate(linear, [batch], likelihood=loss)
    torch.testing.assert_close(statistics["weight"], torch.full((4, 8), (0.02 * 1e-3) ** 2), rtol=1e-2, atol=0.0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_kernels_agree(attention):
    """Batch sizes differ by the rounding of float32 only, whichever kernel computes the attention."""
    specimen = zoo.llama(attn_implementation=attention)
    specimen.model.set_attn_implementation(attention)
    batch = specimen.batch(5, 9)
    truth = squares_one_by_one(specimen.model.double(), [batch], specimen.loss)
    specimen.model.float()
    for size in (1, 2, 5):
        batches = [{key: value[n : n + size] for key, value in batch.items()} for n in range(0, 5, size)]
        error, name = worst_error(fk.estimate(specimen.model, batches), truth, torch.float32)
        assert error < 1e-4, name
