"""A statistic that a user writes outside the package, by the page on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import fishkern as fk
from fishkern.statistics import planning
from fishkern.statistics.base import ParameterInfo, sums
from fishkern.statistics.states import States
from tests.support import zoo
from tests.support.exactness import LIMIT
from tests.support.oracle import row, size, worst_error
from tests.support.own_estimators import GradientNorm, MeanGradient, SquaredFactors

pytest.importorskip("transformers")


@dataclass(frozen=True)
class MeanPower(fk.Estimator):
    """The mean of a power of the gradient, 1 with its sign."""

    power: int = 1

    @property
    def definition(self):
        return {"estimator": "MeanPower", "power": self.power}

    def update_(self, state, grads, parameter, backend=None):
        for n in range(grads.num_examples):
            state += grads.example(n) ** self.power


def singly(specimen: zoo.Specimen, batch: dict, power: int) -> dict[str, torch.Tensor]:
    """The same by a loop over examples."""
    named = dict(specimen.model.eval().named_parameters())
    total = {name: torch.zeros_like(parameter, dtype=torch.float64) for name, parameter in named.items()}
    for n in range(size(batch)):
        grads = torch.autograd.grad(specimen.loss(specimen.model, row(batch, n)), list(named.values()))
        for name, grad in zip(named, grads, strict=True):
            total[name] += grad.double() ** power / size(batch)
    return total


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("check", [True, False], ids=["checked", "unchecked"])
@pytest.mark.parametrize("power", [1, 3])
def test_it_equals_the_loop(power, check, tied):
    """Also where an embedding and a head share their weight, and with a sign."""
    specimen = zoo.llama(tie_word_embeddings=tied)
    batch = zoo.text_batch()
    batches = [{key: value[part] for key, value in batch.items()} for part in (slice(0, 3), slice(3, 5))]
    statistics = fk.estimate(specimen.model, batches, MeanPower(power), check=check)
    truth = singly(specimen, batch, power)
    error, name = worst_error(statistics, truth, torch.float32)
    assert error < LIMIT[torch.float32], f"{name}: relative error {error:.1e}"
    assert {covered.path for covered in statistics.coverage.values()} == {"fused"}
    assert (statistics["model.embed_tokens.weight"] < 0).any()


def test_the_slow_paths_serve_it_as_well():
    """An embedding and a head that share their weight, one of them past its module's call."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(9, 5)

        def forward(self, ids):
            return self.table(ids).mean(1) @ self.table.weight.t()

    torch.manual_seed(0)
    model, ids, labels = Tied(), torch.randint(9, (6, 4)), torch.randint(9, (6,))
    with pytest.warns(UserWarning, match="slow exact path"):
        statistics = fk.estimate(model, [(ids, labels)], MeanPower(), likelihood=fk.Classification())
    loss = nn.functional.cross_entropy(model(ids), labels)
    torch.testing.assert_close(statistics["table.weight"], torch.autograd.grad(loss, model.table.weight)[0])


class PastItsCall(nn.Module):
    """The head multiplies by the table's weight without calling a module."""

    def __init__(self):
        super().__init__()
        self.table, self.inner = nn.Embedding(9, 5), nn.Linear(5, 5)

    def forward(self, ids):
        return self.inner(self.table(ids).mean(1)) @ self.table.weight.t()


class Doubled(MeanGradient):
    """Adds a linear weight's gradient twice, which is not what it says of one gradient."""

    def update_(self, state, grads, parameter, backend=None):
        super().update_(state, grads, parameter)
        if parameter.name == "inner.weight":
            super().update_(state, grads, parameter)

    def of_gradient(self, grad, parameter):
        return super().of_gradient(grad, parameter)


@pytest.mark.parametrize(
    "estimator", [MeanPower(), MeanGradient(), GradientNorm(), fk.GroupFisher(by="tensor")], ids=repr
)
@pytest.mark.parametrize("bytes_at_once", [1, 2**28], ids=["one parameter at a time", "all at once"])
def test_the_self_check_finds_what_goes_past_a_call(estimator, bytes_at_once, monkeypatch):
    """By the estimator's own word of what a gradient adds; without it, by squares of some parameters at a time."""
    monkeypatch.setattr(planning, "_BYTES_OF_SQUARES", bytes_at_once)
    torch.manual_seed(0)
    model, ids, labels = PastItsCall(), torch.randint(9, (6, 4)), torch.randint(9, (6,))
    with pytest.warns(
        UserWarning, match=r"^1 parameter\(s\) take the slow exact path.* table.weight: ordinary autograd"
    ):
        statistics = fk.estimate(model, [(ids, labels)], estimator, likelihood=fk.Classification())
    assert statistics.coverage["inner.weight"].path == "fused"


def test_the_self_check_compares_with_what_the_estimator_says_of_one_gradient():
    model, ids, labels = PastItsCall(), torch.randint(9, (6, 4)), torch.randint(9, (6,))
    with pytest.warns(UserWarning, match="inner.weight: ordinary autograd disagrees"):
        fk.estimate(model, [(ids, labels)], Doubled(), likelihood=fk.Classification())


@pytest.mark.parametrize("estimator, own", [(MeanPower(), False), (GradientNorm(), True)], ids=["squares", "own state"])
def test_the_self_check_holds_one_group_of_squares_or_states_of_its_own_kind(estimator, own, monkeypatch):
    sizes = []

    class Measured(States):
        def __init__(self, parameters, estimator, backend=None):
            super().__init__(parameters, estimator, backend)
            sizes.append(sum(total.nbytes for name in parameters for total in sums(self[name])))

    largest = 4 * 41 * 24  # bytes of the embedding's squares, the largest of the model
    monkeypatch.setattr(planning, "_BYTES_OF_SQUARES", largest)
    monkeypatch.setattr("fishkern.statistics.states.States.of_the_same_kind", lambda self, estimator, names: Measured(
        {name: self.info(name) for name in names}, estimator))  # fmt: skip
    fk.estimate(zoo.llama().model, [zoo.text_batch()], estimator)
    assert (sizes == []) if own else (len(sizes) > 1 and max(sizes) <= largest)


def test_factors_say_which_positions_count():
    """Whatever garbage stands in the padding; without padding there is nothing to say."""
    model, batch = zoo.llama().model, zoo.text_batch()
    counted = []

    class Looking(SquaredFactors):
        reads = "factors"

        def update_(self, state, grads, parameter, backend=None):
            super().update_(state, grads, parameter, backend)
            counted.append(grads.counted)

    linear = "*down_proj.weight"
    fk.estimate(model, [batch], Looking(), parameters=linear, check=False)
    parts = batch["attention_mask"].bool().tensor_split([2])  # the first two examples come by themselves
    assert {len(one) for one in counted} == {len(part) for part in parts}
    assert all(any(torch.equal(one, part) for part in parts) for one in counted)
    counted.clear()
    whole = {key: value[:1] for key, value in batch.items()}  # the first row is full
    fk.estimate(model, [whole], Looking(), parameters=linear, check=False)
    assert counted == [None] * len(counted)
    classifier = zoo.bert_classifier()
    fk.estimate(classifier.model, [classifier.batch()], Looking(), parameters=["*pooler.dense.weight"], check=False)
    assert counted[-1] is None  # one position for each example


def test_positions_that_no_mask_tells_of_are_refused():
    t5 = zoo.t5()
    padded = t5.batch()
    with pytest.raises(fk.UnsupportedModuleError, match="has an encoder and a decoder, and attention_mask says which"):
        fk.estimate(t5.model, [padded], SquaredFactors(), parameters="*.wo.weight")
    peft = pytest.importorskip("peft")
    tuning = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(zoo.llama().model, tuning)
    with pytest.raises(fk.UnsupportedModuleError, match="runs at 10 positions.* say of 7 which"):
        fk.estimate(model, [zoo.text_batch()], SquaredFactors(), parameters="*down_proj.weight")


def test_parts_merge_by_the_definition():
    specimen, batch = zoo.llama(tie_word_embeddings=True), zoo.text_batch()
    whole = fk.estimate(specimen.model, [batch], MeanPower())
    parts = [{key: value[part] for key, value in batch.items()} for part in ([0, 1], [2, 3, 4])]
    merged = fk.merge(*(fk.estimate(specimen.model, [part], MeanPower()) for part in parts))
    for name in whole:
        torch.testing.assert_close(merged[name], whole[name])
    with pytest.raises(ValueError, match=r"differ in power \(1 and 2\)"):
        fk.merge(whole, fk.estimate(specimen.model, [batch], MeanPower(2)))


def test_the_batchs_gradient_will_do():
    """Without single examples: ordinary autograd, of which the coverage says so."""

    class OfBatches(MeanPower):
        reads = "batches"

        @property
        def definition(self):
            return {**super().definition, "unit": "batch"}

        def units(self, num_examples):
            return 1

    specimen, batch = zoo.llama(), zoo.text_batch()
    statistics = fk.estimate(specimen.model, [batch], OfBatches())
    assert {covered.path for covered in statistics.coverage.values()} == {"batch"}
    error, _ = worst_error(statistics, {n: 5 * v for n, v in singly(specimen, batch, 1).items()}, torch.float32)
    assert error < LIMIT[torch.float32]


def test_one_gradient_at_a_time_is_its_definition():
    """As in a comparison: the same estimator on gradients of autograd."""
    specimen, batch = zoo.llama(tie_word_embeddings=True), zoo.text_batch()
    statistics = fk.estimate(specimen.model, [batch], fk.DiagonalFisher())
    parameter = specimen.model.model.embed_tokens.weight
    estimator = fk.DiagonalFisher()
    info = ParameterInfo("lm_head.weight", parameter, parameter.shape, torch.float32, parameter.device)
    state = estimator.init(info)
    for n in range(size(batch)):
        loss = specimen.loss(specimen.model, row(batch, n))
        estimator.add_single_(state, torch.autograd.grad(loss, parameter)[0], info)
    torch.testing.assert_close(estimator.result(state, size(batch)), statistics["model.embed_tokens.weight"])


def test_a_subclass_that_reads_single_gradients_does_not_inherit_that_squares_will_do():
    class Absolute(fk.DiagonalFisher):
        def update_(self, state, grads, parameter, backend=None):
            for n in range(grads.num_examples):
                state += grads.example(n).abs()

    assert fk.DiagonalFisher().reads == "squares"
    assert fk.DiagonalFisher().has_of_gradient
    assert Absolute().reads == "examples"
    assert not Absolute().has_of_gradient
    specimen, batch = zoo.llama(tie_word_embeddings=True), zoo.text_batch()
    statistics = fk.estimate(specimen.model, [batch], Absolute())
    single = sum(
        torch.autograd.grad(specimen.loss(specimen.model, row(batch, n)), specimen.model.lm_head.weight)[0].abs()
        for n in range(5)
    )
    torch.testing.assert_close(statistics["model.embed_tokens.weight"], single / 5)


class SixteenBits(MeanPower):
    def init(self, parameter):
        return torch.zeros(parameter.shape, dtype=torch.bfloat16)


class Number(MeanPower):
    def init(self, parameter):
        return {"sum": torch.zeros(parameter.shape), "count": 0}


class Largest(MeanPower):
    def init(self, parameter):
        return torch.full(parameter.shape, -torch.inf, dtype=parameter.dtype, device=parameter.device)


class NotInPlace(MeanPower):
    def update_(self, state, grads, parameter, backend=None):
        return state + grads.example(0)


class SaysSquares(MeanPower):
    reads: ClassVar[str] = "squares"

    def update_(self, state, grads, parameter, backend=None):
        super().update_(state, grads, parameter, backend)


class Unaware(MeanPower):
    def update_(self, state, grads, *, wherever=None):
        super().update_(state, grads, None)


class NoHeader(MeanPower):
    @property
    def definition(self):
        return {"weights": torch.ones(3)}


class NoDict(MeanPower):
    settings = "seed 3"


class Factors(MeanPower):
    reads = "factors"

    def update_(self, state, grads, parameter, backend=None):
        raise AssertionError("the pass refuses before it gets here")


REFUSED = {
    "a definition that no file holds": (NoHeader, TypeError, "NoHeader.definition must be a dict of plain val.*: Obj"),
    "settings that are no dict": (NoDict, TypeError, "NoDict.settings must be a dict of plain values.*; got str"),
    "sums in 16 bits": (SixteenBits, ValueError, "SixteenBits.init must give zeros of torch.float32 or .*bfloat16"),
    "a number among the sums": (Number, TypeError, "Number.init must give zeros that are tensors.*; got int for "),
    "no zeros": (Largest, ValueError, "Largest.init must give zeros"),
    "not in place": (NotInPlace, TypeError, "NotInPlace.update_ must change the state in place"),
    "another signature": (Unaware, TypeError, r"Unaware.update_ must take \(state, grads, parameter, backend=None\)"),
    "squares that are none": (SaysSquares, NotImplementedError, "reads single gradients must say reads = 'examples'"),
    "no factors": (Factors, fk.UnsupportedModuleError, "reads activations and output gradients.*'model.norm.weight'"),
}


@pytest.mark.parametrize("check", [True, False], ids=["checked", "unchecked"])
@pytest.mark.parametrize("estimator, error, message", REFUSED.values(), ids=REFUSED)
def test_refused_in_one_sentence(estimator, error, message, check):
    with pytest.raises(error, match=message):
        fk.estimate(zoo.llama(tie_word_embeddings=True).model, [zoo.text_batch()], estimator(), check=check)


@pytest.mark.parametrize("name, remedy", [("adds_squares", "reads = 'squares'"), ("per_example", "reads = 'sums'")])
def test_attributes_of_older_versions_are_not_silently_ignored(name, remedy):
    with pytest.raises(TypeError, match=f"Old.{name} has been replaced: say {remedy}"):
        type("Old", (MeanPower,), {name: True})
