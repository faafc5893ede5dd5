"""The loss of an example is what the model returns for its row alone."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fishkern as fk
from fishkern.statistics.likelihood import recognise_likelihood
from fishkern.statistics.likelihood_argument import described
from tests.support import zoo
from tests.support.exactness import LIMIT
from tests.support.oracle import row, squares_one_by_one, worst_error

transformers = pytest.importorskip("transformers")

bert = partial(zoo.bert_for, initializer_range=0.3)


def with_labels(labels: torch.Tensor) -> dict:
    return {**zoo.text_batch(), "labels": labels}


def token_classes() -> dict:
    """Ragged rows, and rows of few labels among them."""
    batch = zoo.masked_batch()
    return {**batch, "labels": torch.where(batch["labels"] < 0, -100, batch["labels"] % 3)}


def spans() -> dict:
    batch = zoo.text_batch()
    del batch["labels"]
    return {**batch, "start_positions": torch.tensor([0, 1, 2, 0, 1]), "end_positions": torch.tensor([6, 1, 2, 2, 2])}


def shifted_labels() -> dict:
    batch = zoo.text_batch()
    return {**batch, "shift_labels": F.pad(batch.pop("labels")[:, 1:], (0, 1), value=-100)}


scores, yes_or_no = torch.linspace(-3, 3, 15).view(5, 3), torch.linspace(0, 1, 15).view(5, 3).round()
# model, batch, the likelihood recognised
CASES = {
    "causal-lm": (lambda: zoo.llama(initializer_range=0.3).model, zoo.text_batch, fk.CausalLM),
    "causal-lm, left": (lambda: zoo.gpt2().model, partial(zoo.text_batch, pad="left"), fk.CausalLM),
    "causal-lm, shifted labels": (lambda: zoo.llama(initializer_range=0.3).model, shifted_labels, fk.CausalLM),
    "masked-lm": (lambda: bert("MaskedLM"), zoo.masked_batch, fk.MaskedLM),
    "seq2seq-lm": (lambda: zoo.t5().model, zoo.answer_batch, fk.Seq2SeqLM),
    "sequence classes": (lambda: bert("SequenceClassification", num_labels=3), zoo.class_batch, fk.Classification),
    "image classes": (lambda: zoo.vit().model, zoo.image_batch, fk.Classification),
    "token classes": (lambda: bert("TokenClassification", num_labels=3), token_classes, fk.TokenClassification),
    "answers": (lambda: bert("QuestionAnswering"), spans, fk.QuestionAnswering),
    "one score": (
        lambda: bert("SequenceClassification", num_labels=1), lambda: with_labels(scores[:, 0]), fk.Regression
    ),
    "one score, column": (
        lambda: bert("SequenceClassification", num_labels=1), lambda: with_labels(scores[:, :1]), fk.Regression
    ),
    "three scores": (
        lambda: bert("SequenceClassification", num_labels=3, problem_type="regression"),
        lambda: with_labels(scores),
        fk.Regression,
    ),
    "multi-label": (
        lambda: bert("SequenceClassification", num_labels=3), lambda: with_labels(yes_or_no), fk.MultiLabel
    ),
}  # fmt: skip


def counted(case: str, batch: dict) -> torch.Tensor:
    """How many values the mean of each example is taken over."""
    if case == "answers":
        return torch.full((5,), 2)
    labels = batch["shift_labels"] if "shift_labels" in batch else batch["labels"].reshape(5, -1)
    labels = labels[:, 1:] if case in ("causal-lm", "causal-lm, left") else labels  # no logits speak of the first token
    return (labels != -100).sum(1)


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_losses_are_those_of_the_model_for_each_row_alone(case):
    make, batch, kind = CASES[case]
    torch.manual_seed(0)
    model, batch = make().eval(), batch()
    likelihood = recognise_likelihood(model, batch)
    assert type(likelihood) is kind
    own = torch.stack([model(**row(batch, n)).loss for n in range(5)])
    torch.testing.assert_close(likelihood.predictive(model, batch).losses(), own)
    total = kind(reduction="sum").predictive(model, batch).losses()
    torch.testing.assert_close(total, own * counted(case, batch))


def test_ragged_rows_do_not_share_the_token_mean_of_their_batch():
    """Weighted by its share of the batch's tokens, a row would depend on the others' lengths."""
    specimen = zoo.llama(initializer_range=0.3)
    batch = specimen.batch()
    assert len(set((batch["labels"] >= 0).sum(1).tolist())) > 1
    whole, alone = (
        fk.estimate(specimen.model, batches) for batches in ([batch], [row(batch, n) for n in range(5)])
    )  # fmt: skip
    truth = squares_one_by_one(specimen.model, [batch], lambda model, row: model(**row).loss)
    for statistics in (whole, alone):
        error, name = worst_error(statistics, truth, torch.float32)
        assert error < LIMIT[torch.float32], name


def test_statistics_of_different_reductions_do_not_merge():
    specimen = zoo.llama()
    batch = specimen.batch()
    mean, total = (fk.estimate(specimen.model, [batch], likelihood=fk.CausalLM(kind)) for kind in ("mean", "sum"))
    with pytest.raises(ValueError, match=r"likelihood.*mean.*sum"):
        fk.merge(mean, total)
    assert fk.merge(mean, fk.estimate(specimen.model, [batch])).count == 10
    with pytest.raises(ValueError, match="reduction must be 'mean' or 'sum', got 'average'"):
        fk.CausalLM(reduction="average")


def classifier() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def features() -> dict:
    return {"input": torch.randn(5, 4).double(), "labels": torch.tensor([0, 2, 1, 1, 0])}


def class_losses(model: nn.Module, batch: dict) -> torch.Tensor:
    return F.cross_entropy(model(batch["input"]), batch["labels"], reduction="none")


@pytest.mark.parametrize("form", ["pair", "list", "mapping", "function"])
def test_a_plain_module_takes_pairs_mappings_and_functions(form):
    model, batch = classifier(), features()
    given = {"pair": (batch["input"], batch["labels"]), "list": [batch["input"], batch["labels"]]}.get(form, batch)
    likelihood = class_losses if form == "function" else fk.Classification()
    statistics = fk.estimate(model, [given], likelihood=likelihood)
    truth = squares_one_by_one(model, [batch], lambda model, row: class_losses(model, row)[0])
    error, name = worst_error(statistics, truth)
    assert error < LIMIT[torch.float64], name


def test_the_function_stands_in_the_provenance():
    statistics = fk.estimate(classifier(), [features()], likelihood=class_losses)
    assert statistics.provenance["definition"]["likelihood"] == "function class_losses"


class WithPenaltyForCausalLM(transformers.LlamaForCausalLM):
    def forward(self, **inputs):
        outputs = super().forward(**inputs)
        if outputs.loss is not None:
            outputs.loss = outputs.loss + 0.01
        return outputs


def penalised() -> nn.Module:
    model = zoo.llama().model
    model.__class__ = WithPenaltyForCausalLM
    return model


def routed() -> nn.Module:
    model = zoo.mixtral("grouped_mm").model
    model.config.output_router_logits = True
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("make", "why"), [(penalised, "auxiliary loss"), (routed, "output_router_logits")])
def test_a_recognised_loss_that_is_not_the_models_raises_with_both_numbers(make, why, dtype):
    model, batch = make().to(dtype), zoo.text_batch()
    with pytest.raises(ValueError, match=rf"^the loss of.*{why}.*name it, likelihood=fishkern.CausalLM\(\)") as raised:
        fk.estimate(model, [batch])
    ours, own = (float(number) for number in re.findall(r"\d+\.\d+", str(raised.value))[:2])
    with torch.no_grad():
        first = model.eval()(**row(batch, 0))
        plain = F.cross_entropy(first.logits[0, :-1].float(), batch["labels"][0, 1:])
    assert (ours, own) == (pytest.approx(plain.item(), rel=1e-5), pytest.approx(first.loss.item(), rel=1e-5))
    assert ours < own


def adaptive() -> nn.Module:
    """AdaLoRA, away from its start of zeros."""
    peft = pytest.importorskip("peft")
    config = peft.AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(zoo.llama().model, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name and parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("make", [penalised, routed, adaptive])
def test_a_named_loss_is_the_users_word(make):
    """Terms that the model adds are left out, with one note."""
    model, batch = make(), zoo.text_batch()
    with pytest.warns(UserWarning, match="by the model itself") as warned:
        statistics = fk.estimate(model, [batch, batch], likelihood=fk.CausalLM())
    notes = [str(one.message) for one in warned if "by the model itself" in str(one.message)]
    assert len(notes) == 1
    assert "CausalLM was named" in notes[0]
    truth = squares_one_by_one(model, [batch], zoo.oracle.next_token)
    error, name = worst_error(statistics, truth, torch.float32)
    assert error < LIMIT[torch.float32], name
    found = fk.verify(model, [batch, batch], statistics, likelihood=fk.CausalLM())
    assert found.ok, found
    with pytest.raises(ValueError, match=r"name it, likelihood=fishkern.CausalLM\(\)"):
        fk.verify(model, [batch, batch], statistics)


def test_adalora_is_refused_by_name_where_nothing_was_named():
    model = adaptive()
    with pytest.raises(ValueError, match=r"AdaLoRA adds its orthogonality term.*likelihood=fishkern.CausalLM\(\)"):
        fk.estimate(model, [zoo.text_batch()])
    with pytest.warns(UserWarning, match="AdaLoRA adds"):
        selection = fk.fish_tuning(model, [zoo.text_batch()], density=0.2, likelihood=fk.CausalLM())
    assert selection.count > 0


class BrokenForCausalLM(transformers.LlamaForCausalLM):
    def forward(self, **inputs):
        outputs = super().forward(**inputs)
        if outputs.loss is not None:
            outputs.loss = outputs.loss * torch.nan
        return outputs


def test_a_models_own_loss_that_is_not_finite_is_told_apart():
    model = zoo.llama().model
    model.__class__ = BrokenForCausalLM
    with pytest.raises(ValueError, match="nan by the model itself.*the model's own is not finite, though its logits"):
        fk.estimate(model, [zoo.text_batch()])
    with pytest.warns(UserWarning, match="not finite"):
        assert fk.estimate(model, [zoo.text_batch()], likelihood=fk.CausalLM()).count == 5


def test_a_named_likelihood_that_is_not_the_models_is_noted():
    specimen = zoo.llama()
    with pytest.warns(UserWarning, match="by MaskedLM and .* by the model itself") as warned:
        statistics = fk.estimate(specimen.model, [specimen.batch()], likelihood=fk.MaskedLM())
    assert {one.filename for one in warned if "by MaskedLM" in str(one.message)} == {__file__}
    truth = squares_one_by_one(specimen.model, [specimen.batch()], zoo.oracle.per_token)
    error, name = worst_error(statistics, truth, torch.float32)
    assert error < LIMIT[torch.float32], name


def test_a_subclass_of_a_known_model_is_known():
    specimen = zoo.llama()
    specimen.model.__class__ = type("MyModel", (type(specimen.model),), {})
    statistics = fk.estimate(specimen.model, [specimen.batch()])
    assert statistics.provenance["definition"]["likelihood"].startswith("CausalLM")


def test_a_function_gives_what_the_model_alone_does_not():
    """The way out that the message names."""
    model, batch = penalised().double(), zoo.text_batch()

    def losses(model, batch):
        return torch.stack([model(**row(batch, n)).loss for n in range(batch["input_ids"].shape[0])])

    with pytest.warns(UserWarning, match="slow exact path"):
        statistics = fk.estimate(model, [batch], likelihood=losses)
    truth = squares_one_by_one(model, [batch], lambda model, row: model(**row).loss)
    error, name = worst_error(statistics, truth)
    assert error < LIMIT[torch.float64], name


def test_a_partial_function_is_described_with_what_is_bound():
    """Else statistics of two losses that differ in an argument alone would merge."""

    def losses(model, batch, **options):
        raise AssertionError

    def words(**options) -> str:
        return described(partial(losses, **options))

    name = losses.__qualname__
    assert words(at_label=True, kind="dft") == f"function partial({name}, at_label=True, kind='dft')"
    assert words(weights=torch.ones(3)) == f"function partial({name}, weights=Tensor)"
    assert described(fk.TokenLosses(partial(losses, 2))) == f"function partial({name}, 2), of each token"
