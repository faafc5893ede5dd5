"""Laws of every estimator, whatever it estimates, and of some kinds of them."""

from __future__ import annotations

from functools import cache
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fishkern as fk
from fishkern.statistics import Held
from tests.support import zoo
from tests.support.closeness import alike
from tests.support.exactness import LIMIT
from tests.support.oracle import worst_error
from tests.support.own_estimators import OWN

pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.matrix,
    pytest.mark.filterwarnings("error:.*slow exact path"),  # a loop obeys most laws by itself
]

V = 5
ESTIMATORS = {
    "empirical": fk.DiagonalFisher(),
    "mc": fk.DiagonalFisher(fisher_type="mc", mc_samples=3, seed=1),
    "type-2": fk.DiagonalFisher(fisher_type="type-2"),
    "position": fk.DiagonalFisher(unit="position"),
    "batch": fk.DiagonalFisher(unit="batch"),
    "batch-mc": fk.DiagonalFisher(fisher_type="mc", unit="batch", mc_samples=3),
    "sketched": fk.SketchedFisher(draws=3),
    "rows": fk.GroupFisher(by="row"),
    "columns": fk.GroupFisher(by="column", fisher_type="mc", seed=1),
    "tensors": fk.GroupFisher(by="tensor", fisher_type="type-2"),
    "layers": fk.GroupFisher(by="layer"),
    "words": fk.GroupFisher(by=lambda name: "norms" if "norm" in name else "others"),
    "kronecker": fk.DiagonalKronecker(),
    "directions": fk.DirectionEnergy(importance="kronecker"),
    "inputs": fk.InputNorms(),
    "power": fk.DirectionEnergy(basis="power", importance="exact", layers_per_pass=1),
    **OWN,
}
DRAWING = {"mc", "batch-mc", "sketched", "columns"}
MIXING = {"batch", "batch-mc", "sketched"}  # an example's gradient meets those of its batch before the square
every_estimator = pytest.mark.parametrize("kind", ESTIMATORS)


def of(*kinds: str):
    return pytest.mark.parametrize("kind", [kind for kind in ESTIMATORS if kind in kinds])


def tiny_lm() -> nn.Module:
    sizes = dict(hidden_size=8, intermediate_size=10, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    return zoo.llama(vocab_size=V, initializer_range=0.4, tie_word_embeddings=True, **sizes).model


def text(N: int = 5, T: int = 5, seed: int = 0) -> dict:
    batch = zoo.text_batch(N, T, seed=seed)
    labels = batch["labels"]
    return {**batch, "input_ids": batch["input_ids"] % V, "labels": torch.where(labels < 0, labels, labels % V)}


def widened(batch: dict, extra: int) -> dict:
    """More padding on the right, with garbage in it."""
    fill = {"input_ids": V - 1, "attention_mask": 0, "labels": -100}
    return {key: F.pad(value, (0, extra), value=fill[key]) for key, value in batch.items()}


def rows(batch: dict, *wanted: int) -> dict:
    return {key: value[torch.tensor(wanted)] for key, value in batch.items()}


def next_token_losses(model: nn.Module, batch: dict) -> torch.Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    nll = F.cross_entropy(logits.mT, batch["labels"][:, 1:], reduction="none")
    return nll.sum(1) / (batch["labels"][:, 1:] >= 0).sum(1)


def estimated(kind: str, model: nn.Module, batches: list, **options) -> Held:
    """Factors are asked of linear weights alone; all other estimators take their own parameters."""
    linear = None if kind != "factors" else lambda name, one: one.ndim == 2 and ".layers." in name
    return fk.estimate(model, batches, ESTIMATORS[kind], parameters=linear, **options)


def two_batches() -> list[dict]:
    return [text(3), text(2, seed=1)]


@cache
def of_two_batches(kind: str) -> Held | fk.Statistics:
    """What most laws compare with, so it is made once; a test's own model begins with the same seed."""
    torch.manual_seed(0)
    return estimated(kind, tiny_lm(), two_batches())


@cache
def of_one_batch(kind: str) -> Held | fk.Statistics:
    """That of ``text()``."""
    torch.manual_seed(0)
    return estimated(kind, tiny_lm(), [text()])


def tensors_of(result) -> dict:
    """Every tensor of a result, by entry: one for each name, or the several parts of energies."""
    return dict(result.blocks) if isinstance(result, Held) else result


def assert_same(actual, expected, factor: float = 1.0) -> None:
    truth = {entry: factor * value.double() for entry, value in tensors_of(expected).items()}
    error, name = worst_error(tensors_of(actual), truth, torch.float32)
    assert error < LIMIT[torch.float32], f"{name}: relative error {error:.1e}"


def test_every_kind_of_estimator_is_in_this_suite():
    kinds = {kind for kind in fk.Estimator.__subclasses__() if kind.__module__.startswith("fishkern.")}
    assert kinds | {type(own) for own in OWN.values()} == {type(estimator) for estimator in ESTIMATORS.values()}


@pytest.mark.parametrize("sizes", [(1,) * 5, (3, 2), (2, 1, 2)], ids=str)
@of(*ESTIMATORS.keys() - MIXING)
def test_the_batch_size_does_not_matter(kind, sizes):
    """Draws belong to the place of an example in the data, so they do not depend on batching either."""
    model, batch = tiny_lm(), text()
    batches = [rows(batch, *part) for part in torch.arange(5).split(list(sizes))]
    assert_same(estimated(kind, model, batches), of_one_batch(kind))


@of(*ESTIMATORS.keys() - DRAWING)
def test_the_order_of_the_data_does_not_matter(kind):
    model, batch = tiny_lm(), text(6)
    one = estimated(kind, model, [rows(batch, 0, 1, 2), rows(batch, 3, 4, 5)])
    other = estimated(kind, model, [rows(batch, 4, 5, 3), rows(batch, 2, 0, 1)])
    assert_same(one, other)


@pytest.mark.parametrize("extra", [1, 13])
@every_estimator
def test_padding_on_the_right_does_not_matter(kind, extra):
    wide = [widened(batch, extra) for batch in two_batches()]
    assert_same(estimated(kind, tiny_lm(), wide), of_two_batches(kind))


@of("empirical", "position", "batch", "sketched")
def test_a_loss_scaled_by_c_scales_the_statistic_by_its_square(kind):
    model, batch = tiny_lm(), text()
    plain = estimated(kind, model, [batch], likelihood=next_token_losses)
    scaled = estimated(kind, model, [batch], likelihood=lambda model, batch: 3 * next_token_losses(model, batch))
    assert_same(scaled, plain, 9)
    assert_same(plain, estimated(kind, model, [batch]))


@every_estimator
def test_statistics_of_parts_merge_into_their_weighted_mean(kind):
    model, parts = tiny_lm(), [text(3), text(2, seed=1), text(1, seed=2)]
    a, b = estimated(kind, model, parts[:2]), estimated(kind, model, parts[2:])
    merged = fk.merge(a, b)
    assert merged.count == a.count + b.count
    ours, theirs = tensors_of(a), tensors_of(b)
    assert_same(
        merged, {name: (a.count * ours[name].double() + b.count * theirs[name]) / merged.count for name in ours}
    )
    if kind not in DRAWING:
        whole = estimated(kind, model, parts)
        assert whole.count == merged.count
        assert_same(merged, whole)


@pytest.mark.parametrize("first", [False, True], ids=["last", "first"])
@of(
    *ESTIMATORS.keys() - {"factors", "kronecker", "directions", "power", "inputs"}
)  # inputs are there without a gradient
def test_examples_without_gradient_change_only_the_count(kind, first):
    """The answer of such an example is empty, and ``sum`` gives it the loss 0."""
    if first and kind in DRAWING:
        pytest.skip("the draws of the others would move to other places")
    model, batch = tiny_lm(), text()
    empty = {**text(2, seed=3), "labels": torch.full((2, 5), -100)}
    likelihood = fk.CausalLM(reduction="sum")
    without = estimated(kind, model, [batch], likelihood=likelihood)
    batches = [empty, batch] if first else [batch, empty]
    with_empty = estimated(kind, model, batches, likelihood=likelihood)
    assert (without.count, with_empty.count) == ((1, 2) if kind.startswith("batch") else (5, 7))
    assert_same(with_empty, without, without.count / with_empty.count)


@every_estimator
def test_saving_and_loading_changes_nothing(kind, tmp_path):
    statistics = of_one_batch(kind)
    statistics.save(tmp_path / "fisher")
    assert type(statistics).load(tmp_path / "fisher") == statistics


@every_estimator
def test_a_lazily_loaded_file_goes_on_where_it_stopped(kind, tmp_path):
    """Shards that stay on disk merge with what a second pass adds."""
    model, first, second = tiny_lm(), [text(3)], [text(2, seed=1)]
    one, other = estimated(kind, model, first), estimated(kind, model, second)
    path = one.save(tmp_path / "fisher", max_shard_size=1024)
    on_disk = type(one).load(path, lazy=True)
    assert fk.merge(on_disk, other) == fk.merge(one, other)


@pytest.mark.parametrize("reentrant", [True, False])
@of(*ESTIMATORS.keys() - {"batch", "batch-mc"})
def test_activation_checkpointing_does_not_matter(kind, reentrant):
    model = tiny_lm().train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(estimated(kind, model, two_batches()), of_two_batches(kind))


@of(*ESTIMATORS.keys() - MIXING)
def test_the_self_check_changes_nothing(kind):
    assert_same(estimated(kind, tiny_lm(), two_batches(), check=False), of_two_batches(kind))


@every_estimator
def test_the_same_recipe_on_the_same_batches_gives_the_same_bits(kind):
    model = tiny_lm()
    assert estimated(kind, model, two_batches()) == estimated(kind, model, two_batches())


@every_estimator
def test_a_prepared_pass_gives_the_same_as_a_fresh_one(kind):
    """At new weights, on the data that it was prepared on and on others."""
    model, batches = tiny_lm(), [text(3), text(2, seed=1)]
    for batch in batches:  # at the first position, of which attention has no choice, queries get nothing but rounding
        batch["labels"][:, 1] = -100
    linear = {"parameters": lambda name, one: one.ndim == 2 and ".layers." in name} if kind == "factors" else {}
    prepared = fk.prepare(model, batches[0], ESTIMATORS[kind], **linear)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    for data in (batches, batches[::-1]):
        assert alike(fk.estimate(model, data, prepared=prepared), estimated(kind, model, data))


@pytest.mark.parametrize(
    "recipe", [lambda seed: fk.DiagonalFisher(fisher_type="mc", seed=seed), lambda seed: fk.SketchedFisher(2, seed)]
)
def test_another_seed_draws_other_numbers(recipe):
    model, batch = tiny_lm(), text()
    one, other = (fk.estimate(model, [batch], recipe(seed)) for seed in (0, 1))
    assert not any(torch.equal(one[name], other[name]) for name in one)
    assert fk.merge(one, other).count == 10


def classifier() -> tuple[nn.Module, tuple]:
    return perceptron(3), (3 * torch.randn(4, 3), torch.tensor([0, 0, 0, 0]))


def lm_case() -> tuple[nn.Module, dict]:
    return tiny_lm(), text(2, 3)


@pytest.mark.parametrize(
    "case, likelihood", [(classifier, fk.Classification()), (lm_case, None)], ids=["classifier", "causal-lm"]
)
@pytest.mark.parametrize("sketch", [False, True], ids=["mc to type-2", "sketched to empirical"])
def test_many_draws_converge(case, likelihood, sketch):
    """Means over seeds are within six of their standard errors of the truth; the other Fisher is not."""
    model, batch = case()
    empirical, type_2 = (estimated(kind, model, [batch], likelihood=likelihood) for kind in ("empirical", "type-2"))
    truth, other = (empirical, type_2) if sketch else (type_2, empirical)
    seeds = range(24)
    recipes = (
        fk.SketchedFisher(16, seed) if sketch else fk.DiagonalFisher("mc", mc_samples=16, seed=seed) for seed in seeds
    )
    found = [fk.estimate(model, [batch], recipe, likelihood=likelihood, check=False) for recipe in recipes]
    told_apart = False
    for name in truth:
        values = torch.stack([statistics[name].double() for statistics in found])
        rounding = LIMIT[torch.float32] * truth[name].max()
        allowed = 6 * values.std(0) / len(seeds) ** 0.5 + rounding
        assert ((values.mean(0) - truth[name]).abs() <= allowed).all(), name
        told_apart |= bool(((values.mean(0) - other[name]).abs() > allowed).any())
    assert told_apart


class Mixer(nn.Module):
    """Logits ``[N, T, C]``, each of which depends on the positions before it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(V, 4), nn.Linear(4, 4, bias=False)

    def forward(self, input):
        return self.head(self.embed(input).cumsum(1).tanh())


class Reader(Mixer):
    def forward(self, input):
        start_logits, end_logits, *_ = super().forward(input).unbind(-1)
        return SimpleNamespace(start_logits=start_logits, end_logits=end_logits)


def perceptron(D: int) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, D))


def categorical(logits, counted=None):
    """Probability, loss and number of positions of every joint labelling; ``logits [L, C]``."""
    logits = logits if counted is None else logits[counted]
    for labels in product(range(logits.shape[1]), repeat=len(logits)):
        nll = F.cross_entropy(logits, torch.tensor(labels), reduction="sum")
        yield (-nll).exp(), nll, len(logits)


def bernoulli(logits):
    for labels in product((0.0, 1.0), repeat=len(logits)):
        nll = F.binary_cross_entropy_with_logits(logits, torch.tensor(labels).to(logits), reduction="sum")
        yield (-nll).exp(), nll, len(logits)


def gaussian(means):
    """The points ``f +- sqrt(1/2)`` have the moments of N(f, 1/2) that a squared gradient takes, which are two."""
    for signs in product((-1.0, 1.0), repeat=len(means)):
        drawn = means.detach() + torch.tensor(signs).to(means) * 0.5**0.5
        yield torch.tensor(0.5 ** len(means)), (means - drawn).square().sum(), len(means)


def next_tokens(model, row):
    logits = model(input_ids=row["input_ids"], attention_mask=row["attention_mask"]).logits[0, :-1]
    return categorical(logits, row["labels"][0, 1:] >= 0)


def every_label(model, row):
    return categorical(model(row["input"])[0], row["labels"][0] >= 0)


def start_and_end(model, row):
    outputs = model(row["input"])
    return categorical(torch.cat([outputs.start_logits, outputs.end_logits]))


RAGGED = {
    "input": torch.tensor([[1, 2, 0], [4, 4, 3], [0, 1, 2]]),
    "labels": torch.tensor([[1, -100, 0], [2, 1, 0], [-100, -100, 1]]),
}
SPANS = {"input": RAGGED["input"], "start_positions": RAGGED["input"][:, 2] % 3, "end_positions": torch.ones(3).long()}
FEATURES = {"input": torch.linspace(-2, 2, 12).view(4, 3).double()}
# model, likelihood, batch, every outcome of one row, backward passes
CASES = {
    "causal-lm": (tiny_lm, fk.CausalLM, text(3, 3), next_tokens, 2 * V),
    "token": (Mixer, fk.TokenClassification, RAGGED, every_label, 12),
    "answer": (Reader, fk.QuestionAnswering, SPANS, start_and_end, 6),
    "class": (lambda: perceptron(4), fk.Classification, FEATURES, lambda m, r: categorical(m(r["input"])), 4),
    "multi-label": (lambda: perceptron(3), fk.MultiLabel, FEATURES, lambda m, r: bernoulli(m(r["input"])[0]), 3),
    "regression": (lambda: perceptron(2), fk.Regression, FEATURES, lambda m, r: gaussian(m(r["input"])[0]), 2),
}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("case", CASES)
def test_type_2_is_the_expectation_over_all_joint_labels(case, reduction):
    """The gradient of each label is squared first and weighted by the label's probability afterwards."""
    make, likelihood, batch, outcomes, _ = CASES[case]
    model = make().double().eval()
    estimated = fk.estimate(model, [batch], ESTIMATORS["type-2"], likelihood=likelihood(reduction))
    truth = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    N = estimated.count
    for n in range(N):
        for p, loss, positions in outcomes(model, rows(batch, n)):
            loss = loss / positions if reduction == "mean" else loss
            grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True)
            for value, grad in zip(truth.values(), grads, strict=True):
                value += 0 if grad is None else p.detach() / N * grad.square()
    error, name = worst_error(estimated, truth)
    assert error < LIMIT[torch.float64], f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("case", CASES)
def test_too_many_label_passes_are_refused_with_their_number(case):
    make, likelihood, batch, _, passes = CASES[case]
    model = make().double()
    with pytest.raises(ValueError, match=rf"\b{passes} backward passes.*max_label_passes={passes - 1}\b"):
        fk.estimate(model, [batch], fk.DiagonalFisher("type-2", max_label_passes=passes - 1), likelihood=likelihood())
    fk.estimate(model, [batch], fk.DiagonalFisher("type-2", max_label_passes=passes), likelihood=likelihood())
