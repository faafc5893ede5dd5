"""Losses with a weight for each token, and of rewards: equal to the loop over examples, also in packed rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fishkern as fk
from fishkern.statistics.batches import Examples
from tests.models.test_packed import ROWS, Document, Wide, documents, flat, in_rows, made, worst
from tests.support import zoo

transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.matrix, pytest.mark.filterwarnings("error:.*take the slow exact path")]


def weights_of(tokens: Tensor) -> Tensor:
    """A weight for each token, by its number, so that it goes with it into any batch; 0 for some."""
    return (tokens % 5).double() / 2


def token_losses(model: nn.Module, batch: dict, *, at_label: bool = False) -> tuple[Tensor, Tensor]:
    """Losses and weights of all tokens, where they are predicted or where they are."""
    inputs = {key: batch[key] for key in ("input_ids", "position_ids", "attention_mask") if key in batch}
    logits, labels = model(**inputs, use_cache=False).logits[:, :-1], batch["labels"][:, 1:]
    losses, weights = F.cross_entropy(logits.mT, labels, reduction="none"), batch["weights"][:, 1:]
    pad = (1, 0) if at_label else (0, 1)
    return F.pad(losses, pad), F.pad(weights * (labels != -100), pad)


def weighted_sum(model: nn.Module, batch: dict) -> Tensor:
    losses, weights = token_losses(model, batch)
    return losses * weights


def at_labels(model: nn.Module, batch: dict) -> tuple[Tensor, Tensor]:
    return token_losses(model, batch, at_label=True)


def weighed(batch: dict) -> dict:
    return {**batch, "weights": weights_of(batch["input_ids"])}


def padded(docs: list[Document]) -> dict:
    pad = nn.utils.rnn.pad_sequence
    rows = [one for one in docs if one.counts]
    return {
        "input_ids": pad([one.tokens for one in rows], batch_first=True),
        "labels": pad([one.labels for one in rows], batch_first=True, padding_value=-100),
    }


def loop(model: nn.Module, docs: list[Document], *, mean: bool) -> dict[str, Tensor]:
    """The oracle: each document alone, its loss written out token by token."""
    total = {name: torch.zeros_like(one) for name, one in model.named_parameters()}
    rows = [one for one in docs if one.counts]
    for one in rows:
        log_p = model(input_ids=one.tokens[None], use_cache=False).logits[0].log_softmax(-1)
        counted = [t for t in range(1, len(one.tokens)) if one.labels[t] != -100]
        weights = [weights_of(one.tokens[t]) for t in counted]
        loss = -sum(weight * log_p[t - 1, one.labels[t]] for weight, t in zip(weights, counted, strict=True))
        loss = loss / sum(weights) if mean else loss
        for name, grad in zip(total, torch.autograd.grad(loss, list(model.parameters())), strict=True):
            total[name] += grad.square()
    return {name: value / len(rows) for name, value in total.items()}


BATCHES = {
    "padded": lambda docs: [padded(docs)],
    "flattened": lambda docs: [flat(docs)],
    "rows": lambda docs: [in_rows(docs, ROWS)],  # where the first token of a document keeps its label
    "two batches": lambda docs: [flat(docs[:3]), flat(docs[3:])],
    "alone": lambda docs: [padded([one]) for one in docs if one.counts],
}


@pytest.mark.parametrize("function", [weighted_sum, token_losses, at_labels])
@pytest.mark.parametrize("batches", BATCHES)
def test_equals_the_loop_over_documents(batches, function):
    docs, model = documents(), made()
    data = [weighed(one) for one in BATCHES[batches](docs)]
    statistics = fk.estimate(model, data, Wide(), likelihood=fk.TokenLosses(function))
    assert worst(statistics, loop(model, docs, mean=function is not weighted_sum)) < 1e-10


def test_rows_are_the_examples_of_a_plain_function():
    """Packed or not: one loss for each row, whatever documents are in it."""
    docs, model = documents(), made()
    batch = weighed(in_rows(docs, ROWS))

    def rows(model: nn.Module, batch: dict) -> Tensor:
        return weighted_sum(model, batch).sum(1)

    statistics = fk.estimate(model, [batch], Wide(), likelihood=rows)
    total = {name: torch.zeros_like(one) for name, one in model.named_parameters()}
    for n in range(len(ROWS)):
        one = {key: value[n : n + 1] for key, value in batch.items()}
        for name, grad in zip(total, torch.autograd.grad(rows(model, one)[0], list(model.parameters())), strict=True):
            total[name] += grad.square() / len(ROWS)
    assert worst(statistics, total) < 1e-10


def test_verify_and_prepare():
    docs, model, likelihood = documents(), made(), fk.TokenLosses(token_losses)
    batches = [weighed(flat(docs[:3])), weighed(in_rows(docs, [(3, 4), (5, 6)]))]
    report = fk.verify(model, batches, likelihood=likelihood)
    assert report.ok, report
    assert report.examples == 6
    prepared = fk.prepare(model, batches[0], likelihood=likelihood)
    statistics = fk.estimate(model, batches, prepared=prepared)
    assert statistics == fk.estimate(model, batches, likelihood=likelihood)
    assert statistics.provenance["definition"]["likelihood"] == "function token_losses, of each token"


def test_other_documents_that_a_loss_reads_are_seen():
    """By the tokens themselves the first one of a document is predicted out of the one before."""

    def of_tokens(model: nn.Module, batch: dict) -> Tensor:
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        return F.pad(F.cross_entropy(logits[:, :-1].mT, batch["input_ids"][:, 1:], reduction="none"), (1, 0))

    with pytest.raises(ValueError, match="does not keep documents apart"):
        fk.estimate(made(), [weighed(flat(documents()))], likelihood=fk.TokenLosses(of_tokens))


def test_a_cache_that_hides_the_documents_is_named():
    def cached(model: nn.Module, batch: dict) -> Tensor:
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits[:, :-1]
        return F.pad(F.cross_entropy(logits.mT, batch["labels"][:, 1:], reduction="none"), (0, 1))

    model = made()
    with pytest.raises(ValueError, match="does not keep documents apart.*call it with use_cache=False"):
        fk.estimate(model, [weighed(flat(documents()))], likelihood=fk.TokenLosses(cached))
    assert not model._forward_pre_hooks


@pytest.mark.parametrize(
    ("function", "got"),
    [
        (lambda model, batch: weighted_sum(model, batch)[:, 1:], r"\(1, 38\)"),
        (lambda model, batch: weighted_sum(model, batch).sum(1), r"\(1,\)"),
        (lambda model, batch: (weighted_sum(model, batch), 1.0), "float"),
    ],
    ids=["shifted", "of rows", "one weight"],
)
def test_other_shapes_are_refused(function, got):
    with pytest.raises(ValueError, match=rf"a loss for each token, \[1, 39\], those of the packed rows, .* got {got}"):
        fk.estimate(made(), [weighed(flat(documents()))], likelihood=fk.TokenLosses(function))


def test_what_is_refused():
    with pytest.raises(TypeError, match="function must be"):
        fk.TokenLosses("cross_entropy")
    batch = weighed(flat(documents()))
    with pytest.raises(ValueError, match="empirical"):
        fk.estimate(made(), [batch], fk.DiagonalFisher("mc"), likelihood=fk.TokenLosses(weighted_sum))
    with pytest.raises(ValueError, match="'weights' is of shape"):
        fk.estimate(made(), [{**batch, "weights": torch.ones(7)}], likelihood=fk.TokenLosses(weighted_sum))


@pytest.mark.parametrize("named", [False, True])
def test_a_model_of_rewards(named):
    """One output for each text, trained by the squared error to its reward."""
    torch.manual_seed(0)
    config = zoo.llama().model.config
    config.num_labels, config.pad_token_id, config.problem_type = 1, 0, None
    model = transformers.LlamaForSequenceClassification(config).double().eval()
    batch = zoo.text_batch(5, 7)
    batch["labels"] = torch.randn(5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    total = {name: torch.zeros_like(one) for name, one in model.named_parameters()}
    for n in range(5):
        one = {key: batch[key][n : n + 1] for key in ("input_ids", "attention_mask")}
        loss = (model(**one).logits[0, 0] - batch["labels"][n]) ** 2
        for name, grad in zip(total, torch.autograd.grad(loss, list(model.parameters())), strict=True):
            total[name] += grad.square() / 5
    options = {"likelihood": fk.Regression()} if named else {}
    statistics = fk.estimate(model, [batch], Wide(), **options)
    assert worst(statistics, total) < 1e-10


def test_weights_of_another_shape_are_refused():
    """One weight for each row would make the mean a sum."""

    def of_rows(model: nn.Module, batch: dict) -> tuple[Tensor, Tensor]:
        losses, weights = token_losses(model, batch)
        return losses, weights[:, :1]

    with pytest.raises(ValueError, match=r"this shape; got weights \(6, 1\)"):
        fk.estimate(made(), [weighed(padded(documents()))], likelihood=fk.TokenLosses(of_rows))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_not_in_16_bits(dtype):
    """Of 700 weights of a third, bfloat16 sums lose more than a thousandth, and losses of 200 overflow float16."""

    def of_16_bits(model: nn.Module, batch: dict) -> tuple[Tensor, Tensor]:
        losses = model.weight.expand(1, 700) * 200
        return losses.to(dtype), torch.full((1, 700), 1 / 3, dtype=dtype)

    model, batch = nn.Linear(1, 1, bias=False), Examples({"x": torch.ones(1, 1)}, 1, range(1))
    nn.init.ones_(model.weight)
    loss = fk.TokenLosses(of_16_bits)(model, batch)
    assert loss.dtype is torch.float32
    torch.testing.assert_close(loss, torch.tensor([200.0]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("padding", [False, True], ids=["a document without labels", "padding"])
def test_losses_that_would_count_nowhere_are_refused(padding):
    docs = documents()
    if not padding:
        docs[1].labels[:] = -100
    batch = weighed(in_rows(docs, ROWS) if padding else flat(docs))
    batch["more"] = torch.zeros(batch["labels"].shape)
    batch["more"][(1, slice(17, None)) if padding else (0, slice(7, 11))] = 1

    def with_more(model: nn.Module, batch: dict) -> Tensor:
        return weighted_sum(model, batch) + batch["more"]

    place = "position 17 of row 1" if padding else "position 7 of row 0"
    with pytest.raises(ValueError, match=f"gives a loss to {place} .* so it would count nowhere"):
        fk.estimate(made(), [batch], likelihood=fk.TokenLosses(with_more))


def test_a_function_that_reads_weights_and_no_labels():
    """In a part of several rows the labels of other documents are -100, and their weights stay."""
    docs, model = documents(), made()
    batch = weighed(in_rows(docs, ROWS))
    batch["weights"] = batch["weights"] * ((batch["labels"] != -100) & (batch["position_ids"] != 0))

    def by_weights(model: nn.Module, batch: dict) -> tuple[Tensor, Tensor]:
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[:, :-1]
        losses = F.cross_entropy(logits.mT, batch["input_ids"][:, 1:], reduction="none")
        return F.pad(losses, (0, 1)), F.pad(batch["weights"][:, 1:], (0, 1))

    statistics = fk.estimate(model, [batch], Wide(), likelihood=fk.TokenLosses(by_weights))
    assert worst(statistics, loop(model, docs, mean=True)) < 1e-10
