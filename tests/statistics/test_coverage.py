"""Coverage accounts for every parameter under its one name; data comes in every form a loader has."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fishkern as fk
from tests.support import zoo
from tests.support.exactness import LIMIT, assert_exact
from tests.support.oracle import worst_error

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.matrix

ESTIMATORS = {
    "empirical": fk.DiagonalFisher(),
    "mc": fk.DiagonalFisher("mc", mc_samples=2),
    "batch": fk.DiagonalFisher(unit="batch"),
    "sketched": fk.SketchedFisher(2),
}
every_estimator = pytest.mark.parametrize("kind", ESTIMATORS)
WHICH = {
    "trainable": None,
    "all": "all",
    "predicate": lambda name, parameter: "norm" in name or parameter.ndim == 1,
    "frozen only": lambda name, parameter: not parameter.requires_grad,
}


def partly_frozen(family: str) -> nn.Module:
    model = zoo.FAMILIES[family]().model
    for place, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(place % 3 > 0)
    return model


def assert_same(actual, expected) -> None:
    error, name = worst_error(actual, {name: value.double() for name, value in expected.items()}, torch.float32)
    assert error < LIMIT[torch.float32], name


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "vit"])
@pytest.mark.parametrize("which", WHICH)
def test_coverage_adds_up_to_the_size_of_the_model(family, which):
    model = partly_frozen(family)
    statistics = fk.estimate(model, [zoo.FAMILIES[family]().batch(3)], parameters=WHICH[which])
    parameters = dict(model.named_parameters())
    assert statistics.coverage.keys() == parameters.keys()
    assert all(covered.numel == parameters[name].numel() for name, covered in statistics.coverage.items())
    wanted = {"trainable": lambda name, p: p.requires_grad, "all": lambda name, p: True}.get(which, WHICH[which])
    assert list(statistics) == [name for name, parameter in parameters.items() if wanted(name, parameter)]
    left_out = {name: covered for name, covered in statistics.coverage.items() if covered.path == "left out"}
    assert left_out.keys() == parameters.keys() - statistics.keys()
    word = "requires_grad is False" if which == "trainable" else "the parameters argument"
    assert all(covered.reason == word for covered in left_out.values())
    assert all(statistics[name].shape == parameters[name].shape for name in statistics)


@every_estimator
def test_the_path_says_how_it_was_computed(kind):
    specimen = zoo.llama()
    statistics = fk.estimate(specimen.model, [specimen.batch(3)], ESTIMATORS[kind])
    assert {covered.path for covered in statistics.coverage.values()} == {
        {"empirical": "fused", "mc": "fused", "batch": "batch", "sketched": "sketch"}[kind]
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_pooler_is_fused_in_every_dtype(dtype):
    model = zoo.bert_classifier().model.to(dtype)
    statistics = fk.estimate(model, [zoo.class_batch(8, 7)])
    assert {covered.path for covered in statistics.coverage.values()} == {"fused"}


class Watched(nn.Module):
    """Counts how often a gradient comes by."""

    def __init__(self) -> None:
        super().__init__()
        self.forwards = self.backwards = 0

    def forward(self, x):
        self.forwards += 1
        x = x.clone()
        if x.requires_grad:
            x.register_hook(self.count)
        return x

    def count(self, grad):
        self.backwards += 1


@pytest.mark.parametrize("shape", [(4,), (7, 4)], ids=str)
def test_a_batch_costs_one_forward_and_one_backward(shape):
    watched, counts = Watched(), {}
    model = nn.Sequential(nn.Linear(4, 4), watched, nn.Tanh(), nn.Linear(4, 3))
    batch = (torch.randn(3, *shape), torch.zeros(3, *shape[:-1]).long())
    for number in (1, 5):
        watched.forwards = watched.backwards = 0
        likelihood = [fk.Classification(), fk.TokenClassification(class_axis=-1)][len(shape) - 1]
        fk.estimate(model, [batch] * number, likelihood=likelihood)
        counts[number] = (watched.forwards, watched.backwards)
    assert (counts[5][0] - counts[1][0], counts[5][1] - counts[1][1]) == (4, 4)


def test_the_predicate_gets_canonical_names_and_parameters():
    specimen = zoo.llama()
    specimen.model.model.layers[0] = torch.compile(specimen.model.model.layers[0], backend="eager")
    seen = {}

    def everything(name, parameter):
        seen[name] = parameter
        return True

    fk.estimate(specimen.model, [specimen.batch(3)], parameters=everything)
    assert seen.keys() == dict(zoo.llama().model.named_parameters()).keys()
    assert all(isinstance(parameter, nn.Parameter) for parameter in seen.values())


class DistributedDataParallel(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        raise AssertionError("the pass runs on the module inside")


def eager(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def compiled_inside(model: nn.Module) -> nn.Module:
    model.model.layers[1] = eager(model.model.layers[1])
    model.model.layers[0].mlp.compile(backend="eager")
    return model


WRAPPERS = {
    "DDP": DistributedDataParallel,
    "compiled": eager,
    "DDP of compiled": lambda model: DistributedDataParallel(eager(model)),
    "compiled DDP": lambda model: eager(DistributedDataParallel(model)),
    "compiled inside": compiled_inside,
}


@every_estimator
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_names_are_those_of_the_model_without_wrappers(wrapper, kind):
    specimen = zoo.llama()
    plain = copy.deepcopy(specimen.model)
    batches = [specimen.batch(3), specimen.batch(2, seed=1)]
    wrapped = fk.estimate(WRAPPERS[wrapper](specimen.model), batches, ESTIMATORS[kind])
    expected = fk.estimate(plain, batches, ESTIMATORS[kind])
    assert list(wrapped) == list(wrapped.coverage) == [name for name, _ in plain.named_parameters()]
    assert_same(wrapped, expected)


@every_estimator
def test_accumulating_on_a_named_device_changes_nothing(kind):
    model, batches = zoo.llama().model, [zoo.text_batch(3), zoo.text_batch(2, seed=1)]
    there = fk.estimate(model, batches, ESTIMATORS[kind], accumulate_on="cpu")
    assert there == fk.estimate(model, batches, ESTIMATORS[kind], accumulate_on=torch.device("cpu"))
    assert there == fk.estimate(model, batches, ESTIMATORS[kind])
    assert all(value.device.type == "cpu" and value.dtype == torch.float32 for value in there.values())


@pytest.mark.parametrize("most", [1, 3, 4, 5, 6, 100])
@every_estimator
def test_the_number_of_examples_cuts_inside_a_batch(kind, most):
    model = zoo.llama().model
    whole = [zoo.text_batch(3, 7), zoo.text_batch(3, 5, seed=1)]
    taken = []

    def batches():
        for batch in whole:
            taken.append(batch)
            yield batch

    cut = fk.estimate(model, batches(), ESTIMATORS[kind], max_examples=most)
    kept = [whole[0]] if most >= 3 else [{key: value[:most] for key, value in whole[0].items()}]
    if most > 3:
        kept.append({key: value[: most - 3] for key, value in whole[1].items()})
    assert len(taken) == len(kept)  # no batch is asked for in vain
    assert cut == fk.estimate(model, kept, ESTIMATORS[kind])
    assert cut.count == (len(kept) if kind == "batch" else min(most, 6))


def test_progress_is_told_the_examples_done_and_the_total():
    data = torch.utils.data.TensorDataset(torch.randn(7, 4), torch.arange(7) % 3)
    loader = torch.utils.data.DataLoader(data, batch_size=3)
    model = nn.Sequential(nn.Linear(4, 3))

    def told(batches, **options) -> list:
        calls = []
        fk.estimate(
            model, batches, likelihood=fk.Classification(), progress=lambda *call: calls.append(call), **options
        )
        return calls

    assert told(loader) == [(3, 7), (6, 7), (7, 7)]
    assert told(loader, max_examples=4) == [(3, 4), (4, 4)]
    assert told(loader, max_examples=100) == [(3, 7), (6, 7), (7, 7)]
    assert told(iter(loader)) == [(3, None), (6, None), (7, None)]
    assert told(iter(loader), max_examples=4) == [(3, 4), (4, 4)]


FORMS = {
    "list": lambda batches: batches,
    "tuple": tuple,
    "generator": lambda batches: (batch for batch in batches),
    "iterator": iter,
    "loader": lambda batches: torch.utils.data.DataLoader(batches, batch_size=None),
}


@pytest.mark.parametrize("form", FORMS)
def test_batches_come_in_any_iterable(form):
    model, batches = zoo.llama().model, [zoo.text_batch(3), zoo.text_batch(2, seed=1)]
    assert fk.estimate(model, FORMS[form](batches)) == fk.estimate(model, batches)


def test_batches_of_tokenizers_and_what_is_no_tensor():
    model, batch = zoo.llama().model, zoo.text_batch(3)
    encoding = transformers.BatchEncoding({**batch, "output_attentions": False})
    assert fk.estimate(model, [encoding]) == fk.estimate(model, [batch])


@pytest.mark.parametrize("sizes", [(3, 2), (1, 3), (2, 1, 2)], ids=str)
def test_a_tensor_of_one_row_is_shared_by_all_examples(sizes):
    """Also where the first batch is one example, with which the row might be its own."""
    specimen = zoo.gpt2()
    batches = [{**specimen.batch(N, 5), "position_ids": torch.arange(1, 6)[None]} for N in sizes]
    assert_exact(specimen, batches)


class Expert(nn.Module):
    """Calls a linear on the rows of token 3, wherever they are, one position (or one example) after the other."""

    def __init__(self, by_position: bool) -> None:
        super().__init__()
        self.embed, self.expert, self.head = nn.Embedding(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.by_position = by_position

    def forward(self, ids):
        x = self.embed(ids).cumsum(1)
        n, t = (ids == 3).T.nonzero().flip(1).T if self.by_position else (ids == 3).nonzero().T
        return self.head(x.index_put((n, t), self.expert(x[n, t]), accumulate=True))


ROUTED = {
    "apart": [[0, 3, 1], [3, 1, 2]],
    "first": [[3, 0, 1], [3, 1, 2]],
    "together": [[3, 3, 0], [1, 0, 2]],
    "none": [[1, 1, 1], [2, 0, 0]],
    "all": [[3, 3, 3], [3, 3, 3]],
    "more": [[0, 3, 1], [3, 1, 2], [3, 0, 3]],
    "six": [[3, 3, 1], [3, 1, 1], [3, 0, 2], [3, 1, 0], [3, 2, 2], [0, 0, 1]],
}
ORDERS = ["apart together", "together apart", "none apart", "apart none", "all apart", "apart all",
          "apart together apart more", "first six"]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*slow exact path")
@pytest.mark.parametrize("kind", ["empirical", "type-2"])
@pytest.mark.parametrize("by_position", [False, True], ids=["by example", "by position"])
@pytest.mark.parametrize("order", ORDERS)
def test_an_expert_whose_rows_follow_the_data_is_counted_once(kind, by_position, order):
    ids = [torch.tensor(ROUTED[name]) for name in order.split()]
    labels = [(torch.arange(3, 3 + rows.numel()) % 4).view_as(rows) for rows in ids]  # 3 for no label
    labels = [torch.where(label == 3, -100, label) for label in labels]
    model, likelihood = Expert(by_position).double(), fk.TokenClassification(reduction="sum", class_axis=-1)
    batches = list(zip(ids, labels, strict=True))
    statistics = fk.estimate(model, batches, fk.DiagonalFisher(kind), likelihood=likelihood)
    truth = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for row, label in zip(torch.cat(ids), torch.cat(labels), strict=True):
        log_p = model(row[None])[0, label >= 0].log_softmax(-1)
        own = [(1.0, log_p[range(len(log_p)), label[label >= 0]].sum())]
        terms = own if kind == "empirical" else [(value.exp().detach(), value) for value in log_p.flatten()]
        for p, value in terms:
            grads = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
            for total, grad in zip(truth.values(), grads, strict=True):
                total += p * grad.square() / statistics.count
    error, name = worst_error(statistics, truth)
    assert error < LIMIT[torch.float64], f"{name}: relative error {error:.1e}"


@pytest.mark.filterwarnings("ignore:.*slow exact path")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rows_in_another_order_are_told_apart_in_16_bits(dtype):
    """As many rows as examples, of which the sixth is the first example's."""
    batches = [(ids, torch.zeros_like(ids)) for ids in (torch.tensor(ROUTED[name]) for name in ("first", "six"))]
    model, likelihood = Expert(by_position=True).to(dtype), fk.TokenClassification(class_axis=-1)
    low, high = (fk.estimate(model.to(kind), batches, likelihood=likelihood) for kind in (dtype, torch.float64))
    for name in high:
        assert (low[name] - high[name]).abs().max() <= 8 * torch.finfo(dtype).eps * high[name].max(), name
