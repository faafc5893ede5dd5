"""Batches of all forms: their number of examples, and the entries that belong to each example."""

from __future__ import annotations

from collections import UserDict, defaultdict
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_sequence

import fishkern as fk
from fishkern.statistics import Categorical
from tests.support import zoo
from tests.support.oracle import squares_one_by_one, worst_error

transformers = pytest.importorskip("transformers")


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 3).double()


def rows(N: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(N)
    return {"x": torch.randn(N, 4, generator=generator, dtype=torch.float64), "y": torch.arange(N) % 3}


def cross_entropy(model: nn.Module, batch: dict, **options) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none", **options)


def truth(model: nn.Module, examples: list, losses) -> dict[str, Tensor]:
    total = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    for example in examples:
        grads = torch.autograd.grad(losses(model, example).sum(), list(model.parameters()))
        for name, grad in zip(total, grads, strict=True):
            total[name] += grad.square() / len(examples)
    return total


def assert_equal(statistics: fk.Statistics, expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(statistics[name], value.float())


WEIGHTS = [1.0, 2.0, 3.0, 4.0]
PER_ROW = {
    "a list": WEIGHTS,
    "an array": np.array(WEIGHTS),
    "a tensor": torch.tensor(WEIGHTS),
    "strings": ["1", "2", "3", "4"],
    "lists of several lengths": [[1.0], [1.0, 1.0], [3.0], [2.0, 2.0]],
    "tensors of several lengths": [torch.ones(1), torch.ones(2), torch.ones(3), torch.ones(4)],
    "mappings": [{"w": torch.ones(n)} for n in (1, 2, 3, 4)],
}


@pytest.mark.filterwarnings("ignore:.*slow exact path")
@pytest.mark.parametrize("max_examples", [None, 3])
@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("kind", PER_ROW)
def test_what_holds_one_thing_for_each_example_is_cut(kind, check, max_examples):
    """The reader of row ``n`` takes entry ``n``: had the whole been left, every row alone would get the first."""

    def number(entry) -> float:
        if isinstance(entry, dict):
            return number(entry["w"])
        return float(entry) if isinstance(entry, str) else float(torch.as_tensor(entry).sum())

    def losses(model, batch):
        scale = torch.tensor([number(batch["w"][n]) for n in range(len(batch["x"]))])
        return cross_entropy(model, batch) * scale

    model, batch = linear(), {**rows(4), "w": PER_ROW[kind]}
    alone = [{key: value[n : n + 1] for key, value in batch.items()} for n in range(max_examples or 4)]
    found = fk.estimate(model, [batch], likelihood=losses, check=check, max_examples=max_examples)
    assert_equal(found, truth(model, alone, losses))


@pytest.mark.parametrize("kind", ["type-2", "mc", "empirical"])
@pytest.mark.parametrize("make", [dict, UserDict, transformers.BatchEncoding])
def test_a_mapping_inside_a_pair_is_entered(make, kind):
    """A mapping of another class once went whole to every example."""

    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = linear()

        def forward(self, inputs):
            return self.linear(inputs["x"])

    batch, labels = rows(3), torch.rand(3, 3, dtype=torch.float64)
    model = Takes()
    options = {"estimator": fk.DiagonalFisher(kind), "likelihood": fk.MultiLabel("sum")}
    found = fk.estimate(model, [(make({"x": batch["x"]}), labels)], **options)
    expected = fk.estimate(model.linear, [(batch["x"], labels)], **options)
    torch.testing.assert_close(found["linear.weight"], expected["weight"])


def test_a_mapping_of_another_class_is_a_batch():
    specimen = zoo.llama()
    batch = specimen.batch(3, 6)
    expected = fk.estimate(specimen.model, [batch])
    for make in (UserDict, transformers.BatchEncoding):
        assert fk.estimate(specimen.model, [make(batch)]) == expected

    def losses(model, batch):
        return model(input_ids=batch.input_ids).logits.square().mean((1, 2))  # by attribute, as BatchEncoding has it

    assert fk.estimate(specimen.model, [transformers.BatchEncoding(batch)], likelihood=losses).count == 3


class ByAttribute(dict):
    __getattr__ = dict.__getitem__


@dataclass
class Output(transformers.utils.ModelOutput):
    x: Tensor | None = None
    y: Tensor | None = None


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("make", [ByAttribute, Output, lambda **items: defaultdict(int, items)], ids=range(3))
def test_a_mapping_keeps_its_class_and_what_comes_with_it(make, nested):
    def losses(model, batch):
        batch = batch["inside"] if nested else batch
        x, y = (batch["x"], batch["y"]) if isinstance(batch, defaultdict) else (batch.x, batch.y)
        weight = 1 + batch["missing"] if isinstance(batch, defaultdict) else 1
        return weight * cross_entropy(model, {"x": x, "y": y})

    model = linear()
    wrapped = [make(**rows(N)) for N in (4, 3)]
    statistics = fk.estimate(model, [{"inside": one} if nested else one for one in wrapped], likelihood=losses)
    alone = [{"x": x[None], "y": y[None]} for N in (4, 3) for x, y in zip(*rows(N).values(), strict=True)]
    assert_equal(statistics, truth(model, alone, cross_entropy))


def test_a_list_of_tensors_is_settled_by_an_earlier_batch():
    def losses(model, batch):
        scale = torch.stack([part.sum() for part in batch["parts"]])
        return cross_entropy(model, batch) * scale

    def batch(N: int, sizes: list[int]) -> dict:
        return {**rows(N), "parts": [torch.ones(size) for size in sizes]}

    model = linear()
    with pytest.raises(ValueError, match="'parts' is a list of 2 with 2 rows each: one thing for each example"):
        fk.estimate(model, [batch(2, [2, 2])], likelihood=losses)
    batches = [batch(3, [1, 2, 3]), batch(2, [2, 2])]
    alone = [
        {"x": one["x"][n : n + 1], "y": one["y"][n : n + 1], "parts": one["parts"][n : n + 1]}
        for one in batches
        for n in range(len(one["x"]))
    ]
    assert_equal(fk.estimate(model, batches, likelihood=losses), truth(model, alone, losses))
    with pytest.raises(ValueError, match="cut in another way in earlier batches"):
        fk.estimate(model, [batch(3, [1, 2, 3]), batch(2, [2, 2, 2])], likelihood=losses)


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("shared", ["weights", ["w*"], ("weights",)])
@pytest.mark.parametrize("N", [1, 2, 3, 4])
def test_class_weights_are_shared_by_the_users_word(N, shared, check):
    weights = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)

    def losses(model, batch):
        return cross_entropy(model, batch, weight=batch["weights"])

    model, batch = linear(), {**rows(N), "weights": weights}
    alone = [{**{key: batch[key][n : n + 1] for key in "xy"}, "weights": weights} for n in range(N)]
    found = fk.estimate(model, [batch], likelihood=losses, shared=shared, check=check)
    assert_equal(found, truth(model, alone, losses))
    assert fk.verify(model, [batch], found, likelihood=losses, shared=shared).ok


@pytest.mark.parametrize("N", [2, 3, 4])
def test_what_belongs_to_all_is_refused_by_name(N):
    """With ``N = C`` the weights look like one for each example, and the loss then fails on one row."""

    def losses(model, batch):
        return cross_entropy(model, batch, weight=batch["weights"])

    batch = {**rows(N), "weights": torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)}
    with pytest.raises(ValueError, match="'weights'.*shared="):
        fk.estimate(linear(), [batch], likelihood=losses)


def test_places_in_a_tuple_are_shared():
    def losses(model, batch):
        return cross_entropy(model, {"x": batch[0], "y": batch[1]}, weight=batch[2])

    batch = (*rows(3).values(), torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64))
    model = linear()
    alone = [(batch[0][n : n + 1], batch[1][n : n + 1], batch[2]) for n in range(3)]
    assert_equal(fk.estimate(model, [batch], likelihood=losses, shared=2), truth(model, alone, losses))


@pytest.mark.filterwarnings("ignore:.*slow exact path")
@pytest.mark.parametrize("N", [1, 2, 3, 4])
def test_lists_of_images_and_targets(N):
    """As detectors take them: here each target has as many boxes as there are images."""

    def losses(model, batch):
        images, targets = batch
        return torch.stack([
            (model(image).mean() - target["boxes"].mean()).square()
            for image, target in zip(images, targets, strict=True)
        ])  # fmt: skip

    model = linear()
    images = [torch.randn(5, 4 + n, 4, dtype=torch.float64) for n in range(N)]
    targets = [{"boxes": torch.randn(N, 4)} for n in range(N)]
    alone = [([images[n]], [targets[n]]) for n in range(N)]
    assert_equal(fk.estimate(model, [(images, targets)], likelihood=losses), truth(model, alone, losses))


def test_a_tensor_that_cannot_be_cut_is_named():
    nested = torch.nested.nested_tensor([torch.ones(2, 4), torch.ones(3, 4)], layout=torch.jagged)
    with pytest.raises(ValueError, match="'inputs' of a batch cannot be cut by rows: .* layout torch.jagged"):
        fk.estimate(nn.Linear(4, 3), [(nested, torch.zeros(2))], likelihood=lambda model, batch: batch[1] + 1.0)


def test_a_sparse_tensor_is_cut():
    def losses(model, batch):
        return model(batch[0].to_dense()).square().sum(1)

    x = torch.eye(4, dtype=torch.float64)[:3]
    model = linear()
    found = fk.estimate(model, [(x.to_sparse(), torch.zeros(3))], likelihood=losses)
    assert_equal(found, truth(model, [(x[n : n + 1], None) for n in range(3)], losses))


SHARED = {
    "a slip of the pen": ("wieghts", ValueError, "names no entry of the first batch.*'weights'"),
    "no name": (2.5, TypeError, "patterns of entry names"),
    "a flag": ([True], TypeError, "patterns of entry names"),
}


@pytest.mark.parametrize("case", SHARED)
def test_a_wrong_word_on_what_is_shared(case):
    shared, kind, words = SHARED[case]
    with pytest.raises(kind, match=words):
        fk.estimate(linear(), [{**rows(2), "weights": torch.ones(3)}], likelihood=cross_entropy, shared=shared)


def test_positions_with_another_leading_axis_are_refused_by_name():
    specimen = zoo.llama()
    batch = specimen.batch(2, 6)
    for extra in ({"cache_position": torch.arange(6)}, {"position_ids": torch.arange(6).expand(5, 2, 6)}):
        (name,) = extra
        with pytest.raises(ValueError, match=f"batch 0 holds 2 examples by 'input_ids', and '{name}' is"):
            fk.estimate(specimen.model, [{**batch, **extra}])


def test_a_packed_sequence_is_no_batch_of_rows():
    packed = pack_sequence([torch.ones(2, 3), torch.ones(1, 3)])
    with pytest.raises(ValueError, match="'labels' is a PackedSequence"):
        fk.estimate(linear(), [(torch.ones(2, 4), packed)], likelihood=lambda model, batch: model(batch[0]).sum(1))


def test_a_third_entry_is_for_a_loss_function():
    """Also where it is a tuple of one string for each example, as a DataLoader makes it: that is no list."""

    def losses(model, batch):
        x, y, task = batch
        return cross_entropy(model, {"x": x, "y": y}) * (1.0 + task)

    x, y = rows(3).values()
    tasks = torch.tensor([0.0, 1.0, 2.0])
    model = linear()
    alone = [(x[n : n + 1], y[n : n + 1], tasks[n : n + 1]) for n in range(3)]
    assert_equal(fk.estimate(model, [(x, y, tasks)], likelihood=losses), truth(model, alone, losses))
    with pytest.raises(ValueError, match="'2' is a tuple of 3 single values: one for each example, or a setting"):
        fk.estimate(model, [(x, y, ("a", "b", "c"))], likelihood=lambda model, batch: losses(model, (*batch[:2], 0.0)))


# --- a batch of one --------------------------------------------------------------------------------------------------


class OneOnly(nn.Module):
    """A model that takes a single example, as some of graphs and of bags do."""

    def __init__(self, bare: bool = False) -> None:
        super().__init__()
        self.first, self.last, self.bare = nn.Linear(4, 5), nn.Linear(5, 3), bare

    def forward(self, x):
        (row,) = x  # fails on two
        hidden = self.first(row) if self.bare else self.first(row[None])
        return self.last(torch.tanh(hidden)).view(1, 3)


ESTIMATORS = [*map(fk.DiagonalFisher, ("empirical", "mc", "type-2")), fk.SketchedFisher()]


@pytest.mark.filterwarnings("ignore:.*slow exact path")
@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda one: str(one.definition["fisher_type"]))
def test_a_batch_of_one_is_never_doubled(estimator, bare, check):
    """The model fails on two rows, so that it gets none but the one."""
    model = OneOnly(bare).double()
    batches = [(torch.randn(1, 4, dtype=torch.float64), torch.tensor([n % 3])) for n in range(3)]
    found = fk.estimate(model, batches, estimator, likelihood=fk.Classification(), check=check)
    assert found.count == 3
    if estimator.definition["fisher_type"] == "empirical" and isinstance(estimator, fk.DiagonalFisher):
        loss = lambda model, row: F.cross_entropy(model(row["x"]), row["y"])  # noqa: E731
        error, name = worst_error(found, squares_one_by_one(model, [{"x": x, "y": y} for x, y in batches], loss))
        assert error < 1e-6, name


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("make", [zoo.llama, zoo.bert, zoo.t5, zoo.vit], ids=lambda make: make.__name__)
def test_batches_of_one_take_the_fast_paths(make, check):
    specimen = make()
    model = specimen.model.double()
    batches = [specimen.batch(1, seed=seed) for seed in (0, 1)]
    found = fk.estimate(model, batches, check=check)
    error, name = worst_error(found, squares_one_by_one(model, batches, specimen.loss))
    assert error < 1e-5, name
    fused = sum(one.path == "fused" for one in found.coverage.values())
    assert fused > 0.7 * len(found.coverage)


@pytest.mark.parametrize("sizes", [(1, 3), (3, 1), (1, 2, 1)], ids=str)
@pytest.mark.parametrize("make", [zoo.llama, zoo.gpt2, zoo.t5], ids=lambda make: make.__name__)
def test_batches_of_one_beside_others(make, sizes):
    """Position embeddings that all examples share look like those of the one example in a batch of one."""
    specimen = make()
    model = specimen.model.double()
    batches = [specimen.batch(size, 6, seed=seed) for seed, size in enumerate(sizes)]
    error, name = worst_error(fk.estimate(model, batches), squares_one_by_one(model, batches, specimen.loss))
    assert error < 1e-5, name


def test_a_classifier_without_a_pad_token_takes_batches_of_one():
    config = zoo.llama().model.config
    config.num_labels, config.pad_token_id = 3, None
    model = transformers.LlamaForSequenceClassification(config).double()
    batches = [{"input_ids": torch.tensor([[3, 4, 5 + n]]), "labels": torch.tensor([n])} for n in range(3)]
    loss = lambda model, row: model(**row).loss  # noqa: E731
    error, name = worst_error(fk.estimate(model, batches), squares_one_by_one(model, batches, loss))
    assert error < 1e-5, name


class Patches(nn.Module):
    """Image patches of all examples one after another, as Qwen2-VL takes them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.patches, self.head = nn.Embedding(9, 4), nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, input_ids, pixel_values, grid):
        assert len(pixel_values) == grid.prod(1).sum()
        return self.head(self.embed(input_ids).mean(1) + self.patches(pixel_values).mean(0, keepdim=True))


@pytest.mark.filterwarnings("ignore:.*slow exact path")
@pytest.mark.parametrize("check", [True, False])
def test_patches_of_one_example_are_whole(check):
    def losses(model, batch):
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        return F.cross_entropy(model(**inputs), batch["labels"], reduction="none")

    model = Patches().double()

    def batch(N: int) -> dict:
        return {
            "pixel_values": torch.randn(4 * N, 6, dtype=torch.float64),
            "grid": torch.tensor([[2, 2]] * N),
            "input_ids": torch.randint(9, (N, 5)),
            "labels": torch.randint(3, (N,)),
        }

    batches = [batch(1), batch(1)]
    assert_equal(fk.estimate(model, batches, likelihood=losses, check=check), truth(model, batches, losses))
    with pytest.raises(ValueError, match="2 examples by 'input_ids', and 'pixel_values' is of leading size 8"):
        fk.estimate(model, [batch(2)], likelihood=losses)


class ThreeAxesForCausalLM(nn.Module):
    """Places of three kinds for each token come as ``[3, N, T]``."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = zoo.llama().model
        self.config = self.inner.config

    def forward(self, input_ids, attention_mask=None, labels=None, grid_ids=None, use_cache=None):
        assert grid_ids.shape == (3, *input_ids.shape)
        return self.inner(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


@pytest.mark.parametrize("check", [True, False])
def test_an_error_on_cut_rows_names_what_was_cut(check):
    """With three examples the axis of the three kinds looks like that of the examples."""
    batch = {**zoo.llama().batch(3, 6), "grid_ids": torch.arange(6).expand(3, 3, 6)}
    with pytest.raises(ValueError, match="takes a batch of 3, and fails on example 0 alone .*'grid_ids'.*shared="):
        fk.estimate(ThreeAxesForCausalLM(), [batch], check=check)
    one = {key: value[:1] for key, value in batch.items()} | {"grid_ids": torch.arange(6).expand(3, 1, 6)}
    assert fk.estimate(ThreeAxesForCausalLM(), [one], check=check).count == 1


def test_an_error_of_the_whole_batch_is_the_models_own():
    def losses(model, batch):
        raise KeyError("no such entry")

    with pytest.raises(KeyError, match="no such entry"):
        fk.estimate(linear(), [rows(3)], likelihood=losses)


def refused(batch, words: str, likelihood=cross_entropy, kind=ValueError) -> None:
    with pytest.raises(kind, match=words) as raised:
        fk.estimate(linear(), [batch], likelihood=likelihood)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("labels", [torch.tensor, int], ids=["tensors", "numbers"])
@pytest.mark.parametrize("kind", ["tuples", "mappings"])
def test_a_list_of_examples_is_told_to_be_collated(kind, labels):
    """Batches of ``collate_fn=list``."""
    pairs = [(x, labels(y)) for x, y in zip(rows(4)["x"], (0, 1, 2, 0), strict=True)]
    examples = pairs if kind == "tuples" else [{"x": x, "y": y} for x, y in pairs]

    def losses(model, batch):
        each = batch if kind == "tuples" else [(one["x"], one["y"]) for one in batch]
        x, y = torch.stack([x for x, _ in each]), torch.tensor([int(y) for _, y in each])
        return F.cross_entropy(model(x), y, reduction="none")

    refused(examples, "If it is a list of examples, collate them first", losses)
    loader = torch.utils.data.DataLoader(pairs, batch_size=2)
    assert fk.estimate(linear(), loader, likelihood=fk.Classification()).count == 4


@pytest.mark.parametrize("N", [1, 2])
def test_images_in_a_tuple_are_told_to_be_a_list(N):
    """Batches of ``tuple(zip(*batch))``, a usual collator of detectors."""

    def losses(model, batch):
        found = [(model(image.flatten(1).mean(1)[:1].expand(4)), boxes) for image, boxes in zip(*batch, strict=True)]
        return torch.stack([(logits.sum() * boxes["boxes"].mean()) for logits, boxes in found])

    images = tuple(torch.rand(3, 4 + n, 5, dtype=torch.float64) for n in range(N))
    targets = tuple({"boxes": torch.rand(2 + n, 4, dtype=torch.float64)} for n in range(N))
    refused((images, targets), "one thing for each example makes a list", losses)
    assert fk.estimate(linear(), [(list(images), list(targets))], likelihood=losses).count == N


def test_an_example_in_no_batch_is_told_to_be_put_into_one():
    """Items of ``batch_size=None``, and of a dataset that is passed itself."""
    x, y = rows(4)["x"][0], torch.tensor(1)
    refused((x, y), "batch 0 has a single number as its labels.*let a DataLoader make batches", fk.Classification())
    refused((x, 1), "batch 0 has a single number as its labels.*let a DataLoader make batches", fk.Classification())

    def losses(model, batch):
        return F.cross_entropy(model(batch["x"][None]), batch["y"][None])

    refused({"x": x, "y": y}, "If it is one example in no batch, let a DataLoader make batches", losses)


def test_an_object_is_said_not_to_be_looked_into():
    @dataclass
    class Batch:
        x: Tensor
        y: Tensor

    batch = Batch(**rows(3))
    refused(batch, r"batch 0 is a Batch: .*vars\(batch\) makes a mapping of a dataclass", kind=TypeError)
    refused({"inside": batch}, "'inside' is a Batch, which is not looked into: give what it holds as a mapping")
    assert fk.estimate(linear(), [vars(batch)], likelihood=cross_entropy).count == 3


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_a_nested_tensor_is_refused_by_name_and_a_list_taken(layout):
    sequences = [torch.randn(T, 4, dtype=torch.float64) for T in (2, 3, 4)]

    def losses(model, batch):
        return torch.stack([model(one).sin().sum() for one in batch["x"]])

    nested = torch.nested.nested_tensor(sequences, layout=layout)
    refused({"x": nested, "y": torch.zeros(3)}, "'x' of .*batch.* (nested tensor|NestedTensor).*[Bb]ring", losses)
    statistics = fk.estimate(linear(), [{"x": sequences, "y": torch.zeros(3)}], likelihood=losses)
    assert_equal(statistics, truth(linear(), [{"x": [one]} for one in sequences], losses))


class Popping(fk.Likelihood):
    def predictive(self, model, batch):
        labels = batch.pop("y")
        return Categorical(model(batch["x"].mul_(0.5))[:, None], labels[:, None], mean=True)


def popping(model, batch):
    labels = batch.pop("y")  # as the Trainer's own compute_loss
    return F.cross_entropy(model(batch["x"].mul_(0.5)), labels, reduction="none")


def popping_inside(model, batch):
    return popping(model, batch["inside"])


def popping_and_drawing(model, batch, draws):
    return popping(model, batch) * (1 + 0 * draws.rand(1)[:, 0])


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize(
    "likelihood", [popping, popping_inside, fk.Drawn(popping_and_drawing), Popping()], ids=range(4)
)
def test_a_loss_takes_its_labels_out_of_the_batch_and_writes_into_it(likelihood, check):
    model, batches = linear(), [rows(4), rows(3), rows(1)]
    halved = [{"x": 0.5 * x[None], "y": y[None]} for one in batches for x, y in zip(*one.values(), strict=True)]
    expected = truth(model, halved, cross_entropy)
    given = [{"inside": one} for one in batches] if likelihood is popping_inside else batches
    assert_equal(fk.estimate(model, given, likelihood=likelihood, check=check), expected)
    assert fk.verify(model, given, likelihood=likelihood).ok
    for N, batch in zip((4, 3, 1), batches, strict=True):
        assert batch.keys() == rows(N).keys()
        assert torch.equal(batch["x"], rows(N)["x"])
