"""Models whose weights are quantised, by stubs that behave as the libraries do, on any processor."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fishkern as fk
from fishkern.commands.training import evaluate
from fishkern.statistics.coverage import Covered
from tests.support import zoo
from tests.support.oracle import squares_one_by_one, worst_error

O, I = 6, 6


class Packed(nn.Module):
    """Two 4-bit values in a byte, under another name than ``weight``, with a function that dequantises, as HQQ's."""

    def __init__(self, out_features: int = O, in_features: int = I) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        values = torch.randint(0, 16, (out_features, in_features), dtype=torch.uint8)
        self.W_q = nn.Parameter(values[:, ::2] * 16 + values[:, 1::2], requires_grad=False)

    def dequantize(self):
        return torch.stack([self.W_q // 16, self.W_q % 16], dim=-1).flatten(1).double() / 10 - 0.7

    def forward(self, x):
        return F.linear(x, self.dequantize().to(x.dtype))


class Buffered(Packed):
    """The same in a buffer called ``qweight``, as GPTQ's."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        packed = self.W_q.data
        del self.W_q
        self.register_buffer("qweight", packed)

    @property
    def W_q(self):
        return self.qweight


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


class Repacking(nn.Linear):
    """Repacks its weight for good under the three conditions of bitsandbytes; then it passes no gradient on."""

    def __init__(self, out_features: int = O, in_features: int = I) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.weight = nn.Parameter(torch.randint(-9, 9, (out_features * in_features, 1), dtype=torch.int8), False)
        self.packed = False

    def dequantize(self):
        return self.weight.view(self.out_features, self.in_features).double() / 10

    def forward(self, x):
        if x.device.type == "cpu" and not self.training and not x.requires_grad:
            self.packed = True
        return F.linear(NoGradient.apply(x) if self.packed else x, self.dequantize().to(x.dtype))


class FloatStorage(Repacking):
    """4-bit values in a 16-bit floating dtype, as bitsandbytes stores them for FSDP."""

    class Params(nn.Parameter):
        quant_state = "as bitsandbytes calls what it needs to dequantise"

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.weight = self.Params(self.weight.data.view(1, -1).view(torch.bfloat16), requires_grad=False)

    def dequantize(self):
        return self.weight.view(torch.int8).view(self.out_features, self.in_features).double() / 10


class Wrapped(torch.Tensor):
    """A weight in a subclass that says that it is float64 and requires a gradient, and never gets one, as torchao's."""

    @staticmethod
    def __new__(cls, values):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float64, device=values.device)

    def __init__(self, values) -> None:
        self.values = values

    def dequantize(self):
        return self.values.double() / 10

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            return F.linear(args[0], args[1].dequantize(), *args[2:])
        return super().__torch_function__(function, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].values)
        raise NotImplementedError(function)


class Subclassed(nn.Linear):
    def __init__(self, out_features: int = O, in_features: int = I) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.weight = nn.Parameter(Wrapped(torch.randint(-9, 9, (out_features, in_features), dtype=torch.int8)))

    forward = nn.Linear.forward

    def dequantize(self):
        return self.weight.dequantize()


class Float8(nn.Linear):
    def __init__(self, out_features: int = O, in_features: int = I) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.weight = nn.Parameter(self.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)

    def dequantize(self):
        return self.weight.double()

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


QUANTIZED = [Packed, Buffered, Repacking, FloatStorage, Subclassed, Float8]


def net(kind: type[nn.Module]) -> nn.Module:
    """Quantised linears before, between and after ordinary ones."""
    torch.manual_seed(0)
    first, inner = kind(), kind()
    middle = nn.Sequential(nn.Linear(I, I).double(), nn.Tanh(), inner)
    return nn.Sequential(first, nn.Tanh(), middle, nn.LayerNorm(O).double(), nn.Linear(O, 3).double())


def dequantized(model: nn.Module) -> nn.Module:
    twin = nn.Sequential()
    for name, child in model.named_children():
        if hasattr(child, "dequantize"):
            plain = nn.Linear(I, O, bias=False).double()
            plain.weight.data = child.dequantize().clone()
            child = plain
        elif isinstance(child, nn.Sequential):
            child = dequantized(child)
        twin.add_module(name, child)
    return twin


def losses(model: nn.Module, batch: dict) -> torch.Tensor:
    return F.cross_entropy(model(batch["input"]).mean(1), batch["labels"], reduction="none")


def batch(N: int = 4) -> dict:
    return {"input": torch.randn(N, 5, I, dtype=torch.float64), "labels": torch.randint(0, 3, (N,))}


def first(model: nn.Module, one: dict) -> torch.Tensor:
    return losses(model, one)[0]


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_quantised_weight_has_the_fisher_of_its_dequantised_twin(kind, check):
    model, batches = net(kind), [batch(4), batch(1), batch(2)]
    statistics = fk.estimate(model, batches, likelihood=losses, parameters="all", check=check)
    error, name = worst_error(statistics, squares_one_by_one(dequantized(model).requires_grad_(), batches, first))
    assert error < 1e-6, f"{name}: {error:.1e}"
    assert {statistics.coverage[key].path for key in statistics} == {"fused"}


@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_users_hook_behind_a_quantised_linear_counts(kind):
    """The loss is of the output as the hook returns it."""
    model, batches = net(kind), [batch(3)]
    twin = dequantized(model).requires_grad_()
    for one in (model, twin):
        one[0].register_forward_hook(lambda module, args, output: 3 * output)
    statistics = fk.estimate(model, batches, likelihood=losses, parameters="all")
    error, name = worst_error(statistics, squares_one_by_one(twin, batches, first))
    assert error < 1e-6, f"{name}: {error:.1e}"


@pytest.mark.parametrize("kind", [Packed, Buffered])
def test_a_weight_is_named_and_counted_by_what_it_is_not_by_its_storage(kind):
    model = net(kind)
    storage = "W_q" if kind is Packed else "qweight"
    statistics = fk.estimate(model, [batch()], likelihood=losses, parameters="all")
    assert statistics["0.weight"].shape == (O, I)
    assert statistics.coverage[f"0.{storage}"] == Covered("left out", 0, "stored for 0.weight")
    twin = sum(parameter.numel() for parameter in dequantized(model).parameters())
    assert sum(covered.numel for covered in statistics.coverage.values()) == twin
    asked = fk.estimate(model, [batch()], likelihood=losses, parameters=lambda name, _: name == "2.2.weight")
    assert list(asked) == ["2.2.weight"]
    assert sum(covered.numel for covered in asked.coverage.values()) == twin


@pytest.mark.parametrize("kind", QUANTIZED)
def test_what_is_not_quantised_is_estimated_through_what_is(kind):
    model, batches = net(kind), [batch()]
    for module in model.modules():
        if hasattr(module, "dequantize"):
            module.requires_grad_(False)
    statistics = fk.estimate(model, batches, likelihood=losses)
    twin = dequantized(model)
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_(name in statistics)
    error, name = worst_error(statistics, squares_one_by_one(twin, batches, first))
    assert error < 1e-6, f"{name}: {error:.1e}"


ESTIMATORS = {
    "example": fk.DiagonalFisher(),
    "position": fk.DiagonalFisher(unit="position"),
    "batch": fk.DiagonalFisher(unit="batch"),
    "mc": fk.DiagonalFisher("mc"),
    "sketched": fk.SketchedFisher(draws=2),
}


def gradients(model: nn.Module, one: dict) -> dict:
    """The gradients that a training step would get."""
    model.train().zero_grad()
    losses(model, one).sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("kind", [Repacking, FloatStorage])
@pytest.mark.parametrize("trained", ["last", "all but the quantised"])
def test_a_model_that_would_repack_itself_trains_afterwards_as_before(kind, estimator, trained):
    """In evaluation mode, with every quantised weight before the first parameter that is asked for."""
    model, one = net(kind), batch()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.dtype == torch.float64 and (trained != "last" or name.startswith("4.")))
    before = gradients(model, one)
    likelihood = fk.Classification() if estimator == "mc" else losses
    batches = [(one["input"][:, 0], one["labels"])] if estimator == "mc" else [one]
    model.eval()
    fk.estimate(model, batches, ESTIMATORS[estimator], likelihood=likelihood)
    assert not any(module.packed for module in model.modules() if isinstance(module, Repacking))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    after = gradients(model, one)
    for name, parameter in model.named_parameters():
        assert (after[name] is not None) == parameter.requires_grad
        assert after[name] is None or torch.equal(after[name], before[name])


def test_measuring_a_model_between_epochs_repacks_nothing():
    model = zoo.llama().model
    model.model.layers[0].self_attn.k_proj = Repacking(12, 24)  # its input depends on the embedding alone
    model.model.embed_tokens.requires_grad_(False)
    encoder = SimpleNamespace(collate=lambda examples: zoo.text_batch(len(examples)))
    expected = model.train()(**zoo.text_batch(3)).loss.item()
    assert evaluate(model, encoder, list(range(3)), 3, lambda done, total: None) == {"loss": pytest.approx(expected)}
    assert not model.model.layers[0].self_attn.k_proj.packed


def test_verify_repacks_nothing_and_names_what_no_loop_can_tell():
    model, batches = net(Repacking).eval(), [batch()]
    found = fk.verify(model, batches, likelihood=losses, parameters="all")
    assert found.ok, found.failures
    assert found.integers == ("0.weight", "2.2.weight")
    assert not any(module.packed for module in model.modules() if isinstance(module, Repacking))


@pytest.mark.parametrize("kind", [Packed, Subclassed, Float8])
def test_verify_of_other_storages(kind):
    found = fk.verify(net(kind), [batch()], likelihood=losses, parameters="all")
    assert found.ok, found.failures
    assert found.integers == ("0.weight", "2.2.weight")
    with pytest.raises(ValueError, match="of Sequential only stored weights, to which a loop gets no gradient"):
        fk.verify(net(kind), [batch()], likelihood=losses, parameters=lambda name, _: name == "0.weight")


def test_a_layer_that_has_repacked_itself_is_refused_by_name():
    model = net(Repacking).eval()
    with torch.no_grad():
        model(batch()["input"])
    for options in ({}, {"check": False}, {"estimator": fk.SketchedFisher()}):
        with pytest.raises(fk.UnsupportedModuleError, match=r"'2.2' \(Repacking\) cuts the gradient.*load the model"):
            fk.estimate(model, [batch()], likelihood=losses, **options)
    with pytest.raises(fk.UnsupportedModuleError, match="cuts the gradient"):
        fk.verify(model, [batch()], fk.estimate(net(Packed), [batch()], likelihood=losses), likelihood=losses)


class Dynamic(Float8):
    """Rounds its input, too, with a product that has no backward pass: its output requires no gradient."""

    def forward(self, x):
        with torch.no_grad():
            return F.linear(x.round(decimals=2), self.weight.to(x.dtype))


class Hidden(nn.Module):
    """The same, with its weight where nothing lists it, as in torch's own quantised linears."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = I, O
        self.held = (torch.randint(-9, 9, (O, I)).double(),)

    def forward(self, x):
        return F.linear(x.detach(), self.held[0])


@pytest.mark.parametrize("kind", [Dynamic, Hidden])
def test_a_linear_without_a_backward_pass_is_refused_by_name(kind):
    for parameters in (None, "all"):
        with pytest.raises(fk.UnsupportedModuleError, match=rf"'2.2' \({kind.__name__}\) cuts the gradient"):
            fk.estimate(net(kind), [batch()], likelihood=losses, parameters=parameters)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("parameters", [None, "all"])
def test_a_quantised_model_with_activation_checkpointing(parameters, reentrant):
    model = zoo.llama().model.double()
    for block in model.model.layers:
        block.mlp.down_proj = Repacking(24, 40)
        block.self_attn.k_proj = Repacking(12, 24)
    batches = [zoo.text_batch()]
    expected = fk.estimate(model, batches, parameters=parameters)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = fk.estimate(model, batches, parameters=parameters)
    assert not any(module.packed for module in model.modules() if isinstance(module, Repacking))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])
    for module in model.modules():
        if isinstance(module, Repacking):
            module.packed = True
    with pytest.raises(fk.UnsupportedModuleError, match="cuts the gradient"):
        fk.estimate(model, batches, parameters=parameters)


class Squashed(Packed):
    def forward(self, x):
        return super().forward(x).tanh()


@pytest.mark.parametrize("check", [True, False])
def test_a_module_that_is_not_linear_is_refused_by_name(check):
    with pytest.raises(fk.UnsupportedModuleError, match=r"do not compute x W\^T \+ b.*0.weight"):
        fk.estimate(net(Squashed), [batch()], likelihood=losses, parameters="all", check=check)


class Mixing(nn.Module):
    """A graph convolution."""

    shape = (I, 4)

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = I, 4
        self.weight = nn.Parameter(torch.randn(self.shape, dtype=torch.float64))

    def forward(self, x):
        return x.cumsum(1) @ self.weight


class Blocks(Mixing):
    """Two heads, each with half of the features."""

    shape = (2, 2, I // 2)

    def forward(self, x):
        return torch.einsum("nthi,hoi->ntho", x.unflatten(-1, (2, -1)), self.weight).flatten(2)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_start_is_made_of_the_matrix_that_the_module_multiplies_by(kind):
    model, batches = net(kind), [batch()]
    paths = {path: module for path, module in model.named_modules() if isinstance(module, kind)}
    names = [f"{path}.weight" for path in paths]
    wanted = lambda name, _: name in names  # noqa: E731
    energies = fk.estimate(model, batches, fk.DirectionEnergy(), likelihood=losses, parameters=wanted)
    init = fk.initialize(model, energies, fk.DirectionInit(2))
    assert list(init) == list(paths)
    for path, module in paths.items():
        U, sigma, Vh = torch.linalg.svd(module.dequantize().detach())
        chosen = init[path].chosen
        expected = U[:, chosen] * sigma[chosen] @ Vh[chosen]
        torch.testing.assert_close(init[path].delta().double(), expected, rtol=1e-3, atol=1e-3)
    init.check(model)


@pytest.mark.parametrize("kind", [Mixing, Blocks])
def test_an_ordinary_weight_of_another_shape_is_not_a_packed_one(kind):
    model, batches = nn.Sequential(kind(), nn.Linear(4, 3).double()), [batch()]
    statistics = fk.estimate(model, batches, likelihood=losses)
    assert statistics["0.weight"].shape == kind.shape
    assert worst_error(statistics, squares_one_by_one(model, batches, first))[0] < 1e-6


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_stored_values_beside_ordinary_modules_cut_nothing(dtype):
    model, batches = net(Packed), [batch()]
    model[0] = nn.Linear(I, I).double()
    expected = fk.estimate(model, batches, likelihood=losses)
    for holder in (model, model[2]):
        holder.register_parameter("table", nn.Parameter(torch.ones(3).to(dtype), requires_grad=False))
    found = fk.estimate(model, batches, likelihood=losses)
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name])
        assert found.coverage[name].path == expected.coverage[name].path


class Gained(Packed):
    """A trained gain, applied after the product and the bias."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(O))
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, O))

    def forward(self, x):
        return F.linear(x, self.dequantize().to(x.dtype), self.bias) * self.gain


class Scaled(Packed):
    """Trained scales with a packed weight, and an adapter inside the module."""

    def __init__(self) -> None:
        super().__init__()
        self.bias, self.scale = nn.Parameter(torch.ones(O)), nn.Parameter(torch.linspace(0.5, 1.5, O)[:, None])
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(2, I)), nn.Parameter(torch.randn(O, 2))

    def forward(self, x):
        weight = self.dequantize().to(x.dtype) * self.scale
        return F.linear(x, weight, self.bias) + x @ self.lora_A.T @ self.lora_B.T


@pytest.mark.filterwarnings("ignore:.*slow exact path")
@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("kind", [Gained, Scaled])
def test_gains_scales_and_adapters_inside_a_quantised_linear(kind, check):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(I, I), nn.Tanh(), kind(), nn.Linear(O, 3)).double()
    rows = batch()
    found = fk.estimate(model, [rows], likelihood=losses, parameters="all", check=check)
    truth = squares_one_by_one(model, [rows], first)
    assert worst_error({name: found[name] for name in truth}, truth)[0] < 1e-6
    inner = model[2]
    with torch.no_grad():
        whole = inner(torch.eye(I, dtype=torch.float64)) - inner(torch.zeros(1, I, dtype=torch.float64))
    twin = nn.Sequential(model[0], model[1], nn.Linear(I, O, dtype=torch.float64), model[3])
    with torch.no_grad():
        twin[2].weight.copy_(whole.T)
        twin[2].bias.copy_(inner(torch.zeros(1, I, dtype=torch.float64))[0])
    expected = squares_one_by_one(twin, [rows], first)["2.weight"]
    torch.testing.assert_close(found["2.weight"].double(), expected, rtol=1e-5, atol=1e-12)


class Pair(Packed):
    """Returns the bias with the product, for the caller to add."""

    def forward(self, x):
        return super().forward(x), torch.zeros(O, dtype=x.dtype)


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Pair()

    def forward(self, x):
        product, bias = self.inner(x)
        return product + bias


def test_a_refusal_of_a_stored_weight_names_no_way_that_is_refused_too():
    model = nn.Sequential(nn.Linear(I, I), Sum(), nn.Linear(O, 3)).double()
    with pytest.raises(fk.UnsupportedModuleError, match="Leave 1.inner.weight out") as raised:
        fk.estimate(model, [batch()], likelihood=losses, parameters="all")
    assert "SketchedFisher" not in str(raised.value)
    found = fk.estimate(model, [batch()], likelihood=losses, parameters=lambda name, _: name != "1.inner.weight")
    assert "0.weight" in found
    assert "1.inner.weight" not in found


@pytest.mark.parametrize("kind", [Packed, Subclassed, Float8])
def test_an_approximation_by_ordinary_autograd_is_refused(kind):
    with pytest.raises(fk.UnsupportedModuleError, match=r"0.weight.*(stored as|autograd gives no gradient)"):
        fk.estimate(net(kind), [batch()], fk.SketchedFisher(), likelihood=losses, parameters="all")


class Detached(nn.Embedding):
    """An ordinary weight without a gradient, in a module that a rule recognises by its result."""

    def forward(self, input):
        return F.embedding(input, self.weight.detach())


def test_an_ordinary_weight_without_a_gradient_is_refused_not_zero():
    model = nn.Sequential(Detached(5, I), nn.Linear(I, 3)).double()
    one = {"input": torch.randint(5, (4, 7)), "labels": torch.randint(3, (4,))}
    with pytest.raises(fk.UnsupportedModuleError, match="gradient arrives at the modules of 0.weight.*detach"):
        fk.estimate(model, [one], likelihood=losses)
    model[0].requires_grad_(False)
    assert fk.estimate(model, [one], likelihood=losses).coverage["0.weight"].path == "left out"


def test_complex_parameters_are_called_complex():
    class Rotated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.phase = nn.Parameter(torch.randn(I, dtype=torch.complex128))

        def forward(self, x):
            return (x * self.phase).real

    model = nn.Sequential(Rotated(), nn.Linear(I, 3).double())
    with pytest.raises(fk.UnsupportedModuleError, match=r"\['0.phase'\] are complex"):
        fk.estimate(model, [batch()], likelihood=losses)
    assert "0.phase" not in fk.estimate(model, [batch()], likelihood=losses, parameters=lambda name, _: "1." in name)


def test_float8_outside_a_linear_is_refused_in_one_line():
    model = net(Packed)
    model.table = nn.Parameter(torch.ones(3).to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(fk.UnsupportedModuleError, match=r"\['table'\] are stored as float8_e4m3fn"):
        fk.estimate(model, [batch()], likelihood=losses, parameters="all")


@pytest.mark.parametrize("kind", [Packed, Buffered, Repacking, FloatStorage, Subclassed, Float8])
def test_a_masked_optimizer_refuses_a_stored_weight_by_name(kind):
    model = net(kind)
    statistics = fk.estimate(model, [batch()], likelihood=losses, parameters="all")
    selection = fk.select(statistics, fk.GlobalTopK(density=0.5))
    for given in [model, list(model.named_parameters())] if kind in (Subclassed, Float8) else [model]:
        with pytest.raises(fk.UnsupportedModuleError, match=r"2 weights .* stored in another form \(0.weight, 2.2.w"):
            fk.MaskedAdamW(given, selection, lr=1e-3)
    model.requires_grad_(False)
    others = selection.restrict(lambda name: name.startswith("4."))
    model[4].requires_grad_(True)
    fk.MaskedAdamW(model, others, lr=1e-3)


@pytest.mark.parametrize("order", ["largest", "magnitude", "random"])
@pytest.mark.parametrize("kind", [Packed, Subclassed])
def test_fish_tuning_of_a_whole_quantised_model_is_refused_by_name(kind, order):
    with pytest.raises(fk.UnsupportedModuleError, match="2 of them are quantised .0.weight, 2.2.weight.*adapter"):
        fk.fish_tuning(net(kind), [batch()], density=0.1, pool="model", likelihood=losses, order=order)
