"""A model or batch that cannot be estimated is refused with one line that names the place."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fishkern as fk
from tests.support import zoo

transformers = pytest.importorskip("transformers")


@contextmanager
def refused(kind, *words: str):
    with pytest.raises(kind) as raised:
        yield
    message = str(raised.value)
    assert "\n" not in message
    for word in words:
        assert word in message, f"{word!r} is not in {message!r}"


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3))


def pair(N: int = 3) -> tuple:
    return torch.randn(N, 4), torch.arange(N) % 3


def classify(batches, estimator=None, **options) -> fk.Statistics:
    return fk.estimate(linear(), batches, estimator, **{"likelihood": fk.Classification(), **options})


@pytest.mark.parametrize("batches", [[], iter(()), torch.utils.data.DataLoader([])], ids=["list", "iterator", "loader"])
def test_no_data(batches):
    with refused(ValueError, "no example", "empty"):
        classify(batches)


@pytest.mark.parametrize("name", ["mc_samples", "seed", "max_label_passes"])
def test_numbers_of_a_recipe_are_plain_before_the_pass(name):
    """The header of a file holds them: one of another kind would be noticed when all the work is done."""
    assert type(getattr(fk.DiagonalFisher("mc", **{name: torch.tensor(3)}), name)) is int
    with refused(TypeError, f"{name} must be an integer", "2.5"):
        fk.DiagonalFisher("mc", **{name: 2.5})


def test_a_seed_of_another_library():
    drawn = [classify([pair()], fk.DiagonalFisher("mc", seed=seed)) for seed in (3, torch.tensor(3))]
    assert drawn[0].provenance == drawn[1].provenance
    sketched = fk.SketchedFisher(draws=torch.tensor(2), seed=torch.tensor(1).numpy())
    assert (type(sketched.draws), type(sketched.seed)) == (int, int)


NO_BATCH = {
    "a batch instead of batches": ({"input_ids": torch.ones(2, 3)}, ["one batch (a dict)", "Pass [batch]"]),
    "a tensor instead of batches": (torch.ones(2, 3), ["one batch (a Tensor)", "Pass [batch]"]),
    "no batches": (None, ["batches must be an iterable of batches, such as a DataLoader, got None"]),
    "a pair instead of batches": (pair(), ["batch 0 is a Tensor", "One batch alone is passed as [batch]"]),
    "a tensor": ([torch.ones(2, 3)], ["batch 0 is a Tensor", "mapping", "pair"]),
    "nothing": ([pair(), None], ["batch 1 is a NoneType"]),
    "three": ([(*pair(), 1)], ["batch 0 is a tuple of 3", "pair (inputs, labels)", "function"]),
    "no row": ([pair(), pair(0)], ["batch 1 holds no example", "size 0"]),
    "no tensor": ([{"input_ids": [[1, 2], [3, 4]]}], ["batch 0 holds no tensor", "return_tensors='pt'"]),
    "no axis": ([{"input": torch.tensor(1.0)}], ["batch 0"]),
    "different sizes": ([(torch.ones(3, 4), torch.ones(2))], ["3 examples by 'inputs'", "'labels' is", "size 2"]),
}


@pytest.mark.parametrize("case", NO_BATCH)
def test_what_is_no_batch(case):
    batches, words = NO_BATCH[case]
    with refused((TypeError, ValueError), *words):
        classify(batches)


@pytest.mark.parametrize("kind", [fk.Classification, fk.Regression, fk.MultiLabel, fk.TokenClassification])
@pytest.mark.parametrize("make", ["pair", "mapping"])
def test_missing_labels(kind, make):
    input = torch.randn(2, 5, 4) if kind is fk.TokenClassification else torch.randn(3, 4)
    with refused(ValueError, "labels"):
        classify([(input, None) if make == "pair" else {"input": input}], likelihood=kind())


def test_missing_labels_of_language_models():
    for specimen, words in ((zoo.llama(), ["causal", "'labels'", "-100"]), (zoo.bert(), ["'labels'"])):
        batch = specimen.batch()
        del batch["labels"]
        with refused(ValueError, *words):
            fk.estimate(specimen.model, [batch])


ESTIMATORS = {
    "empirical": fk.DiagonalFisher(),
    "mc": fk.DiagonalFisher("mc"),
    "type-2": fk.DiagonalFisher("type-2"),
    "batch": fk.DiagonalFisher(unit="batch"),
    "sketched": fk.SketchedFisher(),
}


@pytest.mark.parametrize("place", [0, 1, 4, slice(None)], ids=str)
@pytest.mark.parametrize("kind", ESTIMATORS)
def test_an_example_without_a_label_is_named(kind, place):
    """Five examples in batches of at most three; place 4 is row 1 of the second."""
    model = zoo.llama(vocab_size=5).model
    batch = {key: value % 5 for key, value in zoo.text_batch(low=7).items()}
    batch["labels"][place] = -100
    batches = [{key: value[rows] for key, value in batch.items()} for rows in (slice(0, 3), slice(3, 5))]
    named = place if isinstance(place, int) else 0
    with refused(ValueError, f"the loss of example {named} ", "is nan", "without a label"):
        fk.estimate(model, batches, ESTIMATORS[kind])


def test_a_lone_example_without_a_label_is_one():
    batch = {key: value[:1] for key, value in zoo.text_batch().items()}
    batch["labels"][:] = -100
    with refused(ValueError, "the loss of example 0 (row 0 of its batch) is nan: "):
        fk.estimate(zoo.llama().model, [batch])


@pytest.mark.filterwarnings("ignore:.*slow exact path")
def test_an_example_without_a_label_is_named_where_all_is_looped():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    batch = zoo.text_batch()
    batch["labels"][3] = -100
    with refused(ValueError, "the loss of example 3 ", "is nan"):
        fk.estimate(peft.get_peft_model(zoo.llama().model, config), [batch])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("kind", ["empirical", "batch", "sketched"])
def test_a_loss_that_is_not_finite_is_named(kind, value):
    def losses(model, batch):
        loss = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
        return torch.where(batch[0][:, 0] == 7, value, loss)

    batches = [pair(), pair(), pair()]
    batches[2][0][1, 0] = 7
    with refused(ValueError, "the loss of example 7 (row 1 of its batch)", str(value)):
        classify(batches, ESTIMATORS[kind], likelihood=losses)


def test_nothing_to_estimate():
    with refused(ValueError, "2 parameters", "none of them requires a gradient", "'all'"):
        fk.estimate(linear().requires_grad_(False), [pair()])
    with refused(ValueError, "2 parameters", "parameters= chooses none"):
        classify([pair()], parameters=lambda name, parameter: "lora" in name)
    with refused(ValueError, "0 parameters"):
        fk.estimate(nn.Tanh(), [pair()])
    unused = nn.ModuleDict({"used": nn.Linear(4, 3), "spare": nn.Linear(4, 3)})
    with refused(ValueError, "depends on none of the 2 requested parameters", "spare.weight"):
        fk.estimate(unused, [pair()], parameters=lambda name, _: "spare" in name,
                    likelihood=lambda model, batch: model["used"](batch[0]).square().sum(1))  # fmt: skip


class Int8(nn.Module):
    """A quantised linear, or another module with an integer parameter."""

    def __init__(self, linear: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randint(-9, 9, (4, 4), dtype=torch.int8), requires_grad=False)
        if linear:
            self.in_features, self.out_features = 4, 4

    def forward(self, x):
        return x @ self.weight.to(x.dtype).T / 10


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.expert = Int8(linear=True)

    def forward(self, x):
        taken = (x[:, 0] > 0).nonzero()[:, 0].repeat_interleave(2)[1:]  # as many rows as the data says
        return x.index_put((taken,), self.expert(x[taken]))


@pytest.mark.filterwarnings("ignore:.*slow exact path")
@pytest.mark.parametrize(
    "make, estimator",
    [
        (lambda: Int8(linear=False), fk.DiagonalFisher()),
        (lambda: Int8(linear=True), fk.SketchedFisher()),
        (lambda: Int8(linear=True), fk.DiagonalFisher(unit="batch")),
        (Routed, fk.DiagonalFisher()),
    ],
    ids=["no linear", "sketched", "batch", "routed"],
)
def test_an_integer_parameter_that_cannot_be_served(make, estimator):
    model = nn.Sequential(nn.Linear(4, 4), make(), nn.Linear(4, 3))
    with refused(fk.UnsupportedModuleError, "1.", "weight", "parameters="):
        fk.estimate(model, [pair(5)], estimator, likelihood=fk.Classification(), parameters="all")


@pytest.mark.parametrize(
    "more, words",
    [
        ({"position_ids": torch.tensor([[0, 1, 2, 3, 4], [0, 1, 0, 1, 2]])}, ["attention_mask", "leave it out"]),
        ({"cu_seq_lens_q": torch.tensor([0, 2])}, ["cu_seq_lens_q must ascend from 0", "10", "from 0 to 2"]),
        ({"seq_idx": torch.tensor([[0, 0, 0, 1, 1]] * 2), "side": torch.zeros(3)}, ["'side'", "[2, 5, ...]"]),
    ],
)
def test_packed_rows(more, words):
    """Documents that the model does not keep apart, or that cannot be cut out of the rows."""
    with refused(ValueError, "rows", *words):
        fk.estimate(zoo.llama().model, [{**zoo.text_batch(2, 5), **more}])


@pytest.mark.parametrize("padding", [[1, 1], [0, 0]], ids=str)
def test_left_padded_position_ids_are_not_packed(padding):
    positions = torch.tensor([[*padding, 0, 1, 2]] * 2)
    mask = torch.tensor([[0, 0, 1, 1, 1]] * 2)
    batch = {**zoo.text_batch(2, 5), "position_ids": positions, "attention_mask": mask}
    assert fk.estimate(zoo.llama().model, [batch]).count == 2


def test_a_model_that_keeps_its_logits_back():
    class FusedForCausalLM(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config, self.embed = SimpleNamespace(), nn.Embedding(zoo.V, 3)

        def forward(self, input_ids, attention_mask, labels=None):
            return SimpleNamespace(logits=None, loss=self.embed(input_ids).square().mean())

    with refused(ValueError, "returned no logits", "fused loss", "likelihood="):
        fk.estimate(FusedForCausalLM(), [zoo.text_batch()])


def test_what_has_no_likelihood():
    with refused(ValueError, "cannot tell which loss", "Sequential", "fishkern.CausalLM()", "function (model, batch)"):
        fk.estimate(linear(), [pair()])
    with refused(ValueError, "classification needs logits [N, C]"):
        classify([(torch.randn(2, 5, 4), torch.zeros(2).long())])


def test_batch_norm_runs_in_evaluation_mode():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches, options = [pair()], {"likelihood": fk.Classification()}
    assert fk.estimate(model, batches, **options) == fk.estimate(model.eval(), batches, **options)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_batch_norm_without_running_statistics():
    model = nn.Sequential(linear(), nn.BatchNorm1d(3, track_running_stats=False))
    with refused(fk.UnsupportedModuleError, "'1' (BatchNorm1d)", "no running statistics"):
        fk.estimate(model, [pair()], likelihood=fk.Classification())


def test_a_dispatched_model():
    model = linear()
    model.hf_device_map = {"0": 0, "1": 1}
    with refused(fk.UnsupportedModuleError, "Sequential", "hf_device_map", "['0', '1']", "onto one device"):
        fk.estimate(model, [pair()], likelihood=fk.Classification())
    model.hf_device_map = {"": "cpu"}
    assert fk.estimate(model, [pair()], likelihood=fk.Classification()).count == 3
    model[0]._hf_hook = SimpleNamespace(offload=True)
    with refused(fk.UnsupportedModuleError, "offloads the weights of '0'"):
        fk.estimate(model, [pair()], likelihood=fk.Classification())
    model[0]._hf_hook = SimpleNamespace(hooks=(SimpleNamespace(), SimpleNamespace(offload=True)))
    with refused(fk.UnsupportedModuleError, "offloads the weights of '0'"):
        fk.estimate(model, [pair()], likelihood=fk.Classification())
    with refused(fk.UnsupportedModuleError, "meta device"):
        fk.estimate(linear().to("meta"), [pair()], likelihood=fk.Classification())


def test_what_accelerate_dispatches(tmp_path):
    """Its own hooks: where nothing is moved the model works, and offloaded weights are refused by name."""
    accelerate = pytest.importorskip("accelerate")
    options, batches, model = {"likelihood": fk.Classification()}, [pair()], linear()
    whole = fk.estimate(model, batches, **options)
    hooked = fk.estimate(accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True), batches, **options)
    for name in whole:  # another path: accelerate puts a forward of its own in front of the linear's
        assert torch.allclose(hooked[name], whole[name], rtol=1e-5, atol=1e-7)
    two = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    spread = accelerate.dispatch_model(two, {"0": "cpu", "1": "disk"}, offload_dir=tmp_path / "spread")
    for model in (
        accelerate.cpu_offload(linear(), execution_device="cpu"),
        accelerate.disk_offload(linear(), tmp_path / "disk", execution_device="cpu"),
        accelerate.cpu_offload_with_hook(linear(), execution_device="cpu")[0],
        spread,
    ):
        with refused(fk.UnsupportedModuleError, "offloads the weights of", "device_map={'': 0}", "fully_shard"):
            fk.estimate(model, [pair()], **options)


def test_a_model_on_two_devices_is_refused_before_any_work_and_the_ways_out_work(tmp_path):
    """As ``device_map="auto"`` leaves it: half on the CPU, and half where there are no values to compute with."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    config = transformers.LlamaConfig(
        vocab_size=17, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    ids = torch.arange(12).view(2, 6)
    read = []

    def batches():
        read.append(1)
        yield {"input_ids": ids, "labels": ids}

    def load(device_map):
        return transformers.LlamaForCausalLM.from_pretrained(tmp_path / "model", device_map=device_map)

    spread = load(None)
    spread.model.layers[1].to("meta")
    spread.hf_device_map = {"model.layers.1": "meta", "": "cpu"}
    spread.register_forward_pre_hook(lambda *_: read.append("ran"))
    for run in (
        lambda: fk.estimate(spread, batches(), checkpoint=tmp_path / "fisher.part"),
        lambda: fk.prepare(spread, next(batches())),
        lambda: fk.verify(spread, batches()),
        lambda: fk.plan(spread, {"input_ids": ids, "labels": ids}),
    ):
        read.clear()
        with refused(fk.UnsupportedModuleError, "hf_device_map", "['cpu', 'meta']", "onto one device", "device_map="):
            run()
        assert read in ([], [1])  # what the call itself was given
    assert not (tmp_path / "fisher.part").exists()
    assert all(parameter.grad is None for parameter in spread.parameters())

    whole = fk.estimate(load(None), batches())
    (tmp_path / "sums").mkdir()
    one = load({"": "cpu"})  # the message names the GPU 0
    for options in (
        {},
        {"accumulate_on": tmp_path / "sums"},
        {"parts": [[name for name in whole if "layers" in name], [name for name in whole if "layers" not in name]]},
    ):
        found = fk.estimate(one, [next(batches())], **options)
        assert all(torch.equal(found[name], whole[name]) for name in whole)


LOSSES = {
    "a mean": (lambda loss: loss.mean(), "one number", "do not sum or average over the batch"),
    "a mean in a list": (lambda loss: loss.mean()[None], "one number", "do not sum or average over the batch"),
    "two axes": (lambda loss: torch.stack([loss, loss], 1), "(3, 2)", "losses.flatten(1).mean(1)"),
    "a column": (lambda loss: loss[:, None], "(3, 1)", "losses.flatten(1).mean(1)"),
    "positions in a row": (lambda loss: loss.repeat_interleave(3), "9 values", "losses.view(3, -1).mean(1)"),
    "a float": (lambda loss: loss.mean().item(), "float", "do not sum or average over the batch"),
}


@pytest.mark.parametrize("case", LOSSES)
@pytest.mark.parametrize("kind", ["empirical", "batch", "sketched"])
def test_a_function_that_does_not_give_one_loss_for_each_example(kind, case):
    change, got, way_out = LOSSES[case]

    def losses(model, batch):
        return change(F.cross_entropy(model(batch[0]), batch[1], reduction="none"))

    with refused(ValueError, "one loss for each example", "a batch of 3", got, way_out):
        classify([pair()], ESTIMATORS[kind], likelihood=losses)


@pytest.mark.parametrize(
    "losses",
    [
        lambda model, batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none").detach(),
        torch.no_grad()(lambda model, batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none")),
        lambda model, batch: torch.zeros(len(batch[0])),
    ],
    ids=["detached", "no_grad", "constant"],
)
@pytest.mark.parametrize("kind", ["empirical", "batch", "sketched"])
def test_losses_that_are_cut_off_from_the_model_are_refused_before_the_pass(kind, losses):
    def batches():
        yield pair()
        raise AssertionError("the pass went on")

    with refused(ValueError, "cut off from the parameters", "detach()"):
        classify(batches(), ESTIMATORS[kind], likelihood=losses)


def outputs_and_labels(outputs, labels):
    return outputs


def of_three(model, inputs, labels):
    return inputs


class Criterion(nn.Module):
    def forward(self, y_pred, y_true):
        return y_pred


LIKELIHOODS = {
    "a class": (fk.CausalLM, ["the class CausalLM", "call it, likelihood=fishkern.CausalLM()."]),
    "a word": ("classification", ["'classification'", "write likelihood=fishkern.Classification()."]),
    "another word": ("Masked-LM", ["write likelihood=fishkern.MaskedLM()."]),
    "a word of torch": ("mse_loss", ["write likelihood=fishkern.Regression()."]),
    "an unknown word": ("hinge", ["write one of fishkern.CausalLM(), fishkern.MaskedLM()"]),
    "a loss": (nn.CrossEntropyLoss(), ["torch's CrossEntropyLoss", "fishkern.Classification()",
                                       'functional.cross_entropy(model(batch[0]), batch[1], reduction="none")']),
    "a class of losses": (nn.MSELoss, ["torch's MSELoss", "fishkern.Regression()"]),
    "a function of torch": (F.cross_entropy, ["torch's cross_entropy", "fishkern.Classification()"]),
    "another loss": (nn.HuberLoss(), ["torch's HuberLoss", "lambda model, batch"]),
    "a loss with arguments": (partial(F.cross_entropy, reduction="none"), ["torch's cross_entropy"]),
    "one of C": (F.binary_cross_entropy_with_logits, ["fishkern.MultiLabel()"]),
    "of three": (of_three, ["(model, batch) -> losses [N]", "of_three(model, inputs, labels)"]),
    "of outputs": (outputs_and_labels, ["outputs_and_labels(outputs, labels)", "the_loss(model(batch[0]), batch[1])"]),
    "a criterion": (Criterion(), ["Criterion(y_pred, y_true)", "the_loss(model(batch[0]), batch[1])"]),
    "a number": (0.5, ["(model, batch) -> losses [N]", "got 0.5"]),
}  # fmt: skip


@pytest.mark.parametrize("case", LIKELIHOODS)
def test_what_is_no_likelihood(case):
    likelihood, words = LIKELIHOODS[case]
    for function in (fk.estimate, fk.verify):
        with refused(TypeError, "likelihood must be an instance such as fishkern.CausalLM()", *words):
            function(linear(), [pair()], likelihood=likelihood)


@pytest.mark.parametrize("function", [fk.estimate, fk.verify])
def test_a_model_that_is_a_function(function):
    with refused(TypeError, "model must be a torch.nn.Module", "a function has no parameters"):
        function(lambda x: x, [pair()], likelihood=fk.Classification())


@pytest.mark.parametrize("kind", ["mc", "type-2"])
def test_a_function_does_not_tell_the_distribution_of_labels(kind):
    with refused(ValueError, f"fisher_type='{kind}'", "distribution of the labels", "empirical"):
        classify([pair()], ESTIMATORS[kind], likelihood=lambda model, batch: model(batch[0]).sum(1))


def test_unit_position_needs_a_rule_for_every_parameter():
    specimen = zoo.vit()
    with refused(fk.UnsupportedModuleError, "unit='position'", "position_embeddings", "parameters="):
        fk.estimate(specimen.model, [specimen.batch()], fk.DiagonalFisher(unit="position"))


ARGUMENTS = {
    "parameters: a number": (TypeError, lambda: classify([pair()], parameters=[3]), ["'all'", "predicate", "[3]"]),
    "parameters: a word": (
        ValueError,
        lambda: classify([pair()], parameters="weight"),
        ["'weight' matches none of 2 names", "did you mean '0.weight'?"],
    ),
    "estimator: a class": (TypeError, lambda: classify([pair()], fk.DiagonalFisher), ["DiagonalFisher()"]),
    "estimator: a word": (TypeError, lambda: classify([pair()], "empirical"), ["estimator", "'empirical'"]),
    "max_examples": (ValueError, lambda: classify([pair()], max_examples=0), ["max_examples", "at least 1, got 0"]),
    "a fraction": (TypeError, lambda: classify([pair()], max_examples=6.0), ["max_examples must be an integer"]),
    "unit": (ValueError, lambda: fk.DiagonalFisher(unit="token"), ["'example', 'position', 'batch'", "'token'"]),
    "fisher_type": (ValueError, lambda: fk.DiagonalFisher("true"), ["'empirical', 'mc', 'type-2'", "'true'"]),
    "mc_samples": (ValueError, lambda: fk.DiagonalFisher(mc_samples=0), ["mc_samples", "at least 1, got 0"]),
    "draws": (ValueError, lambda: fk.SketchedFisher(draws=0), ["draws", "at least 1, got 0"]),
    "type-2 by position": (ValueError, lambda: fk.DiagonalFisher("type-2", unit="position"), ["unit='position'"]),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_a_wrong_argument(case):
    kind, call, words = ARGUMENTS[case]
    with refused(kind, *words):
        call()


def test_inference_mode():
    with torch.inference_mode():
        with refused(RuntimeError, "torch.inference_mode()", "outside"):
            classify([pair()])
        model = linear()
    with refused(RuntimeError, "parameters made under it"):
        fk.estimate(model, [pair()], likelihood=fk.Classification(), parameters="all")
    with torch.no_grad():
        assert classify([pair()]).count == 3
