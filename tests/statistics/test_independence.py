"""A loss that depends on other examples or on chance is refused, and the message says on which."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fishkern as fk
from tests.support import zoo

pytestmark = pytest.mark.matrix

PER_EXAMPLE = [fk.DiagonalFisher(), fk.SketchedFisher()]
every_check = pytest.mark.parametrize("check", [True, False])
every_estimator = pytest.mark.parametrize("estimator", PER_EXAMPLE, ids=lambda one: type(one).__name__)


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(5, 4)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x, y):
        return F.normalize(self.a(x), dim=-1), F.normalize(self.b(y), dim=-1)


def contrastive(model: nn.Module, batch: dict) -> Tensor:
    a, b = model(batch["x"], batch["y"])
    return F.cross_entropy(model.scale.exp() * a @ b.T, torch.arange(len(a)), reduction="none")


def pairwise(model: nn.Module, batch: dict) -> Tensor:
    """As SigLIP's: one example alone has a loss, too."""
    a, b = model(batch["x"], batch["y"])
    return F.softplus(-(2 * torch.eye(len(a)) - 1) * (a @ b.T)).sum(1)


def centred(model: nn.Module, batch: dict) -> Tensor:
    a, _ = model(batch["x"], batch["y"])
    return (a - a.mean(0)).square().sum(1)


def spread(model: nn.Module, batch: dict) -> Tensor:
    """Of one example alone there is no spread: NaN."""
    a, _ = model(batch["x"], batch["y"])
    return (a / a.std(0)).sum(1)


def towers(N: int = 4) -> dict:
    return {"x": torch.randn(N, 6), "y": torch.randn(N, 5)}


@every_check
@every_estimator
@pytest.mark.parametrize("losses", [contrastive, pairwise, centred, spread])
def test_examples_that_see_each_other(losses, estimator, check):
    """These once gave zeros, exactly and everywhere, and were verified as right."""
    model = Towers()
    with pytest.raises(ValueError, match="with another example and .* alone: the examples of a batch see each other"):
        fk.estimate(model, [towers()], estimator, likelihood=losses, check=check)
    with pytest.raises(ValueError, match="see each other"):
        fk.verify(model, [towers()], likelihood=losses)
    if losses is not spread:
        assert fk.estimate(model, [towers()], fk.DiagonalFisher(unit="batch"), likelihood=losses).count == 1


@every_check
def test_a_batch_of_two_after_batches_of_one(check):
    model = Towers()
    with pytest.raises(ValueError, match="see each other"):
        fk.estimate(model, [towers(1), towers(2)], likelihood=pairwise, check=check)


DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def classifier(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def labelled(dtype: torch.dtype, N: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, 4, generator=generator).to(dtype), torch.arange(N) % 3


def own(model, batch) -> Tensor:
    logits = model(batch[0])
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), batch[1], reduction="none")


@every_check
@every_estimator
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_loss_that_is_divided_by_the_batch(dtype, estimator, check):
    """In 16 bits it once gave 1/N of the numbers, without a word."""
    with pytest.raises(ValueError, match="the loss is divided by the batch"):
        fk.estimate(
            classifier(DTYPES[dtype]),
            [labelled(DTYPES[dtype])],
            estimator,
            likelihood=lambda model, batch: own(model, batch) / len(batch[1]),
            check=check,
        )


@every_check
def test_a_loss_that_is_divided_by_the_batch_under_autocast(check):
    def losses(model, batch):
        return own(model, batch) / len(batch[1])

    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="divided by the batch"):
        fk.estimate(classifier(torch.float32), [labelled(torch.float32)], likelihood=losses, check=check)


@every_check
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_loss_that_is_divided_by_the_tokens_of_the_batch(dtype, check):
    """As the Trainer divides it; the examples have 7 and 3 tokens."""
    specimen = zoo.llama()
    batch = specimen.batch(2, 8)
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][1, 4:] = -100

    def losses(model, batch):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].float()
        labels = batch["labels"][:, 1:]
        nll = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none")
        return nll.sum(1) / (labels != -100).sum()

    with pytest.raises(ValueError, match="divided by the batch.*tokens"):
        fk.estimate(specimen.model.to(dtype), [batch], likelihood=losses, check=check)


class AlwaysDrops(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.b(F.dropout(torch.tanh(self.a(x)), 0.3))  # training=True is its default


class Remembers(nn.Module):
    def __init__(self, where: str) -> None:
        super().__init__()
        self.a, self.b, self.where, self.queue = nn.Linear(4, 8), nn.Linear(8, 3), where, []
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x):
        h = self.a(x)
        mean = torch.stack(self.queue).mean(0) if self.queue else self.mean
        if self.where == "queue":
            self.queue.append(h.detach().mean(0))
        else:
            self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
        return self.b(torch.tanh(h - mean))


@every_check
def test_a_model_that_keeps_a_queue_is_told_of_a_buffer_in_which_it_is_exact(check):
    options = {"likelihood": fk.Classification(), "check": check}
    with pytest.raises(ValueError, match="depends on earlier runs.*keep state in a buffer"):
        fk.estimate(Remembers("queue"), [labelled(torch.float32)], **options)
    model = Remembers("buffer")
    together = fk.estimate(model, [labelled(torch.float32)], **options)
    assert not model.mean.any()
    inputs, labels = labelled(torch.float32)
    for name, parameter in model.named_parameters():
        square = torch.zeros_like(parameter)
        for x, y in zip(inputs, labels, strict=True):
            model.mean.zero_()
            loss = F.cross_entropy(model(x[None]), y[None])
            square += torch.autograd.grad(loss, parameter)[0].square() / len(labels)
        torch.testing.assert_close(together[name], square, rtol=1e-4, atol=1e-8)


@every_check
@pytest.mark.parametrize("kind", ["empirical", "mc", "type-2"])
def test_a_model_that_draws_in_evaluation_mode(kind, check):
    with pytest.raises(ValueError, match="two runs of it alone: .* draws random numbers in evaluation mode"):
        fk.estimate(
            AlwaysDrops(),
            [labelled(torch.float32)],
            fk.DiagonalFisher(kind),
            likelihood=fk.Classification(),
            check=check,
        )


@pytest.mark.parametrize("kind", ["mc", "type-2"])
@pytest.mark.parametrize("likelihood", [fk.Classification, fk.Regression, fk.MultiLabel])
def test_examples_that_see_each_other_without_labels(likelihood, kind):
    class Centred(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            return y - y.mean(0)

    x = torch.randn(4, 4)
    with pytest.raises(ValueError, match="see each other"):
        fk.estimate(Centred(4, 3), [(x, None)], fk.DiagonalFisher(kind), likelihood=likelihood())


MODELS = [zoo.llama, zoo.gpt2, zoo.bert, zoo.t5, zoo.vit]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_healthy_models_stay_below_half_of_what_is_allowed(make, dtype, monkeypatch):
    """The gaps of a healthy model are those of rounding: with half of the tolerance none is refused."""
    from fishkern.statistics import independence

    monkeypatch.setattr(independence, "_TOLERANCE", {key: value / 2 for key, value in independence._TOLERANCE.items()})
    monkeypatch.setattr(independence, "_ROUNDING", {key: value / 2 for key, value in independence._ROUNDING.items()})
    specimen = make()
    for seed in range(3):
        assert fk.estimate(specimen.model.to(dtype), [_as(specimen.batch(4, seed=seed), dtype)]).count == 4


def _as(batch: dict, dtype: torch.dtype) -> dict:
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}


class ChoosingMoe(nn.Module):
    """One expert for all examples, selected by the batch, so that a row alone may get another."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)])

    def forward(self, x):
        return self.experts[int(len(x) > 1)](x)


@pytest.mark.filterwarnings("ignore:.*slow exact path")
def test_a_module_that_chooses_is_named_and_goes_on():
    model = nn.Sequential(ChoosingMoe())
    with pytest.warns(UserWarning, match="with another example and .* alone: '0' .ChoosingMoe. chooses experts"):
        found = fk.estimate(model, [labelled(torch.float32)], likelihood=fk.Classification())
    assert "ChoosingMoe" in found.provenance["runs"][0]["note"]
    with pytest.raises(ValueError, match="divided by the batch"):  # which no choice explains
        fk.estimate(model, [labelled(torch.float32)], likelihood=lambda model, batch: model[0].experts[0](batch[0]).square().sum(1) / len(batch[0]))  # fmt: skip # noqa: E501


def test_zeros_everywhere_are_told():
    model = nn.Linear(4, 3)

    def losses(model, batch):
        return model(batch[0]).sum(1) * 0.0

    with pytest.warns(UserWarning, match="every entry is exactly zero: no parameter moves this loss"):
        fk.estimate(model, [labelled(torch.float32)], likelihood=losses)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fk.estimate(model, [labelled(torch.float32)], likelihood=fk.Classification())


@every_check
def test_a_contrastive_loss_in_batches_of_one_is_zero_and_told(check):
    """One example alone has no negatives: zero is the correct result, and a user would not expect it."""
    with pytest.warns(UserWarning, match="every entry is exactly zero"):
        found = fk.estimate(Towers(), [towers(1), towers(1)], likelihood=contrastive, check=check)
    assert not any(value.any() for value in found.values())


def test_the_number_of_items_in_the_batch_divides_nothing():
    specimen = zoo.llama()
    batch = specimen.batch(3, 6)
    expected = fk.estimate(specimen.model, [batch])
    with pytest.warns(UserWarning, match="'num_items_in_batch'.* own tokens"):
        found = fk.estimate(specimen.model, [{**batch, "num_items_in_batch": torch.tensor(40)}] * 2)
    torch.testing.assert_close(found["lm_head.weight"], expected["lm_head.weight"])
    assert found.provenance["definition"]["likelihood"] == "CausalLM(reduction='mean'), own tokens"


def _mean_in_bfloat16(model, batch):
    """The mean loss of each example's tokens, under autocast that only the loss function enters."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    labels = batch["labels"][:, 1:]
    losses = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), labels, reduction="none", ignore_index=-100)
    return losses.sum(1) / (labels != -100).sum(1)


@pytest.mark.parametrize("kind", [fk.DiagonalFisher, fk.SketchedFisher])
def test_autocast_inside_the_loss_function_is_no_dependence(kind):
    """Rounding is that of the dtype that modules return, and captured gradients are trusted as in autocast outside."""
    specimen = zoo.llama()
    batches = [specimen.batch(4, seed=seed) for seed in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = fk.estimate(specimen.model, batches, kind(), likelihood=_mean_in_bfloat16)
    assert {one.path for one in found.coverage.values()} == {"fused" if kind is fk.DiagonalFisher else "sketch"}

    def coupled(model, batch):
        losses = _mean_in_bfloat16(model, batch)
        return losses + losses.mean() * (len(losses) - 1)

    with pytest.raises(ValueError, match="see each other"):
        fk.estimate(specimen.model, batches, kind(), likelihood=coupled)
