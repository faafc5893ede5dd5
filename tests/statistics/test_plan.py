"""A plan equals the pass that it plans, byte by byte where torch's allocator can tell, and leaves the model alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import fishkern as fk
from benchmarks.engine.memory import peak_allocated
from fishkern.statistics.plan import _is
from tests.support import own_estimators, zoo

transformers = pytest.importorskip("transformers")

ONLY_A_RUN = "only a run can tell"


def meta_llama(**changes) -> nn.Module:
    sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **changes}))


def numels(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.matrix
@pytest.mark.parametrize(
    "family, estimator",
    [
        ("llama", fk.DiagonalFisher()),
        ("llama", fk.DirectionEnergy("power", importance="kronecker", layers_per_pass=1)),
        ("bert-classifier", fk.SketchedFisher(draws=2)),
        pytest.param("vit", fk.GroupFisher(by="row"), marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_the_peak_is_that_of_the_allocator(family, estimator):
    """The oracle is torch's profiler, which sees every allocation of the real pass.

    Two examples of the first batch run in the set-up, so the second batch is the first that is whole.
    """
    specimen = zoo.FAMILIES[family]()
    batch = specimen.batch(N=8, T=32)
    planned = fk.plan(specimen.model, batch, estimator)
    peak = peak_allocated(lambda: fk.estimate(specimen.model, [batch, batch], estimator))
    assert 0.95 <= peak / planned.peak_bytes <= 1.05


def test_the_parts_of_a_peak():
    """Whatever is alive while a batch runs is one of the parts."""
    planned = fk.plan(meta_llama(), zoo.text_batch(N=8, T=32))
    assert planned.phases["batch"] == planned.peak_bytes
    assert planned.accumulator_bytes + planned.basis_bytes + planned.activation_bytes == planned.peak_bytes
    assert planned.total_bytes == planned.weight_bytes + planned.peak_bytes
    assert list(planned.phases) == ["states", "loss of one example", "survey", "self-check", "batch", "results"]


@pytest.mark.parametrize("tied", [False, True])
def test_weights_count_once(tied):
    model = meta_llama(tie_word_embeddings=tied, dtype=torch.bfloat16)
    planned = fk.plan(model)
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert planned.weight_bytes == numels(model) * next(model.parameters()).element_size() + buffers
    assert planned.accumulator_bytes == 4 * numels(model)  # float32, whatever the model is in
    assert planned.basis_bytes == 0
    assert planned.activation_bytes is None


def test_accumulators_of_groups():
    model = meta_llama()
    rows = sum(8 * parameter.shape[0] for parameter in model.parameters())  # float64
    assert fk.plan(model, estimator=fk.GroupFisher(by="row")).accumulator_bytes == rows


def directions(model: nn.Module, *, of: str = "") -> tuple[int, int]:
    """Bytes of accumulators and bases of the singular vectors of all linears with a text in their name."""
    shapes = [
        module.weight.shape for name, module in model.named_modules() if isinstance(module, nn.Linear) and of in name
    ]
    accumulators = sum(4 * 3 * min(shape) + 8 for shape in shapes)  # three sums, and the number of positions
    # both sides of each direction, its singular value in float64 and in float32, the shape and the digest
    bases = sum(min(shape) * (4 * sum(shape) + 8 + 4) + 4 * 4 for shape in shapes)
    return accumulators, bases


def test_bases_of_all_layers_and_of_the_layers_of_a_pass():
    model = meta_llama(num_hidden_layers=3)
    whole = fk.plan(model, estimator=fk.DirectionEnergy())
    assert (whole.accumulator_bytes, whole.basis_bytes) == directions(model)
    assert whole.passes == 1
    one = fk.plan(model, estimator=fk.DirectionEnergy(layers_per_pass=1))
    assert (one.accumulator_bytes, one.basis_bytes) == directions(model, of="layers.0.")
    assert one.passes == 4  # three layers, and the head
    assert set(one.paths) == set(whole.paths)


def test_making_a_basis_has_a_peak_of_its_own():
    """One eigenproblem in float64 takes the matrix, its eigenvectors and LAPACK's workspace of twice the matrix."""
    planned = fk.plan(meta_llama(), estimator=fk.DirectionEnergy())
    assert planned.phases["states"] > planned.basis_bytes + 8 * 4 * 16 * 16


def test_a_model_on_the_meta_device_plans_as_on_a_cpu():
    """And takes no memory: here 6 GiB are planned."""
    batch = zoo.text_batch(N=4, T=9, low=9)  # without padding, as ones have none
    real = transformers.LlamaForCausalLM(meta_llama().config)
    on_meta = {key: value.to("meta") for key, value in batch.items()}
    plans = [fk.plan(model, batch) for model in (real, meta_llama())]
    assert dict(plans[0].phases) == pytest.approx(dict(plans[1].phases), abs=64)  # a loss may be freed a moment later
    assert plans[0].flops == plans[1].flops
    # tokens that are all alike have fewer rows of the embedding
    assert fk.plan(meta_llama(), on_meta).peak_bytes == pytest.approx(plans[0].peak_bytes, rel=0.05)

    large: list[fk.PassPlan] = []
    model = meta_llama(vocab_size=100_000, hidden_size=4096)
    peak = peak_allocated(lambda: large.append(fk.plan(model)))
    assert large[0].total_bytes > 6 * 2**30
    assert peak < 2**20


@pytest.mark.parametrize(
    "estimator, parameters, size",
    [
        (own_estimators.SquaredFactors(), "*proj.weight", lambda one: 4 * sum(one.shape)),
        (own_estimators.GradientNorm(), None, lambda one: 4),
    ],
    ids=["SquaredFactors", "GradientNorm"],
)
def test_an_estimator_of_your_own(estimator, parameters, size):
    model = meta_llama()
    planned = fk.plan(model, zoo.text_batch(), estimator, parameters=parameters, check=False)
    assert len(planned.paths) == (7 if parameters else 12)
    assert planned.accumulator_bytes == sum(size(model.get_parameter(name)) for name in planned.paths)
    assert set(planned.paths.values()) == {"fused"}
    assert planned.estimator == type(estimator).__name__


@dataclass(frozen=True)
class Remembers(fk.DiagonalFisher):
    """Keeps a constant of its own, twice the weight's size."""

    reads: ClassVar[str] = "squares"
    definition: ClassVar[dict] = {"estimator": "Remembers", "unit": "example"}

    def init(self, parameter):
        return {"squares": super().init(parameter), "twice": fk.Constant(torch.cat([parameter.value.detach()] * 2))}

    def update_(self, state, grads, parameter, backend=None):
        grads.add_squares_(state["squares"], backend)

    def result(self, state, count):
        return state["squares"] / count


def test_constants_are_bases():
    model = meta_llama()
    planned = fk.plan(model, estimator=Remembers())
    assert planned.accumulator_bytes == 4 * numels(model)
    assert planned.basis_bytes == 2 * 4 * numels(model)


def test_accumulators_elsewhere_are_left_out():
    model = meta_llama()
    here, elsewhere = (fk.plan(model, accumulate_on=where) for where in (None, "cuda"))
    # one is computed while two are copied
    largest = sum(sorted(4 * parameter.numel() for parameter in model.parameters())[-3:])
    assert elsewhere.accumulator_bytes == here.accumulator_bytes
    followed = 52 * numels(model)  # where the sums are
    expected = here.accumulator_bytes - largest + followed
    assert here.peak_bytes - elsewhere.peak_bytes == pytest.approx(expected, abs=64)


@pytest.mark.parametrize(
    "device, named, same",
    [("cuda:0", "cuda:1", False), ("cuda:0", "cuda:0", True), ("cuda:0", "cpu", False), ("cpu", "cpu", True),
     ("cuda:1", "cuda", True), ("cuda:0", "cuda", False)],
)  # fmt: skip
def test_each_gpu_is_a_device_of_its_own(device, named, same, monkeypatch):
    """Without a number, the current one is meant: here the second."""
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 1)
    assert _is(torch.device(device), torch.device(named)) is same


@pytest.mark.parametrize("family", [pytest.param("bert-classifier", marks=pytest.mark.slow), "mixtral"])
def test_paths_are_those_of_a_run(family):
    specimen = zoo.FAMILIES[family]()
    batch = specimen.batch()
    planned = fk.plan(specimen.model, batch)
    paths = planned.paths
    coverage = fk.estimate(specimen.model, [batch]).coverage
    assert paths.keys() == coverage.keys()
    for name, path in paths.items():
        assert path == (ONLY_A_RUN if coverage[name].path == "generic" else coverage[name].path)
    assert Counter(paths.values())["fused"] > 10
    assert any("the experts that a token is sent to" in words for words in planned.unknown) == (family == "mixtral")


def test_paths_of_ordinary_gradients():
    model, batch = meta_llama(), zoo.text_batch()
    assert set(fk.plan(model, batch, fk.SketchedFisher()).paths.values()) == {"sketch"}
    assert set(fk.plan(model, batch, fk.DiagonalFisher(unit="batch")).paths.values()) == {"batch"}


def test_flops_of_a_linear_map():
    """The head and its projections, by hand: two FLOPs for each product and sum."""
    N, I, O = 6, 5, 3
    net, batch = nn.Linear(I, O, bias=False), (torch.randn(N, I), torch.randint(O, (N,)))
    planned = fk.plan(net, batch, fk.DirectionEnergy(), likelihood=fk.Classification())
    assert planned.flops["estimator"] == 2 * N * O * (O + I)  # K = O
    assert planned.flops["pass"] == 2 * N * O * I + planned.flops["estimator"]  # no gradient goes past the first layer
    assert planned.examples == N


def test_the_model_is_left_as_found():
    specimen = zoo.bert_classifier()
    model = specimen.model.train()
    model.classifier.weight.grad = torch.ones_like(model.classifier.weight)
    model.classifier.bias.requires_grad_(False)
    calls = []
    model.classifier.register_forward_hook(lambda *args: calls.append(1))
    state = {
        name: (one, one.clone(), one._version) for name, one in [*model.named_parameters(), *model.named_buffers()]
    }
    hooks = {module: len(module._forward_hooks) for module in model.modules()}
    drawn = torch.get_rng_state()

    fk.plan(model, specimen.batch())
    with pytest.raises(ValueError, match="returned no logits"):
        fk.plan(model, specimen.batch(), likelihood=fk.QuestionAnswering())

    assert calls
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(module.training for module in model.modules())
    assert hooks == {module: len(module._forward_hooks) for module in model.modules()}
    for name, one in [*model.named_parameters(), *model.named_buffers()]:
        was, values, version = state[name]
        assert one is was
        assert one._version == version
        assert torch.equal(one, values)
    assert torch.equal(model.classifier.weight.grad, torch.ones_like(model.classifier.weight))
    assert not model.classifier.bias.requires_grad
    fk.estimate(model, [specimen.batch()])


def test_weights_that_a_module_lists_twice_come_back():
    net = nn.Sequential(nn.LSTM(4, 3, batch_first=True))
    listed = list(net[0]._flat_weights)

    def losses(model, batch):
        return model(batch[0])[0].square().mean((1, 2))

    planned = fk.plan(net, (torch.randn(5, 6, 4),), likelihood=losses)
    assert set(planned.paths.values()) == {ONLY_A_RUN}
    assert all(one is other for one, other in zip(net[0]._flat_weights, listed, strict=True))


class Caches(nn.Module):
    """Computes positions once, and keeps them and its last input."""

    def __init__(self):
        super().__init__()
        self.linear, self.positions = nn.Linear(4, 3), None

    def forward(self, x):
        if self.positions is None:
            self.positions = torch.arange(4.0) * self.linear.bias.detach().sum()
        self.last = x
        return self.linear(x + self.positions)


def test_what_a_module_keeps_of_the_rehearsal_is_gone():
    net, batch = Caches(), (torch.randn(5, 4), torch.randint(3, (5,)))
    fk.plan(net, batch, likelihood=fk.Classification(), parameters="linear.weight")
    assert net.positions is None
    assert not hasattr(net, "last")
    net(batch[0]).sum().backward()


class Picks(nn.Module):
    """Goes on with the positive features alone."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(1, 3)

    def forward(self, x):
        h = self.first(x)
        return self.second(h[h > 0][: len(x), None])


def test_what_follows_values_is_said():
    planned = fk.plan(Picks(), (torch.randn(5, 4), torch.randint(3, (5,))), likelihood=fk.Classification())
    assert any("the rest of a batch: it depends on values" in words for words in planned.unknown)


def test_the_table():
    text = str(fk.plan(meta_llama(), zoo.text_batch(N=4, T=8), fk.DirectionEnergy(layers_per_pass=1), check=False))
    first, *lines = text.splitlines()
    assert first == "DirectionEnergy of LlamaForCausalLM: 2 passes over the data"
    assert [line.split()[0] for line in lines[:6]] == [
        "weights", "accumulators", "bases", "activations", "peak", "total"
    ]  # fmt: skip
    assert lines[6:8] == ["paths: fused 8", lines[7]]
    assert lines[7].startswith("FLOPs of a batch: ")
    assert lines[8].startswith("sums elsewhere: ")
    assert lines[9] == f"{ONLY_A_RUN}:"
    assert "meta device" in text
    without = str(fk.plan(meta_llama()))
    assert "unknown without a batch" in without
    assert "activations, since there is no batch" in without


def test_refusals():
    model, batch = meta_llama(), zoo.text_batch()
    with pytest.raises(TypeError, match="estimator must be an Estimator"):
        fk.plan(model, batch, "DiagonalFisher")
    with pytest.raises(ValueError, match="needs 'labels' in every batch"):
        fk.plan(model, {"input_ids": batch["input_ids"]})
    with pytest.raises(TypeError, match="one batch, got a list of 3: pass the largest"):
        fk.plan(model, [batch, batch, batch])
    with pytest.raises(ValueError, match="cannot tell which loss"):
        fk.plan(nn.Linear(3, 2), (torch.randn(4, 3), torch.randint(2, (4,))))
    model.lm_head.to_empty(device="cpu")
    with pytest.raises(fk.UnsupportedModuleError, match="some of its parameters are on the meta device"):
        fk.plan(model, batch)
