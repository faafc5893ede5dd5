"""Labels and outputs of many forms: the right result, or one sentence with the fix."""

from __future__ import annotations

import warnings
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fishkern as fk
from fishkern import hosts
from fishkern.statistics import Categorical
from tests.support import zoo
from tests.support.exactness import LIMIT
from tests.support.oracle import row, worst_error

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.matrix
every_kind = pytest.mark.parametrize("kind", ["empirical", "batch", "sketched"])
ESTIMATORS = {"empirical": None, "batch": fk.DiagonalFisher(unit="batch"), "sketched": fk.SketchedFisher(draws=2)}

N, C, L = 5, 3, 4


def net(I: int = 4, O: int = C) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(I, 6), nn.Tanh(), nn.Linear(6, O)).double()


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).double()


def assert_equals_the_loop(model, batch: tuple, likelihood, loss, estimator=None) -> fk.Statistics:
    """``loss(output, label)`` of one row, squared one by one in float64."""
    statistics = fk.estimate(model, [batch], estimator, likelihood=likelihood)
    parameters = dict(model.named_parameters())
    truth = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for n in range(len(batch[1])):
        value = loss(model(batch[0][n : n + 1]), batch[1][n : n + 1])
        for name, grad in zip(truth, torch.autograd.grad(value, list(parameters.values())), strict=True):
            truth[name] += grad.square() / len(batch[1])
    error, name = worst_error(statistics, truth)
    assert error < LIMIT[torch.float64], name
    return statistics


def refused(batch: tuple, likelihood, *words: str, model: nn.Module | None = None, estimator=None) -> None:
    with pytest.raises((TypeError, ValueError)) as raised:
        fk.estimate(net() if model is None else model, [batch], estimator, likelihood=likelihood)
    message = str(raised.value)
    assert "\n" not in message
    for word in words:
        assert word in message, f"{word!r} is not in {message!r}"


def cross_entropy(output, label):
    return F.cross_entropy(output, label.view(-1).long())


CLASSES = torch.tensor([0, 2, 1, 1, 0])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
@pytest.mark.parametrize("shape", [(N,), (N, 1)], ids=str)
def test_class_numbers_of_any_width(dtype, shape):
    batch = inputs(N, 4), CLASSES.to(dtype).view(shape)
    assert_equals_the_loop(net(), batch, fk.Classification(), cross_entropy)


def test_classes_of_yes_and_no():
    assert_equals_the_loop(net(O=2), (inputs(N, 4), CLASSES > 0), fk.Classification(), cross_entropy)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8], ids=str)
def test_narrow_labels_of_a_transformers_model(dtype):
    """Its own loss takes int64 alone, and is compared all the same."""
    specimen = zoo.bert_classifier()
    batch = specimen.batch()
    narrow = {**batch, "labels": batch["labels"].to(dtype)}
    assert fk.estimate(specimen.model, [narrow])["classifier.bias"].equal(
        fk.estimate(specimen.model, [batch])["classifier.bias"]
    )
    assert fk.verify(specimen.model, [narrow]).ok


@pytest.mark.parametrize("convert", [torch.Tensor.tolist, torch.Tensor.numpy, list], ids=["list", "array", "tensors"])
@pytest.mark.parametrize("likelihood", [None, fk.Classification()], ids=["recognised", "named"])
def test_labels_of_a_transformers_model_in_a_list_or_an_array(convert, likelihood):
    specimen = zoo.bert_classifier()
    batch = specimen.batch()
    other = {**batch, "labels": convert(batch["labels"])}
    ours, theirs = (fk.estimate(specimen.model, [one], likelihood=likelihood) for one in (other, batch))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert fk.verify(specimen.model, [other], likelihood=likelihood).ok


def test_narrow_labels_of_language_models():
    for specimen in (zoo.llama(), zoo.t5()):
        batch = specimen.batch()
        narrow = {**batch, "labels": batch["labels"].to(torch.int16)}
        ours, theirs = (fk.estimate(specimen.model, [one]) for one in (narrow, batch))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_whole_numbers_as_numbers_of_a_transformers_model(problem):
    model = zoo.bert_for("SequenceClassification", num_labels=3, problem_type=problem)
    whole = torch.tensor([[0, 1, 1], [1, 0, 1], [0, 0, 0], [1, 1, 1], [1, 0, 0]])
    ours, theirs = (
        fk.estimate(model, [{**zoo.text_batch(), "labels": labels}]) for labels in (whole, whole.float())
    )  # fmt: skip
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert fk.verify(model, [{**zoo.text_batch(), "labels": whole}]).ok


@pytest.mark.parametrize("label", [3, -1, 250])
@every_kind
def test_a_class_that_the_model_does_not_know_is_named_by_its_row(kind, label):
    labels = CLASSES.clone()
    labels[3] = label
    words = f"row 3 of a batch of 5 has the label {label}; the model knows 0 to 2."
    refused((inputs(N, 4), labels), fk.Classification(), words, estimator=ESTIMATORS[kind])


def test_a_token_that_the_model_does_not_know_is_named_by_its_row():
    batch = zoo.text_batch()
    batch["labels"][4, 2] = zoo.V + 1
    with pytest.raises(ValueError, match="row 4 of a batch of 5 has the label 42; the model knows 0 to 40, and -100"):
        fk.estimate(zoo.llama().model, [batch])
    batch["labels"][0, 2] = -1
    words = "has the label -1; the model knows 0 to 40, and -100 where a position carries none."
    with pytest.raises(ValueError, match=f"row 0 of a batch of 5 {words}"):
        fk.estimate(zoo.llama().model, [batch])
    with pytest.raises(ValueError, match=f"example 5 {words}"):
        fk.verify(zoo.llama().model, [zoo.text_batch(), batch], dict(zoo.llama().model.named_parameters()),
                  likelihood=fk.CausalLM())  # fmt: skip


def test_labels_of_padding_are_noted_once():
    specimen = zoo.llama()
    batch = specimen.batch()
    padded = int((batch["attention_mask"] == 0).sum())
    unmarked = {**batch, "labels": batch["input_ids"]}
    with pytest.warns(UserWarning, match=f"{padded} labels of the first batch are where.*-100") as warned:
        fk.estimate(specimen.model, [unmarked, unmarked])
    assert len([one for one in warned if "attention_mask" in str(one.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fk.estimate(specimen.model, [batch])


def test_labels_that_are_the_padding_token_are_noted():
    """A decoder's labels have no mask of their own."""
    specimen = zoo.t5()
    batch = specimen.batch()
    padded = int((batch["labels"] == -100).sum())
    unmarked = {**batch, "labels": batch["labels"].clamp(min=0)}
    with pytest.warns(UserWarning, match=f"{padded} labels of the first batch are the padding token 0.*-100"):
        fk.estimate(specimen.model, [unmarked])
    classes = zoo.bert_for("TokenClassification", num_labels=3, pad_token_id=0)
    text = zoo.text_batch()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fk.estimate(specimen.model, [batch])
        fk.estimate(classes, [{**text, "labels": text["labels"].clamp(min=-100, max=0)}])  # 0 is a class


class Tokens(nn.Module):
    """A language model of one's own, trained on pairs of text and next tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(zoo.V, 6), nn.Linear(6, zoo.V)

    def forward(self, ids):
        return self.head(self.embed(ids))


@pytest.mark.parametrize(("ends", "padding"), [(3, None), ([3, 4], None), (4, 3), ([4, 5], 3), (None, 3)])
def test_a_padding_token_that_also_ends_texts_is_no_padding(ends, padding):
    """LLaMA 3 has several tokens that end a text."""
    model = zoo.llama().model
    model.config.pad_token_id, model.config.eos_token_id = 3, ends
    assert hosts.padding_token(model) == padding


def test_labels_that_were_shifted_already_are_noted():
    ids = torch.randint(zoo.V, (N, 8), generator=torch.Generator().manual_seed(2))
    shifted = ids[:, :-1], ids[:, 1:]
    with pytest.warns(UserWarning, match=r"shifted by one.*TokenClassification\(\)"):
        fk.estimate(Tokens(), [shifted], likelihood=fk.CausalLM())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ours = fk.estimate(Tokens(), [shifted], likelihood=fk.TokenClassification())
        theirs = fk.estimate(Tokens(), [(ids, ids)], likelihood=fk.CausalLM())
        fk.estimate(Tokens(), [(torch.ones_like(ids),) * 2], likelihood=fk.CausalLM())  # text that repeats itself
    error, name = worst_error(ours, theirs, torch.float32)
    assert error < LIMIT[torch.float32], name


def test_probabilities_in_place_of_logits_are_noted():
    model = nn.Sequential(net(), nn.Softmax(-1))
    with pytest.warns(UserWarning, match="look like probabilities.*Classification takes logits") as warned:
        fk.estimate(model, [(inputs(N, 4), CLASSES)], likelihood=fk.Classification())
    assert [one.filename for one in warned if "look like" in str(one.message)] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fk.estimate(nn.Sequential(net(), nn.LogSoftmax(-1)), [(inputs(N, 4), CLASSES)], likelihood=fk.Classification())


@pytest.mark.parametrize("make", [zoo.llama, zoo.t5, zoo.vit])
def test_pairs_of_a_transformers_model(make):
    """Its own loss is compared, and a decoder gets its labels, as from a mapping."""
    specimen = make()
    batch = specimen.batch()
    (first,) = set(batch) - {"labels", "attention_mask"}
    mapping = {first: batch[first], "labels": batch["labels"]}
    ours, theirs = (fk.estimate(specimen.model, [one]) for one in ((batch[first], batch["labels"]), mapping))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert fk.verify(specimen.model, [(batch[first], batch["labels"])]).ok


def test_the_own_loss_of_a_pair_is_compared():
    model = zoo.mixtral("grouped_mm").model
    model.config.output_router_logits = True
    batch = zoo.text_batch()
    with pytest.raises(ValueError, match="by the model itself: they should agree"):
        fk.estimate(model, [(batch["input_ids"], batch["labels"])])


@pytest.mark.parametrize("labels", [torch.tensor([0, 1, 2, 1, 0]), torch.rand(5, 3)], ids=["classes", "numbers"])
def test_the_config_of_a_transformers_model_comes_back_as_found(labels):
    """Called with labels, transformers sets its ``problem_type`` by them, and keeps it."""
    model = zoo.bert_classifier().model
    fk.verify(model, [{**zoo.text_batch(), "labels": labels}])
    assert model.config.problem_type is None


def test_a_named_likelihood_of_labels_that_the_model_itself_does_not_take():
    specimen = zoo.llama()
    batch = {**specimen.batch(), "labels": torch.rand(5, 7, zoo.V)}
    statistics = fk.estimate(specimen.model, [batch], likelihood=fk.MultiLabel())
    assert fk.verify(specimen.model, [batch], statistics, likelihood=fk.MultiLabel()).ok


@pytest.mark.parametrize("axis", ["rows", "mean"])
def test_logits_that_are_not_of_the_examples_are_refused(axis):
    change = {"rows": lambda z: z.flatten(0, 1), "mean": lambda z: z.mean(0)}[axis]
    words = "the first axis must be that of the examples"
    refused((inputs(N, L, 4), POSITIONS), fk.TokenClassification(), words, model=Returning(change))


@pytest.mark.parametrize("form", [lambda z: z.detach(), torch.no_grad()(lambda z: z * 2)], ids=["detached", "no_grad"])
def test_outputs_that_are_cut_off_from_the_model_are_refused_before_the_pass(form):
    def batches():
        yield inputs(N, 4), CLASSES
        raise AssertionError("the pass went on")

    with pytest.raises(ValueError, match=r"^the outputs of Returning are cut off from the parameters.*detach\(\)"):
        fk.estimate(Returning(form), batches(), likelihood=fk.Classification())


def test_behind_integer_weights_the_pass_itself_must_tell():
    """A quantised linear whose product is a function of its own has no gradient of autograd's, and is served."""

    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_features, self.out_features = 4, 3
            self.weight = nn.Parameter(torch.randint(-9, 9, (3, 4), dtype=torch.int8), requires_grad=False)

        def forward(self, x):
            return x @ self.weight.to(x.dtype).T / 10

    model = nn.Sequential(Quantised())
    statistics = fk.estimate(model, [(inputs(N, 4), CLASSES)], likelihood=fk.Classification(), parameters="all")
    assert statistics["0.weight"].count_nonzero() > 0


def test_one_number_is_the_loss_of_a_batch_of_one():
    def mean(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    batches = [(x[None], y[None]) for x, y in zip(inputs(N, 4), CLASSES, strict=True)]
    whole = fk.DiagonalFisher(unit="batch")
    ours = fk.estimate(net(), batches, whole, likelihood=mean)
    theirs = fk.estimate(net(), batches, whole, likelihood=fk.Classification())
    error, name = worst_error(ours, theirs)
    assert error < LIMIT[torch.float64], name
    refused((inputs(N, 4), CLASSES), mean, "came one number", estimator=whole)


FORMS = {
    "a list": (lambda losses: list(losses), "a list of 5 tensors: write torch.stack(losses)"),
    "with logits": (lambda losses: (losses, losses[:, None]), "came tuple: return the losses alone"),
    "an array": (lambda losses: losses.detach().numpy(), "came ndarray: return the losses alone"),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_function_that_returns_no_tensor(form):
    change, words = FORMS[form]

    def losses(model, batch):
        return change(F.cross_entropy(model(batch[0]), batch[1], reduction="none"))

    refused((inputs(N, 4), CLASSES), losses, words)


NO_CLASSES = {
    "one-hot": (F.one_hot(CLASSES, C), ["labels of shape [N, 3]", "a tensor of shape [N].", "labels.argmax(-1)"]),
    "soft": (torch.rand(N, C), ["labels of shape [N, 3]", "soft labels", "as a function"]),
    "floats": (CLASSES.float(), ["the labels are float32", "integers", "labels.long()", "Regression()"]),
    "for each position": (CLASSES[:, None].expand(N, 2), ["labels of shape [N, 2]", "a tensor of shape [N]."]),
}


@pytest.mark.parametrize("case", NO_CLASSES)
@every_kind
def test_what_is_no_class_number_is_told_apart(case, kind):
    labels, words = NO_CLASSES[case]
    refused((inputs(N, 4), labels), fk.Classification(), *words, estimator=ESTIMATORS[kind])


@pytest.mark.parametrize("labels", [torch.zeros(N).long(), torch.tensor([0, 1, 1, 0, 1])], ids=["zeros", "both"])
def test_one_logit_has_no_classes(labels):
    """A softmax over one class is 1, and its loss 0 whatever the model says."""
    words = "logits [N, C] of at least two classes", "fishkern.MultiLabel()"
    refused((inputs(N, 4), labels), fk.Classification(), "got [N, 1]", *words, model=net(O=1))
    flat = nn.Sequential(net(O=1), nn.Flatten(0))
    refused((inputs(N, 4), labels), fk.Classification(), "got [N]", *words, model=flat)


def yes_or_no(output, label):
    return F.binary_cross_entropy_with_logits(output.flatten(), label.flatten().to(output))


@pytest.mark.parametrize("shape", [(N,), (N, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32], ids=str)
def test_one_logit_is_a_yes_or_no(dtype, shape):
    labels = torch.tensor([0, 1, 1, 0, 1]).to(dtype).view(shape)
    assert_equals_the_loop(net(O=1), (inputs(N, 4), labels), fk.MultiLabel(), yes_or_no)
    assert_equals_the_loop(
        nn.Sequential(net(O=1), nn.Flatten(0)), (inputs(N, 4), labels), fk.MultiLabel(), yes_or_no
    )  # fmt: skip


@pytest.mark.parametrize("label", [2.0, -1.0, -100.0, float("nan")])
def test_a_yes_or_no_outside_0_and_1_is_named_by_its_row(label):
    labels = torch.ones(N, C)
    labels[2, 1] = label
    refused((inputs(N, 4), labels), fk.MultiLabel(), f"row 2 of a batch of 5 has the label {label}", "between 0 and 1")


def squared_error(output, label):
    return (output - label).square().mean()


@pytest.mark.parametrize("shape", [(N, 2, 4), (N, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("fisher_type", ["empirical", "type-2"])
@pytest.mark.parametrize(("likelihood", "loss"), [(fk.Regression(), squared_error), (fk.MultiLabel(), yes_or_no)])
def test_numbers_of_any_rank(shape, fisher_type, likelihood, loss):
    labels = inputs(*shape[:-1], C).sigmoid()
    if fisher_type == "empirical":
        assert_equals_the_loop(net(), (inputs(*shape), labels), likelihood, loss)
        return
    whole = fk.estimate(net(), [(inputs(*shape), labels)], fk.DiagonalFisher("type-2"), likelihood=likelihood)
    model = nn.Sequential(net(), nn.Flatten())  # the same numbers on one axis
    flat = fk.estimate(
        model, [(inputs(*shape), labels.flatten(1))], fk.DiagonalFisher("type-2"), likelihood=likelihood
    )  # fmt: skip
    error, name = worst_error({name.removeprefix("0."): value for name, value in flat.items()}, whole)
    assert error < LIMIT[torch.float64], name


@pytest.mark.parametrize("shape", [(N, 3, 4), (N, 12), (N, 3), (N, 1), (N,)], ids=str)
@pytest.mark.parametrize("kind", [fk.Regression, fk.MultiLabel])
def test_numbers_are_never_reshaped_or_broadcast(kind, shape):
    """``[N, 3, 4]`` has as many entries as ``[N, 4, 3]``, and means another thing."""
    words = f"labels of shape [{', '.join(['N', *map(str, shape[1:])])}]", "outputs of shape [N, 4, 3]"
    refused((inputs(N, 4, 4), torch.zeros(shape)), kind(), *words, "one label for each entry")


@pytest.mark.parametrize("output", [(N, 1), (N,)], ids=str)
@pytest.mark.parametrize("label", [(N, 1), (N,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32], ids=str)
def test_one_number_for_each_example_with_or_without_its_axis(output, label, dtype):
    model = net(O=1) if len(output) == 2 else nn.Sequential(net(O=1), nn.Flatten(0))
    labels = torch.tensor([0, 3, 1, 1, 2]).to(dtype).view(label)

    def loss(output, label):
        return (output.flatten() - label.flatten()).square().mean()

    assert_equals_the_loop(model, (inputs(N, 4), labels), fk.Regression(), loss)


POSITIONS = torch.tensor([[0, 2, 1, 1], [1, -100, 0, 2], [2, 2, -100, -100], [0, 0, 1, 0], [1, 2, 0, -100]])


class ClassesFirst(nn.Module):
    """As a convolution has them, ``[N, C, L]``."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x):
        return self.net(x).movedim(-1, 1)


def by_position(output, label):
    return F.cross_entropy(output.reshape(-1, output.shape[-1]), label.flatten())


def by_position_first(output, label):
    return F.cross_entropy(output, label)


def test_classes_on_the_axis_of_torch_are_told_from_those_of_transformers():
    batch = inputs(N, L, 4), POSITIONS
    assert_equals_the_loop(net(), batch, fk.TokenClassification(), by_position)
    assert_equals_the_loop(ClassesFirst(), batch, fk.TokenClassification(), by_position_first)
    pictures = inputs(N, 2, L, 4), torch.stack([POSITIONS, POSITIONS.flip(1)], 1)
    assert_equals_the_loop(net(), pictures, fk.TokenClassification(), by_position)
    assert_equals_the_loop(ClassesFirst(), pictures, fk.TokenClassification(), by_position_first)


def test_weights_of_labels_have_the_precision_of_the_logits():
    """The squared gradients of all labels add up to the expectation: ``(diag(p) - p p^T) / T^2`` for each position."""
    logits = inputs(N, L, C).requires_grad_()
    squares = torch.zeros_like(logits[..., 0])
    for loss in Categorical(logits, torch.zeros(N, L, dtype=torch.long), mean=True).label_losses():
        (grad,) = torch.autograd.grad(loss.sum(), logits, retain_graph=True)
        squares += grad[..., 1].square()
    p = logits.detach().softmax(-1)[..., 1]
    torch.testing.assert_close(squares, p * (1 - p) / L**2, rtol=1e-12, atol=0)


@pytest.mark.parametrize("fisher_type", ["empirical", "mc", "type-2"])
def test_every_kind_of_fisher_is_the_same_wherever_the_classes_are(fisher_type):
    batch, likelihood = (inputs(N, L, 4), POSITIONS), fk.TokenClassification()
    first = fk.estimate(ClassesFirst(), [batch], fk.DiagonalFisher(fisher_type), likelihood=likelihood)
    last = fk.estimate(net(), [batch], fk.DiagonalFisher(fisher_type), likelihood=likelihood)
    error, name = worst_error({name.removeprefix("net."): value for name, value in first.items()}, last)
    assert error < LIMIT[torch.float64], name


@pytest.mark.parametrize("likelihood", [fk.Regression(), fk.MultiLabel()])
def test_drawn_labels_of_many_axes_are_those_of_one(likelihood):
    x, drawn = inputs(N, 2, 4), fk.DiagonalFisher("mc", mc_samples=3)
    many = fk.estimate(net(), [(x, None)], drawn, likelihood=likelihood)
    one = fk.estimate(nn.Sequential(net(), nn.Flatten()), [(x, None)], drawn, likelihood=likelihood)
    error, name = worst_error({name.removeprefix("0."): value for name, value in one.items()}, many)
    assert error < LIMIT[torch.float64], name


def test_as_many_classes_as_positions_are_refused_or_said():
    batch = inputs(N, C, 4), POSITIONS[:, :C]
    for model in (net(), ClassesFirst()):
        words = "logits [N, 3, 3] with labels [N, 3]", "class_axis=-1", "class_axis=1"
        refused(batch, fk.TokenClassification(), *words, model=model)
    assert_equals_the_loop(net(), batch, fk.TokenClassification(class_axis=-1), by_position)
    assert_equals_the_loop(ClassesFirst(), batch, fk.TokenClassification(class_axis=1), by_position_first)
    with pytest.raises(ValueError, match="class_axis must be None, -1 or 1, got 2"):
        fk.TokenClassification(class_axis=2)


@pytest.mark.parametrize(("make", "loss"), [(net, by_position), (ClassesFirst, by_position_first)])
def test_the_first_batch_settles_where_the_classes_are(make, loss):
    """Rows of other lengths may have as many positions as there are classes."""
    batches = [(inputs(N, L, 4), POSITIONS), (inputs(N, C, 4), POSITIONS[:, :C])]
    both = fk.estimate(make(), batches, likelihood=fk.TokenClassification())
    parts = [
        assert_equals_the_loop(make(), batches[0], fk.TokenClassification(), loss),
        assert_equals_the_loop(make(), batches[1], fk.TokenClassification(class_axis=-1 if make is net else 1), loss),
    ]
    error, name = worst_error(both, fk.merge(*parts))
    assert error < LIMIT[torch.float64], name
    assert fk.verify(make(), batches, both, likelihood=fk.TokenClassification()).ok


def test_a_model_of_transformers_has_its_classes_last_however_many():
    model = zoo.bert_for("TokenClassification", num_labels=7)
    batch = zoo.text_batch()
    batch["labels"] = torch.where(batch["labels"] < 0, -100, batch["labels"] % 7)
    for likelihood in (None, fk.TokenClassification()):
        assert fk.estimate(model, [batch], likelihood=likelihood).count == 5


@pytest.mark.parametrize(
    ("logits", "labels", "words"),
    [
        ((N, L, C), (N, L + 1), ["[N, 4, 3]", "[N, 5]"]),
        ((N, L, C), (N,), ["[N, 4, 3]", "[N]"]),
        ((N, C), (N,), ["[N, 3]", "Classification()"]),
        ((N, L, C), (N, L, C), ["one-hot", "argmax(-1)"]),
    ],
    ids=str,
)
def test_labels_of_positions_that_do_not_fit(logits, labels, words):
    model = net()
    refused((inputs(*logits[:-1], 4), torch.zeros(labels).long()), fk.TokenClassification(), *words, model=model)


def test_labels_longer_than_the_logits_are_refused():
    """``logits_to_keep`` and the like: which of the labels they speak of is not guessed."""

    class Short(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(zoo.V, 6), nn.Linear(6, zoo.V)

        def forward(self, input_ids):
            return self.head(self.embed(input_ids))[:, self.cut :]

    ids = torch.randint(zoo.V, (N, 6))
    model = Short()
    for model.cut, T in ((2, 4), (slice(None).start, 6)):
        batch = {"input_ids": ids, "labels": ids}
        if T == 6:
            assert fk.estimate(model, [batch], likelihood=fk.CausalLM()).count == N
            longer = {"input_ids": ids, "labels": ids[:, 1:]}
            with pytest.raises(ValueError, match="6 positions for 5 labels"):
                fk.estimate(model, [longer], likelihood=fk.CausalLM())
        else:
            with pytest.raises(ValueError, match="4 positions for 6 labels.*-100"):
                fk.estimate(model, [batch], likelihood=fk.CausalLM())


Named = namedtuple("Named", ["logits", "hidden"])
OUTPUTS = {
    "a mapping": lambda z: {"logits": z, "hidden": z},
    "a tuple": lambda z: (z, None),
    "a list": lambda z: [z, z],
    "a tuple behind a loss": lambda z: (z.sum(), z),
    "a namedtuple": lambda z: Named(z, z),
    "an object": lambda z: SimpleNamespace(logits=z),
    "a mapping of transformers": lambda z: transformers.modeling_outputs.SequenceClassifierOutput(logits=z),
}


class Returning(nn.Module):
    def __init__(self, form) -> None:
        super().__init__()
        self.net, self.form = net(), form

    def forward(self, x):
        return self.form(self.net(x))


@pytest.mark.parametrize("form", OUTPUTS)
def test_logits_in_whatever_a_model_returns(form):
    whole, plain = Returning(OUTPUTS[form]), net()
    ours = fk.estimate(whole, [(inputs(N, 4), CLASSES)], likelihood=fk.Classification())
    theirs = fk.estimate(plain, [(inputs(N, 4), CLASSES)], likelihood=fk.Classification())
    assert all(torch.equal(ours[f"net.{name}"], theirs[name]) for name in theirs)


def test_which_tensor_of_a_tuple_is_taken_is_said_once():
    """``(features, logits)`` would be as good a habit."""
    batches = [(inputs(N, 4), CLASSES)] * 2
    with pytest.warns(UserWarning, match=r"first tensor was taken.*shape \(1, 3\).*not \(1, 6\)") as warned:
        fk.estimate(Returning(lambda z: (z, z.repeat(1, 2))), batches, likelihood=fk.Classification())
    assert len([one for one in warned if "was taken" in str(one.message)]) == 1
    for form in (lambda z: (z, None), lambda z: (z, z.sum(1)), lambda z: (z.sum(), z), lambda z: Named(z, z)):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            fk.estimate(Returning(form), batches, likelihood=fk.Classification())


Unnamed = namedtuple("Unnamed", ["hidden", "scores"])
NO_LOGITS = {
    "a mapping of others": (lambda z: {"out": z, "aux": z}, ["dict with 'out', 'aux'", "'logits'"]),
    "a namedtuple of others": (lambda z: Unnamed(z, z), ["Unnamed with 'hidden', 'scores'"]),
    "a tuple of others": (lambda z: ("logits", z), ["a tuple of str, Tensor", "begins with them"]),
    "nothing": (lambda z: None, ["NoneType"]),
    "a loss beside others": (lambda z: {"loss": z.sum(), "predictions": z}, ["dict with 'loss', 'predictions'"]),
    "a loss alone": (
        lambda z: transformers.modeling_outputs.CausalLMOutput(loss=z.sum()), ["fused loss (Liger)", "likelihood="]
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", NO_LOGITS)
def test_a_model_that_returns_no_logits_is_told_what_was_seen(form):
    make, words = NO_LOGITS[form]
    refused((inputs(N, 4), CLASSES), fk.Classification(), "Returning returned no logits", *words, model=Returning(make))


@pytest.mark.parametrize("make", [zoo.bert_classifier, zoo.t5, zoo.llama])
def test_transformers_models_that_return_tuples(make):
    """``return_dict=False``, in the config or in the batch; their own loss is read, too."""
    specimen = make()
    batch = specimen.batch()
    expected = fk.estimate(specimen.model, [batch])
    batches = [{**batch, "return_dict": False}]
    if make is zoo.bert_classifier:  # the others fail by themselves where the config says so
        specimen.model.config.return_dict = False
        batches.append(batch)
    for one in batches:
        found = fk.estimate(specimen.model, [one])
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert fk.verify(specimen.model, [one]).ok


def test_a_tuples_own_loss_is_compared():
    model = zoo.bert_classifier().model
    model.config.return_dict = False

    def penalise(module, args, outputs):
        return (outputs[0] + 1, *outputs[1:]) if outputs[0].ndim == 0 else outputs

    model.register_forward_hook(penalise)
    with pytest.raises(ValueError, match="by the model itself: they should agree"):
        fk.estimate(model, [zoo.class_batch()])


def test_answers_in_a_tuple():
    model = zoo.bert_for("QuestionAnswering")
    batch = zoo.text_batch()
    del batch["labels"]
    batch |= {"start_positions": torch.tensor([0, 1, 2, 0, 1]), "end_positions": torch.tensor([6, 1, 2, 2, 2])}
    expected = fk.estimate(model, [batch])
    model.config.return_dict = False
    for starts in (batch["start_positions"].int(), batch["start_positions"].tolist()):
        found = fk.estimate(model, [{**batch, "start_positions": starts}])
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(ValueError, match="the answer of example 0 of the batch lies outside"):
        fk.estimate(model, [row({**batch, "end_positions": torch.tensor([9] * 5)}, 0)])
