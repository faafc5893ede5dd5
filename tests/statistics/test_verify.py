"""``fishkern.verify`` accepts statistics that equal the loop, up to the noise of the model, and no others."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import fishkern as fk
from tests.support import zoo

pytest.importorskip("transformers")

pytestmark = pytest.mark.matrix


@pytest.fixture(scope="module")
def bert() -> tuple[nn.Module, list[dict]]:
    torch.manual_seed(0)
    specimen = zoo.bert_classifier()
    return specimen.model, [specimen.batch(5, 7, seed=0), specimen.batch(4, 6, seed=1)]


def changed(statistics: fk.Statistics, name: str, change) -> dict[str, torch.Tensor]:
    return {key: change(value) if key == name else value for key, value in statistics.items()}


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("llama", torch.float64),
        ("bert", torch.float32),
        ("vit", torch.float32),
        ("llama", torch.bfloat16),
        ("bert", torch.bfloat16),
        pytest.param("t5", torch.float32, marks=pytest.mark.slow),
        pytest.param("t5", torch.bfloat16, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_an_estimate_holds(family, dtype):
    specimen = zoo.FAMILIES[family]()
    model = specimen.model.to(dtype)
    batches = [
        {key: value.to(dtype) if value.is_floating_point() else value for key, value in specimen.batch(5, 7).items()}
    ]
    found = fk.verify(model, batches)
    assert found.ok, found
    assert [one.name for one in found.compared] == [name for name, _ in model.named_parameters()]
    assert sum(found.coverage.values()) == found.size == sum(p.numel() for p in model.parameters())
    assert found.examples == found.noise_examples == 5
    assert found.overlap >= 0.9


def test_a_loaded_file_holds(bert, tmp_path):
    model, batches = bert
    path = fk.estimate(model, batches).save(tmp_path / "fisher.safetensors")
    assert fk.verify(model, batches, fk.Statistics.load(path, lazy=True)).ok


def test_a_file_of_half_the_size_holds_and_a_wrong_one_does_not(bert, tmp_path):
    """``save(dtype=torch.bfloat16)`` rounds each entry to three digits, and nothing more is allowed."""
    model, batches = bert
    statistics = fk.estimate(model, batches)
    halved = fk.Statistics.load(statistics.save(tmp_path / "halved", dtype=torch.bfloat16))
    assert any(not torch.equal(halved[name], statistics[name]) for name in statistics)
    report = fk.verify(model, batches, halved)
    assert report.ok, report.failures
    exact = fk.verify(model, batches, statistics)
    assert all(0 < a.allowed - b.allowed < 0.004 for a, b in zip(report.compared, exact.compared, strict=True))
    name = "bert.encoder.layer.0.output.dense.weight"
    wrong = changed(halved, name, lambda value: (value * 1.01).bfloat16().float())
    failed = fk.verify(model, batches, wrong)
    assert [one.name for one in failed.compared if not one.holds] == [name]


@pytest.mark.parametrize(
    "change",
    [lambda value: 1.01 * value, torch.zeros_like, lambda value: value.flip(0), lambda value: value * torch.nan],
    ids=["one percent", "zeros", "flipped", "nan"],
)
def test_one_wrong_parameter_fails_by_name(bert, change):
    model, batches = bert
    name = "bert.encoder.layer.1.output.dense.weight"
    found = fk.verify(model, batches, changed(fk.estimate(model, batches), name, change))
    assert not found.ok
    assert [one.name for one in found.compared if not one.holds] == [name]
    assert found.failures[0].startswith(name)
    assert found.worst_first[0].name == name
    assert name in str(found)


@pytest.mark.parametrize("unit", ["position", "batch"])
def test_another_unit_is_another_quantity(unit):
    specimen = zoo.llama()
    batch = specimen.batch(5, 7)
    other = dict(fk.estimate(specimen.model, [batch], fk.DiagonalFisher(unit=unit)))
    found = fk.verify(specimen.model, [batch], other)
    assert sum(not one.holds for one in found.compared) > len(found.compared) / 2


def test_a_missing_parameter_fails(bert):
    model, batches = bert
    statistics = dict(fk.estimate(model, batches))
    del statistics["classifier.bias"]
    found = fk.verify(model, batches, statistics)
    assert found.missing == ("classifier.bias",)
    assert not found.ok


def test_what_was_left_out_by_the_users_word_is_not_missing(bert):
    model, batches = bert
    part = fk.estimate(model, batches, parameters=lambda name, _: name.startswith("classifier"))
    found = fk.verify(model, batches, part)
    assert found.ok, found
    assert len(found.compared) == 2
    assert found.missing == ()


def test_a_sample_of_the_parameters(bert):
    model, batches = bert
    found = fk.verify(model, batches, parameters=lambda name, _: name.startswith("classifier"))
    assert [one.name for one in found.compared] == ["classifier.weight", "classifier.bias"]
    assert found.ok


class Crosstalk(nn.Module):
    """Examples that see their batch, in evaluation mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 4)
        self.outer = nn.Linear(4, 2)

    def forward(self, inputs):
        hidden = self.inner(inputs)
        return self.outer(torch.tanh(hidden - hidden.mean(0)))


def test_examples_that_see_each_other_fail():
    """Noise that no rounding explains excuses nothing."""
    torch.manual_seed(0)
    model = Crosstalk()
    batch = torch.randn(6, 3), torch.randint(0, 2, (6,))
    truth = fk.verify(model, [batch], {k: torch.zeros_like(p) for k, p in model.named_parameters()},
                      likelihood=fk.Classification())  # fmt: skip
    assert not truth.ok
    assert any("not independent" in failure for failure in truth.failures)


def test_a_gradient_of_rounding_alone_is_not_judged():
    """A key's bias moves no attention weight: its gradient is zero in exact arithmetic."""
    torch.manual_seed(0)
    specimen = zoo.bert()
    found = fk.verify(specimen.model, [specimen.batch(5, 7)])
    notes = {one.name: one.note for one in found.compared}
    name = "bert.encoder.layer.0.attention.self.key.bias"
    assert notes[name] == "zero but for rounding"
    assert found.ok
    few = fk.verify(specimen.model, [specimen.batch(5, 7)], parameters=[name, name.replace("key", "value")])
    (line,) = (line for line in str(few).splitlines() if line.startswith(name))
    assert line.endswith("  zero but for rounding")
    for wrong in (lambda value: value * torch.nan, lambda value: value + 1e-3):
        broken = changed(fk.estimate(specimen.model, [specimen.batch(5, 7)]), name, wrong)
        again = fk.verify(specimen.model, [specimen.batch(5, 7)], broken)
        assert [one.name for one in again.compared if not one.holds] == [name]


def test_a_loss_of_ones_own(bert):
    model, batches = bert

    def twice(model, batch):
        return 2 * fk.Classification().predictive(model, batch).losses()

    ours = fk.estimate(model, batches, likelihood=twice)
    assert fk.verify(model, batches, ours, likelihood=twice).ok
    assert not fk.verify(model, batches, ours).ok


def test_the_report_as_json(bert):
    model, batches = bert
    found = fk.verify(model, batches)
    plain = json.loads(found.to_json())
    assert plain["ok"] is True
    assert plain["failures"] == []
    assert len(plain["compared"]) == len(found.compared)
    assert plain["compared"][0]["error"] == found.compared[0].error
    broken = changed(fk.estimate(model, batches), "classifier.bias", lambda value: value + torch.inf)
    broken = json.loads(fk.verify(model, batches, broken).to_json())
    assert broken["ok"] is False
    assert next(one for one in broken["compared"] if one["name"] == "classifier.bias")["error"] is None


def test_the_model_comes_back_as_found(bert):
    model, batches = bert
    model.train()
    first = next(model.parameters())
    first.requires_grad_(False)
    first.grad = torch.ones_like(first)
    state, grad = torch.get_rng_state(), first.grad
    try:
        fk.verify(model, batches)
        with pytest.raises(ValueError, match="not finite|is nan"):
            fk.verify(model, batches, likelihood=lambda model, batch: model(**batch).logits[:, 0] * torch.nan)
        assert all(module.training for module in model.modules())
        assert not first.requires_grad
        assert first.grad is grad
        assert all(parameter.grad is None for parameter in model.parameters() if parameter is not first)
        assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
        assert torch.equal(torch.get_rng_state(), state)
    finally:
        first.grad = None
        first.requires_grad_(True)
        model.eval()


def test_max_examples_and_progress(bert):
    model, batches = bert
    told = []
    found = fk.verify(model, batches, max_examples=6, progress=lambda done, total: told.append((done, total)))
    assert found.examples == 6
    assert told == [(n, 6) for n in range(1, 7)]


def test_what_cannot_be_compared_is_refused(bert):
    model, batches = bert
    with pytest.raises(ValueError, match="the mean over 5 examples and the data holds 9"):
        fk.verify(model, batches, fk.estimate(model, batches[:1]))
    with pytest.raises(ValueError, match="these statistics are of {'unit': 'position'}: pass the recipe"):
        fk.verify(model, batches, fk.estimate(model, batches, fk.DiagonalFisher(unit="position")))
    with pytest.raises(ValueError, match="holds no example"):
        fk.verify(model, [])
    with pytest.raises(ValueError, match="of another model"):
        fk.verify(model, batches, changed(fk.estimate(model, batches), "classifier.bias", lambda value: value[:2]))
    with pytest.raises(ValueError, match="nothing to verify"):
        fk.verify(model, batches, {})
    with pytest.raises(TypeError, match="got 'fisher.safetensors': load a file with fishkern.Statistics.load"):
        fk.verify(model, batches, "fisher.safetensors")


class Quantised(nn.Module):
    """A linear whose weight is stored as integers, as in a quantised model."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 3, 2
        self.weight = nn.Parameter(torch.randint(-8, 8, (2, 3), dtype=torch.int8), requires_grad=False)
        self.scale = nn.Parameter(torch.tensor([0.1, 0.2]))

    def forward(self, inputs):
        return inputs @ (self.weight * self.scale[:, None].detach()).T * self.scale


def test_integer_weights_are_named_not_compared():
    """Autograd gives them no gradient, so no loop has a value for them."""
    torch.manual_seed(0)
    model = Quantised()
    batch = torch.randn(4, 3), torch.randint(0, 2, (4,))
    given = {
        "weight": torch.zeros(2, 3),
        **fk.estimate(model, [batch], likelihood=fk.Classification(), parameters=lambda name, _: name == "scale"),
    }
    found = fk.verify(model, [batch], given, likelihood=fk.Classification())
    assert found.integers == ("weight",)
    assert [one.name for one in found.compared] == ["scale"]
    assert "1 stored weights not compared" in str(found)


def contrastive(model: nn.Module, batch: tuple) -> torch.Tensor:
    """Each example among the others of its batch: alone it is a constant."""
    similar = model(batch[0]) @ model(batch[1]).T
    return nn.functional.cross_entropy(similar, torch.arange(len(similar)), reduction="none")


def test_a_loop_without_any_gradient_proves_nothing():
    torch.manual_seed(0)
    model, batch = nn.Linear(4, 3), (torch.randn(5, 4), torch.randn(5, 4))
    zeros = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    found = fk.verify(model, [batch], zeros, likelihood=contrastive)
    assert not found.ok
    assert "the loop finds no gradient anywhere: there is nothing to compare" in found.failures
    assert any("not independent" in failure for failure in found.failures)
    assert not any(one.holds for one in found.compared)
    alone = [(batch[0][:1], batch[1][:1])]  # no batch, so no noise either
    assert fk.verify(model, alone, zeros, likelihood=contrastive).failures == (
        "the loop finds no gradient anywhere: there is nothing to compare",
    )


def test_noise_without_bound_is_not_excused_by_a_gradient_of_zero():
    """A temperature that meets other examples only; the rest of the model has gradients of its own."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.scale = nn.Linear(4, 3), nn.Parameter(torch.ones(()))

        def forward(self, x):
            out = self.linear(x)
            return out + self.scale * (out.mean(0) - out).detach()

    torch.manual_seed(0)
    model, batch = Mixed(), (torch.randn(5, 4), torch.tensor([0, 1, 2, 1, 0]))
    truth = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for n in range(5):
        loss = nn.functional.cross_entropy(model(batch[0][n : n + 1]), batch[1][n : n + 1])
        for name, grad in zip(truth, torch.autograd.grad(loss, list(model.parameters())), strict=True):
            truth[name] += grad.square() / 5
    assert truth["scale"] == 0
    found = {one.name: one for one in fk.verify(model, [batch], truth, likelihood=fk.Classification()).compared}
    assert not found["scale"].holds
    assert "not independent" in found["scale"].note


class Undefined(torch.autograd.Function):
    """A product whose backward gives its weight no gradient."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        return grad @ weight, None


class Cut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return Undefined.apply(x, self.weight)


def test_a_gradient_that_stays_undefined_is_zero():
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Linear(4, 4), Cut(), nn.Linear(4, 3)), (torch.randn(3, 4), torch.tensor([0, 1, 2]))
    statistics = fk.estimate(model, [batch], likelihood=fk.Classification())
    found = fk.verify(model, [batch], statistics, likelihood=fk.Classification())
    assert found.ok, found
    wrong = {**statistics, "1.weight": torch.ones(4, 4)}
    assert not fk.verify(model, [batch], wrong, likelihood=fk.Classification()).ok


def inside_autocast(model: nn.Module) -> nn.Module:
    """As accelerate prepares a model: its own forward enters autocast, which is not visible from outside."""
    model.forward = torch.autocast("cpu", dtype=torch.bfloat16)(model.forward)
    return model


@pytest.mark.parametrize("where", ["around", "inside"])
def test_autocast_is_judged_by_the_dtype_that_it_computes_in(where):
    specimen = zoo.llama()
    batch = specimen.batch(5, 7)
    model = inside_autocast(specimen.model) if where == "inside" else specimen.model
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=where == "around"):
        statistics = fk.estimate(model, [batch])
        found = fk.verify(model, [batch], statistics)
        wrong = fk.verify(model, [batch], {name: 2 * value for name, value in statistics.items()})
    assert found.ok, found
    assert max(one.error for one in found.compared) > 1e-4  # the limit of float32
    assert not wrong.ok


class MeanAbs(fk.Estimator):
    """A statistic of one's own: the mean size of an example's gradient."""

    @property
    def definition(self):
        return {"estimator": "MeanAbs", "unit": "example"}

    def objectives(self, answer, examples):
        yield answer if isinstance(answer, torch.Tensor) else answer.losses()

    def units(self, num_examples):
        return num_examples

    def update_(self, state, grads, parameter, backend=None):
        for n in range(grads.num_examples):
            state += grads.example(n).abs()


RECIPES = {
    "mc": fk.DiagonalFisher("mc", mc_samples=2, seed=3),
    "type-2": fk.DiagonalFisher("type-2"),
    "one's own": MeanAbs(),
}


@pytest.mark.parametrize("kind", RECIPES)
def test_other_recipes_are_judged_by_their_own_definition(bert, kind):
    model, batches = bert
    found = fk.verify(model, batches, estimator=RECIPES[kind])
    assert found.ok, found
    assert len(found.compared) == len(list(model.parameters()))
    statistics = fk.estimate(model, batches, RECIPES[kind])
    assert fk.verify(model, batches, statistics, estimator=RECIPES[kind]).ok
    empirical = dict(fk.estimate(model, batches))
    assert not fk.verify(model, batches, empirical, estimator=RECIPES[kind]).ok
    with pytest.raises(ValueError, match="pass the recipe that they were estimated with as estimator="):
        fk.verify(model, batches, statistics)


class RowSums(MeanAbs):
    """A statistic that is smaller than its parameter."""

    @property
    def definition(self):
        return {"estimator": "RowSums", "unit": "example"}

    def init(self, parameter):
        return torch.zeros(parameter.shape[:1], dtype=parameter.dtype, device=parameter.device)

    def update_(self, state, grads, parameter, backend=None):
        for n in range(grads.num_examples):
            state += grads.example(n).square().flatten(1).sum(1)


def test_a_statistic_of_another_shape_is_compared_with_its_own_definition(bert):
    model, batches = bert
    whole = fk.estimate(model, batches, parameters=lambda name, parameter: parameter.ndim == 2)
    sums = {name: value.sum(1) for name, value in whole.items()}
    assert fk.verify(model, batches, sums, lambda name, _: name in sums, estimator=RowSums()).ok
    rows = fk.estimate(model, batches, fk.GroupFisher(by="row"), parameters=lambda name, _: name in sums)
    assert fk.verify(model, batches, rows, estimator=fk.GroupFisher(by="row")).ok
    with pytest.raises(ValueError, match="of another model"):
        fk.verify(model, batches, sums, lambda name, _: name in sums)


def test_draws_of_another_seed_are_another_statistic(bert):
    model, batches = bert
    statistics = fk.estimate(model, batches, RECIPES["mc"])
    with pytest.raises(ValueError, match="these statistics are of {'seed': 3}"):
        fk.verify(model, batches, statistics, estimator=fk.DiagonalFisher("mc", mc_samples=2))


def test_recipes_that_are_not_of_single_examples_are_refused(bert):
    model, batches = bert
    for recipe in (fk.DiagonalFisher(unit="position"), fk.DiagonalFisher(unit="batch"), fk.SketchedFisher()):
        with pytest.raises(ValueError, match="whole gradients of single examples.*unit='example'"):
            fk.verify(model, batches, estimator=recipe)
    with pytest.raises(TypeError, match=r"such as fishkern.DiagonalFisher\(\), got 'empirical'"):
        fk.verify(model, batches, estimator="empirical")


def test_statistics_of_another_loss_are_refused():
    specimen = zoo.llama()
    batches = [specimen.batch()]
    summed = fk.estimate(specimen.model, batches, likelihood=fk.CausalLM(reduction="sum"))
    with pytest.raises(ValueError, match=r"the loss CausalLM\(reduction='sum'\), .* CausalLM\(reduction='mean'\)"):
        fk.verify(specimen.model, batches, summed)
    assert fk.verify(specimen.model, batches, summed, likelihood=fk.CausalLM(reduction="sum")).ok


def test_the_report_in_words(bert):
    model, batches = bert
    found = fk.verify(model, batches)
    shown = str(found).splitlines()
    assert shown[0] == f"the 12 largest errors of {len(found.compared)}, with the errors that are allowed"
    assert shown[2].startswith(found.worst_first[0].name)
    assert shown[14] == f"{len(found.compared)} parameters compared with a loop over 9 examples"
    assert repr(found) == f"Verification(it holds: {len(found.compared)} parameters, 9 examples)"
    few = fk.verify(model, batches, {name: torch.zeros(3) for name in ["classifier.bias"]},
                    lambda name, _: name == "classifier.bias")  # fmt: skip
    assert str(few).startswith("all 1 errors, the largest first")
    assert repr(few) == f"Verification(it does not hold, {len(few.failures)} failures: 1 parameters, 9 examples)"


@pytest.mark.parametrize("moved", [0, 2])
def test_choices_of_experts_that_change_in_a_batch_are_counted(moved):
    """Planted: in a batch, the first positions at each of two routers are sent elsewhere."""
    specimen = zoo.mixtral()

    def elsewhere(module, args, outputs):
        logits, shares, index = outputs
        index = index.clone()
        if len(index) > 7:
            index[:moved] = (index[:moved] + 1) % 4
        return logits, shares, index

    for layer in specimen.model.model.layers:
        layer.mlp.gate.register_forward_hook(elsewhere)
    found = fk.verify(specimen.model, [specimen.batch(3, 7)], fk.estimate(specimen.model, [specimen.batch(3, 7)]))
    assert found.choices == 2 * 3 * 7
    assert found.changed_choices == 2 * moved
    (line,) = [line for line in found.summary if "choices" in line]
    assert line.startswith(f"{2 * moved} of 42 choices of experts are others in a batch than alone")
    assert ("no rounding" in line) == bool(moved) == (not found.ok)


@pytest.mark.parametrize("times", [1, 2])
def test_experts_whose_calls_do_not_match_are_named(times):
    """Planted: in a batch, the experts of the first layer are called twice, each time with half of the shares."""
    specimen = zoo.mixtral()
    experts = specimen.model.model.layers[0].mlp.experts

    class Halved(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = experts

        def forward(self, rows, index, shares):
            calls = times if len(rows) > 7 else 1
            return sum(self.inside(rows, index, shares / calls) for _ in range(calls))

    specimen.model.model.layers[0].mlp.experts = Halved()
    found = fk.verify(specimen.model, [specimen.batch(3, 7)])
    assert found.ok
    assert found.choices == (2 if times == 1 else 1) * 3 * 7
    assert found.changed_choices == 0
    name = "model.layers.0.mlp.experts.inside"
    assert found.unmatched_choices == (() if times == 1 else (name,))
    assert sum("not compared, since the calls" in line and name in line for line in found.summary) == times - 1
