"""The likelihood of preference pairs: its losses by the published formulas, its draws, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fishkern as fk
from fishkern.statistics import PairLogps
from fishkern.statistics.preference_losses import orpo_losses
from tests.support import zoo
from tests.support.oracle import worst_error
from tests.support.pairs import Pair, Wide, collated, interleaved, pairs, rows_alone

pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("error:.*take the slow exact path")

BETA = 0.3


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return zoo.llama().model.double().eval()


def ratios(model: nn.Module, pair: Pair) -> tuple[Tensor, Tensor]:
    chosen, rejected = rows_alone(model, pair)
    return chosen - pair.reference[0], rejected - pair.reference[1]


def sigmoid(z: Tensor) -> Tensor:
    return 1 / (1 + (-z).exp())


def dpo(model: nn.Module, pair: Pair) -> Tensor:
    chosen, rejected = ratios(model, pair)
    return -sigmoid(BETA * (chosen - rejected)).log()


def dpo_with_margin(model: nn.Module, pair: Pair) -> Tensor:
    chosen, rejected = ratios(model, pair)
    return -sigmoid(BETA * (chosen - rejected) - 0.7).log()


def without_reference(model: nn.Module, pair: Pair) -> Tensor:
    chosen, rejected = rows_alone(model, pair)
    return -sigmoid(BETA * (chosen - rejected)).log()


def ipo(model: nn.Module, pair: Pair) -> Tensor:
    chosen, rejected = ratios(model, pair)
    return (chosen / len(pair.chosen) - rejected / len(pair.rejected) - 1 / (2 * BETA)) ** 2


def hinge(model: nn.Module, pair: Pair) -> Tensor:
    chosen, rejected = ratios(model, pair)
    return torch.clamp(1 - BETA * (chosen - rejected), min=0)


def simpo(model: nn.Module, pair: Pair) -> Tensor:
    chosen, rejected = rows_alone(model, pair)
    return -sigmoid(BETA * (chosen / len(pair.chosen) - rejected / len(pair.rejected)) - 0.7).log()


def orpo(model: nn.Module, pair: Pair) -> Tensor:
    chosen, rejected = rows_alone(model, pair)
    p, q = (chosen / len(pair.chosen)).exp(), (rejected / len(pair.rejected)).exp()
    return -p.log() - BETA * sigmoid((p / (1 - p)).log() - (q / (1 - q)).log()).log()


def own(logps: PairLogps, beta: float) -> Tensor:
    """SPPO's hard form, of a user."""
    chosen, rejected = logps.log_ratios
    return (chosen - 0.5 / beta).square() + (rejected + 0.5 / beta).square()


def own_alone(model: nn.Module, pair: Pair) -> Tensor:
    chosen, rejected = ratios(model, pair)
    return (chosen - 0.5 / BETA) ** 2 + (rejected + 0.5 / BETA) ** 2


CASES = {
    "sigmoid": (fk.Preference(BETA), dpo),
    "sigmoid with a margin": (fk.Preference(BETA, margin=0.7), dpo_with_margin),
    "without a reference": (fk.Preference(BETA, reference_logps=None), without_reference),
    "ipo": (fk.Preference(BETA, loss="ipo"), ipo),
    "hinge": (fk.Preference(BETA, loss="hinge"), hinge),
    "simpo": (fk.Preference(BETA, loss="simpo", margin=0.7), simpo),
    "orpo": (fk.Preference(BETA, loss="orpo"), orpo),
    "a function": (fk.Preference(BETA, loss=own), own_alone),
}


def squares_alone(model: nn.Module, loss, data: list[Pair]) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    total = {name: torch.zeros_like(one) for name, one in parameters.items()}
    for pair in data:
        for name, grad in zip(parameters, torch.autograd.grad(loss(model, pair), parameters.values()), strict=True):
            total[name] += grad.square() / len(data)
    return total


@pytest.mark.parametrize("case", CASES)
def test_losses_are_those_of_the_papers(case, model):
    likelihood, alone = CASES[case]
    data = pairs()
    losses = likelihood.predictive(model, collated(data)).losses()
    torch.testing.assert_close(losses, torch.stack([alone(model, one) for one in data]), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_statistics_are_those_of_the_pairs_alone(case, model):
    likelihood, alone = CASES[case]
    data = pairs()
    wide = fk.estimate(model, [collated(data)], Wide(), likelihood=likelihood)
    assert worst_error(wide, squares_alone(model, alone, data))[0] < 1e-10


@pytest.mark.parametrize("loss", ["simpo", "ipo"])
def test_means_are_over_the_tokens_that_are_predicted(loss, model):
    """Nothing predicts the first token of a row, which without a prompt is one of the answer."""
    data = [Pair([], one.prompt + one.chosen, one.rejected + one.prompt, one.reference) for one in pairs()]
    losses = fk.Preference(BETA, loss=loss).predictive(model, collated(data)).losses()

    def mean(text: list[int]) -> Tensor:
        log_p = model(input_ids=torch.tensor([text])).logits[0, :-1].log_softmax(-1)
        return log_p.gather(1, torch.tensor(text[1:])[:, None]).mean()

    for one, found in zip(data, losses, strict=True):
        chosen, rejected = mean(one.chosen), mean(one.rejected)
        expected = -sigmoid(BETA * (chosen - rejected)).log()
        if loss == "ipo":
            chosen = chosen - one.reference[0] / (len(one.chosen) - 1)
            rejected = rejected - one.reference[1] / (len(one.rejected) - 1)
            expected = (chosen - rejected - 1 / (2 * BETA)) ** 2
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("log_p", [-1e-5, -1e-3, -0.5, -3.0])
def test_orpo_of_an_answer_that_is_nearly_certain(log_p):
    """In float32 the odds ratio keeps its digits where p is nearly one."""

    def grad(dtype: torch.dtype) -> Tensor:
        chosen = torch.tensor([log_p], dtype=dtype, requires_grad=True)
        ones, zeros = torch.ones(1, dtype=dtype), torch.zeros(1, dtype=dtype)
        orpo_losses(PairLogps(chosen, torch.full_like(ones, -0.7), zeros, zeros, ones, ones), 0.5).sum().backward()
        return chosen.grad.double()

    torch.testing.assert_close(grad(torch.float32), grad(torch.float64), rtol=1e-5, atol=0)


@pytest.mark.parametrize("rows", ["halves", "interleaved"])
def test_answers_without_tokens_leave_it_open_whose_rows_are_whose(rows, model):
    """The first two pairs have a gradient in one row each, which fits both orders: the likelihood says which it is."""
    data = pairs()
    data[0] = Pair(data[0].prompt, data[0].chosen, [], data[0].reference)
    data[1] = Pair(data[1].prompt, [], data[1].rejected, data[1].reference)
    together = interleaved if rows == "interleaved" else collated
    statistics = fk.estimate(model, [together(data)], likelihood=fk.Preference(BETA, rows=rows))
    assert {one.path for one in statistics.coverage.values()} == {"fused"}
    wide = fk.estimate(model, [together(data)], Wide(), likelihood=fk.Preference(BETA, rows=rows))
    assert worst_error(wide, squares_alone(model, dpo, data))[0] < 1e-10


def test_refused_marks_and_models(model):
    batch, likelihood = collated(pairs()), fk.Preference(BETA)
    with pytest.raises(ValueError, match="has 'shift_labels' as well"):
        fk.estimate(model, [{**batch, "shift_labels": batch["input_ids"]}], likelihood=likelihood)
    with pytest.raises(ValueError, match="mark other tokens"):
        fk.estimate(model, [{**batch, "labels": batch["input_ids"]}], likelihood=likelihood)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    assert fk.estimate(model, [{**batch, "labels": labels}], likelihood=likelihood).count == len(pairs())
    with pytest.raises(ValueError, match="T5ForConditionalGeneration has an encoder and a decoder"):
        fk.estimate(zoo.t5().model.eval(), [batch], likelihood=likelihood)


def test_rows_in_the_wrong_order_are_other_pairs(model):
    """The order of a batch is the user's word, and another word gives another result: the tests above can fail."""
    data = pairs()
    wide = fk.estimate(model, [interleaved(data)], Wide(), likelihood=fk.Preference(BETA))
    assert worst_error(wide, squares_alone(model, dpo, data))[0] > 1e-2


def test_labels_instead_of_a_mask(model):
    batch = collated(pairs())
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    labelled = {**{key: value for key, value in batch.items() if key != "completion_mask"}, "labels": labels}
    one, other = (fk.estimate(model, [each], likelihood=fk.Preference()) for each in (batch, labelled))
    assert one == other


def test_type_2_is_the_expectation_over_which_is_better(model):
    """``E (grad loss)^2 = p (1 - p) (grad z)^2``, here from both of its terms."""
    data = pairs()[:4]
    parameters = dict(model.named_parameters())
    total = {name: torch.zeros_like(one) for name, one in parameters.items()}
    for pair in data:
        chosen, rejected = ratios(model, pair)
        z = BETA * (chosen - rejected)
        p = sigmoid(z).item()
        for probability, loss in ((p, -F.logsigmoid(z)), (1 - p, -F.logsigmoid(-z))):
            grads = torch.autograd.grad(loss, parameters.values(), retain_graph=True)
            for name, grad in zip(parameters, grads, strict=True):
                total[name] += probability * grad.square() / len(data)
    wide = fk.estimate(model, [collated(data)], Wide("type-2"), likelihood=fk.Preference(BETA))
    assert worst_error(wide, total)[0] < 1e-6  # LLaMA's norms round gradients of another scale to other float32


def test_draws_are_of_which_is_better(model):
    """They depend on a pair's place in the data alone, and their mean goes to the expectation."""
    data, likelihood = pairs()[:4], fk.Preference(BETA)
    drawn = Wide("mc", mc_samples=40)
    one = fk.estimate(model, [collated(data)], drawn, likelihood=likelihood)
    other = fk.estimate(model, [collated(data[:1]), collated(data[1:])], drawn, likelihood=likelihood)
    assert worst_error(one, other)[0] < 1e-10
    exact = fk.estimate(model, [collated(data)], Wide("type-2"), likelihood=likelihood)
    name = "lm_head.weight"
    assert one[name].sum().item() == pytest.approx(exact[name].sum().item(), rel=0.3)
    assert worst_error(one, exact)[0] > 1e-3


@pytest.mark.parametrize("fisher_type", ["mc", "type-2"])
@pytest.mark.parametrize("loss", ["ipo", "hinge", "orpo", own])
def test_losses_that_are_no_likelihood(loss, fisher_type, model):
    with pytest.raises(ValueError, match="is no likelihood of labels.*take loss='sigmoid' or 'simpo'"):
        fk.estimate(model, [collated(pairs())], fk.DiagonalFisher(fisher_type), likelihood=fk.Preference(loss=loss))


def test_provenance_and_merging(model):
    batch = collated(pairs())
    statistics = {
        key: fk.estimate(model, [batch], likelihood=likelihood, parameters=["lm_head.weight"])
        for key, likelihood in (
            ("dpo", fk.Preference()),
            ("again", fk.Preference(0.1)),
            ("ipo", fk.Preference(loss="ipo")),
            ("none", fk.Preference(reference_logps=None)),
        )
    }
    described = {key: one.provenance["definition"]["likelihood"] for key, one in statistics.items()}
    assert described == {
        "dpo": "Preference(loss='sigmoid', beta=0.1)",
        "again": "Preference(loss='sigmoid', beta=0.1)",
        "ipo": "Preference(loss='ipo', beta=0.1)",
        "none": "Preference(loss='sigmoid', beta=0.1, no reference)",
    }
    assert statistics["dpo"].provenance["runs"][0]["examples"] == len(pairs())
    both = fk.merge(statistics["dpo"], statistics["again"])
    assert both.count == 2 * len(pairs())
    assert worst_error(both, {name: one.double() for name, one in statistics["dpo"].items()})[0] < 1e-6
    with pytest.raises(ValueError, match="only statistics of one definition merge"):
        fk.merge(statistics["dpo"], statistics["ipo"])


def test_reference_by_the_model_itself(model):
    """At the reference, DPO's logit is zero, and each loss is log 2."""
    batch = collated(pairs())
    with torch.no_grad():
        chosen, rejected = fk.Preference().logps(model, batch)
    expected = [torch.stack(rows_alone(model, one)) for one in pairs()]
    torch.testing.assert_close(torch.stack([chosen, rejected], 1), torch.stack(expected), rtol=1e-10, atol=1e-12)
    batch |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    losses = fk.Preference().predictive(model, batch).losses()
    torch.testing.assert_close(losses, torch.full_like(losses, math.log(2)))


def test_entries_by_other_names(model):
    batch = collated(pairs())
    renamed = {key.replace("ref_", "policy_0_"): value for key, value in batch.items()}
    likelihood = fk.Preference(reference_logps=("policy_0_chosen_logps", "policy_0_rejected_logps"))
    assert fk.estimate(model, [renamed], likelihood=likelihood) == fk.estimate(
        model, [batch], likelihood=fk.Preference()
    )


def test_plan_and_prepared(model):
    batch, likelihood = collated(pairs()), fk.Preference()
    plan = fk.plan(model, batch, likelihood=likelihood)
    assert set(plan.paths.values()) == {"fused"}
    assert not [one for one in plan.unknown if "values" in one]
    prepared = fk.prepare(model, batch, likelihood=likelihood)
    reading = fk.estimate(model, [batch], prepared=prepared)
    assert reading == fk.estimate(model, [batch], likelihood=likelihood)


def without(*keys: str) -> dict[str, Tensor]:
    return {key: value for key, value in collated(pairs()).items() if key not in keys}


def test_refused_batches(model):
    batch = collated(pairs())
    T = batch["input_ids"].shape[1]
    cases = {
        "there is no 'ref_rejected_logps'": without("ref_rejected_logps"),
        "need a 'completion_mask' or 'labels'": without("completion_mask"),
        "holds 13 rows, which are no pairs": {key: value[:13] for key, value in batch.items() if "logps" not in key},
        "holds 7 pairs in 14 rows, and 'weights' is of leading size 5": {**batch, "weights": torch.ones(5)},
        "and 'names' is a list": {**batch, "names": ["a"] * 7},
        "'ref_chosen_logps' must be one log-probability for each pair": {
            **batch, "ref_chosen_logps": torch.zeros(7, 3)
        },
        "is packed, and preference pairs are read of rows": {
            **batch, "position_ids": torch.arange(T).remainder(4).expand(14, T)
        },
        "completion_mask must be of the shape of input_ids": {**batch, "completion_mask": torch.ones(14, 3)},
    }  # fmt: skip
    for message, each in cases.items():
        with pytest.raises(ValueError, match=message):
            fk.estimate(model, [each], likelihood=fk.Preference())
    with pytest.raises(ValueError, match="need a 'completion_mask' or 'labels'|holds no preference pairs"):
        fk.estimate(model, [(batch["input_ids"], batch["completion_mask"])], likelihood=fk.Preference())


@pytest.mark.parametrize("key", ["ref_chosen_logps", "completion_mask"])
def test_pairs_without_a_named_likelihood(key, model):
    batch = collated(pairs()) if key == "ref_chosen_logps" else without("ref_chosen_logps", "ref_rejected_logps")
    with pytest.raises(ValueError, match=rf"has '{key}', as batches of preference pairs do.*fishkern.Preference\("):
        fk.estimate(model, [batch])


def test_refused_arguments():
    cases = {
        "loss must be one of 'sigmoid', 'simpo', 'ipo', 'hinge', 'orpo' or a function": {"loss": "kto"},
        "beta must be a positive number": {"beta": 0.0},
        "margin is of the losses 'sigmoid', 'simpo'": {"loss": "ipo", "margin": 1.0},
        "reference_logps names two entries": {"reference_logps": ("one",)},
        "rows must be 'halves' or 'interleaved'": {"rows": "pairs"},
    }
    for message, options in cases.items():
        with pytest.raises(ValueError, match=message):
            fk.Preference(**options)


def test_a_function_with_a_wrong_result(model):
    with pytest.raises(ValueError, match="must return one loss for each pair"):
        likelihood = fk.Preference(loss=lambda logps, beta: logps.chosen.mean())
        fk.estimate(model, [collated(pairs())], likelihood=likelihood)


def test_a_word_for_it(model):
    with pytest.raises(TypeError, match=r"write likelihood=fishkern.Preference\(\)"):
        fk.estimate(model, [collated(pairs())], likelihood="dpo")
