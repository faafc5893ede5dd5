"""Every layer rule equals autograd on one example at a time; every form of gradients equals its dense tensor."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import fishkern as fk
from fishkern import layers
from tests.support.exactness import LIMIT, paths
from tests.support.oracle import squares_one_by_one, worst_error

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D

pytestmark = pytest.mark.matrix


def numbers(*shape: int):
    """Input ``[N, *shape]`` for any ``N``."""
    return lambda N: torch.randn(N, *shape, dtype=torch.float64)


def tokens(*shape: int, V: int = 5):
    return lambda N: torch.randint(V, (N, *shape))


class Int8Linear(nn.Module):
    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        weight = torch.randint(-128, 128, (out_features, in_features), dtype=torch.int8)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(torch.randn(out_features))
        self.register_buffer("scale", torch.rand(out_features, 1) / 100)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


class RMSNorm(nn.Module):
    def __init__(self, D: int, offset: float = 0.0, inner: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D))
        self.offset, self.inner = offset, inner

    def forward(self, x):
        wide = x.to(self.inner or x.dtype)
        normalized = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        return normalized.to(x.dtype) * (self.offset + self.weight)


class Norm(nn.Module):
    """A norm that says what its eps is; ``centred`` as a layer norm is, and ``largest`` with another use of the eps."""

    def __init__(self, D: int, offset: float = 0.0, centred: bool = False, largest: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D))
        self.eps, self.offset, self.centred, self.largest = 0.1, offset, centred, largest

    def forward(self, x):
        x = x - x.mean(-1, keepdim=True) if self.centred else x
        variance = x.square().mean(-1, keepdim=True)
        variance = variance.clamp(min=self.eps) if self.largest else variance + self.eps
        return x * torch.rsqrt(variance) * (self.offset + self.weight)


class Affine(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.gamma, self.shift = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(shape))

    def forward(self, x):
        return self.gamma * x + self.shift


class Frames(nn.Sequential):
    def forward(self, x):
        return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class ScaledEmbedding(nn.Embedding):
    embed_scale = 1.7

    def forward(self, input):
        return super().forward(input) * self.embed_scale


def moved(kind: type[nn.Linear], in_features: int, out_features: int) -> nn.Module:
    """A factor of a LoRA that training has moved from its initial values."""
    factor = kind(nn.Linear(in_features, out_features, bias=False))
    with torch.no_grad():
        factor.weight.add_(torch.randn_like(factor.weight))
    return factor


def of_transformers(family: str, kind: str, implementation: str = "eager", **sizes) -> nn.Module:
    """Experts or a router of one of transformers' models."""
    models = getattr(transformers.models, family)
    prefix = kind.removesuffix("Experts").removesuffix("TopKRouter").removesuffix("TopkRouter")
    config = getattr(models, f"{prefix}Config")(hidden_size=5, num_experts_per_tok=2, **sizes)
    config._experts_implementation = implementation
    return getattr(getattr(models, f"modeling_{family}"), kind)(config)


mixtral = partial(of_transformers, "mixtral", num_local_experts=4, intermediate_size=3)
gpt_oss = partial(of_transformers, "gpt_oss", num_local_experts=4, intermediate_size=3)
nemotron = partial(of_transformers, "nemotron_h", n_routed_experts=4, moe_intermediate_size=3)
deepseek = partial(of_transformers, "deepseek_v3", n_routed_experts=4, moe_intermediate_size=3, n_group=2, topk_group=1)


def adapted(experts, *names: str) -> nn.Module:
    """Experts with PEFT's LoRA on some of their weights."""
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=[], target_parameters=[f"experts.{n}" for n in names])
    model = peft.get_peft_model(nn.ModuleDict({"experts": experts()}), config)
    return model.base_model.model["experts"].requires_grad_()


def sent(experts: int = 4, to: int | None = None):
    """Features ``[N, 5]``, two experts for each row, and their shares; the last of ``experts`` may stand for none."""

    def make(N: int) -> tuple[torch.Tensor, ...]:
        index = torch.stack([torch.randperm(experts)[:2] for _ in range(N)]) if to is None else torch.full((N, 2), to)
        return numbers(5)(N), index, numbers(2)(N)

    return make


CASES = {
    layers.Linear: {
        **{
            f"input {shape}": (partial(nn.Linear, shape[-1], 3), numbers(*shape))
            for shape in [(5,), (7, 5), (2, 3, 5), (2, 1, 3, 5), (7, 1), (1, 5), (13, 31)]
        },
        "one out": (partial(nn.Linear, 5, 1), numbers(7, 5)),
        "no bias": (partial(nn.Linear, 5, 3, bias=False), numbers(7, 5)),
        "non-contiguous": (partial(nn.Linear, 5, 3), lambda N: numbers(5, 7)(N).mT),
        "strided": (partial(nn.Linear, 5, 3), lambda N: numbers(7, 5)(N)[:, ::2]),
        "expanded": (partial(nn.Linear, 5, 3), lambda N: numbers(1, 5)(N).expand(N, 7, 5)),
    },
    layers.QuantizedLinear: {
        "2-D": (partial(Int8Linear, 5, 3), numbers(5)),
        "3-D": (partial(Int8Linear, 5, 3), numbers(7, 5)),
    },
    layers.Conv1D: {
        "2-D": (partial(Conv1D, 3, 5), numbers(5)),
        "3-D": (partial(Conv1D, 3, 5), numbers(7, 5)),
        "square": (partial(Conv1D, 5, 5), numbers(7, 5)),
    },
    layers.Twins: {
        "A, 2-D": (partial(moved, layers.TwinA, 5, 3), numbers(5)),
        "A, 3-D": (partial(moved, layers.TwinA, 5, 3), numbers(7, 5)),
        "A, rank 1": (partial(moved, layers.TwinA, 5, 1), numbers(2, 3, 5)),
        "B, 2-D": (partial(moved, layers.TwinB, 3, 5), numbers(6)),
        "B, 3-D": (partial(moved, layers.TwinB, 3, 5), numbers(7, 6)),
        "B, rank 1": (partial(moved, layers.TwinB, 1, 5), numbers(2, 3, 2)),
    },
    layers.Embedding: {
        "1-D": (partial(nn.Embedding, 5, 3), tokens()),
        "2-D": (partial(nn.Embedding, 5, 3), tokens(7)),
        "3-D": (partial(nn.Embedding, 5, 3), tokens(2, 7)),
        "non-contiguous": (partial(nn.Embedding, 5, 3), lambda N: tokens(7, 2)(N).mT),
        "one feature": (partial(nn.Embedding, 5, 1), tokens(7)),
        "padding_idx": (partial(nn.Embedding, 5, 3, padding_idx=1), tokens(7)),
        "padding_idx from the end": (partial(nn.Embedding, 5, 3, padding_idx=-1), tokens(7)),
        "only padding": (partial(nn.Embedding, 5, 3, padding_idx=0), lambda N: torch.arange(N)[:, None] % 2),
        "scaled": (partial(ScaledEmbedding, 5, 3, padding_idx=1), tokens(7)),
        "sparse gradient": (partial(nn.Embedding, 5, 3, sparse=True), tokens(7)),
    },
    layers.LayerNorm: {
        "2-D": (partial(nn.LayerNorm, 5), numbers(5)),
        "two axes": (partial(nn.LayerNorm, (3, 5)), numbers(7, 3, 5)),
        "all axes": (partial(nn.LayerNorm, (3, 5)), numbers(3, 5)),
        "no bias": (partial(nn.LayerNorm, 5, bias=False), numbers(7, 5)),
        "eps": (partial(nn.LayerNorm, 5, eps=0.5), lambda N: numbers(5, 7)(N).mT),
    },
    layers.Convolution: {
        "1-D": (partial(nn.Conv1d, 3, 2, 3), numbers(3, 11)),
        "1-D, kernel 1": (partial(nn.Conv1d, 3, 2, 1, bias=False), numbers(3, 11)),
        "1-D, all": (partial(nn.Conv1d, 3, 2, 3, stride=2, padding=2, dilation=2), numbers(3, 11)),
        "1-D, same": (partial(nn.Conv1d, 3, 2, 4, padding="same", dilation=3), numbers(3, 11)),
        "2-D": (partial(nn.Conv2d, 3, 2, 3), numbers(3, 7, 5)),
        "2-D, kernel 1": (partial(nn.Conv2d, 3, 2, 1), lambda N: numbers(3, 5, 7)(N).mT),
        "2-D, valid": (partial(nn.Conv2d, 1, 2, (3, 2), padding="valid", bias=False), numbers(1, 7, 5)),
        "2-D, same": (partial(nn.Conv2d, 3, 1, (2, 3), padding="same"), numbers(3, 7, 5)),
        "2-D, all": (partial(nn.Conv2d, 3, 2, (3, 2), (2, 1), padding=(1, 2), dilation=(1, 2)), numbers(3, 7, 5)),
        "2-D, stride past the kernel": (partial(nn.Conv2d, 3, 2, 2, stride=3), numbers(3, 7, 5)),
    },
    layers.Experts: {
        "one by one": (partial(mixtral, "MixtralExperts"), sent()),
        "batched": (partial(mixtral, "MixtralExperts", "batched_mm"), sent()),
        "some to none": (partial(mixtral, "MixtralExperts"), sent(5)),
        "all to one, twice": (partial(mixtral, "MixtralExperts"), sent(to=2)),
        "transposed, with biases": (partial(gpt_oss, "GptOssExperts"), sent()),
        "transposed, batched": (partial(gpt_oss, "GptOssExperts", "batched_mm"), sent()),
        "no gate": (partial(nemotron, "NemotronHExperts"), sent()),
    },
    layers.AdaptedExperts: {
        "both": (partial(adapted, partial(mixtral, "MixtralExperts"), "gate_up_proj", "down_proj"), sent()),
        "the second": (partial(adapted, partial(mixtral, "MixtralExperts"), "down_proj"), sent(5)),
        "transposed": (partial(adapted, partial(gpt_oss, "GptOssExperts"), "gate_up_proj", "down_proj"), sent()),
    },
    layers.Router: {
        "softmax, then the largest": (partial(mixtral, "MixtralTopKRouter"), numbers(5)),
        "the largest, then softmax": (partial(gpt_oss, "GptOssTopKRouter"), numbers(5)),
        "of groups, in float32": (partial(deepseek, "DeepseekV3TopkRouter"), numbers(5)),
    },
    layers.RMSScale: {
        "w * x": (partial(Norm, 5), numbers(7, 5)),
        "(1 + w) * x": (partial(Norm, 5, offset=1.0), numbers(7, 5)),
        "torch's": (partial(nn.RMSNorm, 5, eps=0.1), lambda N: numbers(5, 7)(N).mT),
        "4-D": (partial(Norm, 5), numbers(2, 7, 5)),
        "no positions": (partial(Norm, 5), numbers(5)),
    },
    layers.LayerNormScale: {
        "w * x": (partial(Norm, 5, centred=True), numbers(7, 5)),
    },
    layers.Factor: {
        "another eps": (partial(Norm, 5, largest=True), numbers(7, 5)),
        "w * x": (partial(RMSNorm, 5), numbers(7, 5)),
        "float32 inside": (partial(RMSNorm, 5, inner=torch.float32), numbers(7, 5)),
        "torch's": (partial(nn.RMSNorm, 5), lambda N: numbers(5, 7)(N).mT),
        "4-D": (partial(RMSNorm, 5), numbers(2, 7, 5)),
    },
    layers.OnePlusFactor: {
        "(1 + w) * x": (partial(RMSNorm, 5, offset=1.0), numbers(7, 5)),
        "4-D": (partial(RMSNorm, 5, offset=1.0), numbers(2, 7, 5)),
    },
    layers.Scale: {
        "(2 + w) * x": (partial(RMSNorm, 5, offset=2.0), numbers(7, 5)),
        "scale and shift": (partial(Affine, 5), numbers(7, 5)),
        "axes of 1": (partial(Affine, 1, 1, 5), numbers(7, 5)),
        "one entry": (partial(Affine, 1), numbers(7, 1)),
        "batch norm": (partial(nn.BatchNorm1d, 5), numbers(5)),
    },
}
OTHERS = {
    "grouped convolution": (partial(nn.Conv2d, 4, 6, 3, groups=2), numbers(4, 7, 5)),
    "depthwise convolution": (partial(nn.Conv1d, 4, 4, 3, groups=4, bias=False), numbers(4, 11)),
    "circular padding": (partial(nn.Conv1d, 3, 2, 3, padding=1, padding_mode="circular"), numbers(3, 11)),
    "transposed convolution": (partial(nn.ConvTranspose2d, 3, 2, 3, stride=2), numbers(3, 4, 5)),
    "3-D convolution": (partial(nn.Conv3d, 2, 3, 2), numbers(2, 4, 3, 5)),
    "batch norm 1d": (partial(nn.BatchNorm1d, 5), numbers(5, 5)),
    "batch norm 2d": (partial(nn.BatchNorm2d, 3), numbers(3, 4, 3)),
    "group norm": (partial(nn.GroupNorm, 2, 4), numbers(4, 7)),
    "prelu that looks like a scale": (partial(nn.PReLU, 4), numbers(4, 4)),
    "one scale for all": (partial(Affine, 1), numbers(7, 5)),
    "table of positions": (partial(Affine, 7, 5), numbers(7, 5)),
    "embedding bag": (partial(nn.EmbeddingBag, 5, 3), tokens(7)),
    "embedding by frequency": (partial(nn.Embedding, 5, 3, scale_grad_by_freq=True), tokens(7)),
    "1-D convolution of frames": (lambda: Frames(nn.Conv1d(3, 2, 3, padding=1)), numbers(4, 3, 5)),
    "2-D convolution of frames": (lambda: Frames(nn.Conv2d(3, 2, 3, stride=2)), numbers(4, 3, 5, 7)),
    "norm of frames": (lambda: Frames(nn.LayerNorm((3, 5))), numbers(4, 3, 5)),
    "lstm": (partial(nn.LSTM, 5, 3, batch_first=True), numbers(7, 5)),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(5, 3)), numbers(7, 5)),
}
FLAT = {f"{kind.__name__}: {name}": case for kind, cases in CASES.items() for name, case in cases.items()}


def seeded(case, N: int = 3):
    """The module, no parameter or buffer at the value it starts with, and an input of ``N`` examples."""
    torch.manual_seed(1)
    module = case[0]().double().eval()
    for tensor in filter(torch.is_floating_point, module.state_dict().values()):
        nn.init.uniform_(tensor, 0.2, 1.2)
    return module, case[1](N)


def with_float_weight(module: nn.Module) -> nn.Module:
    if not isinstance(module, Int8Linear):
        return module
    twin = nn.Linear(module.in_features, module.out_features).double()
    twin.weight.data, twin.bias.data = module.weight * module.scale, module.bias.data
    return twin


def arguments(input) -> tuple[torch.Tensor, ...]:
    return input if isinstance(input, tuple) else (input,)


def floating(output) -> list[torch.Tensor]:
    return [one for one in (output if isinstance(output, tuple) else (output,)) if one.is_floating_point()]


def grads_of(module: nn.Module, input: tuple, grads: list) -> dict:
    grads = torch.autograd.grad(floating(module(*input)), list(module.parameters()), grads)
    return {name: grad.to_dense() for (name, _), grad in zip(module.named_parameters(), grads, strict=True)}


def test_every_rule_has_cases():
    assert [type(layer) for layer in layers.LAYERS] == list(CASES)


@pytest.mark.parametrize("N", [1, 3])
@pytest.mark.parametrize("case", FLAT)
def test_a_rule_equals_autograd_on_single_examples(case, N):
    module, input = seeded(FLAT[case], N)
    (layer,) = (layer for layer in layers.LAYERS if type(layer).__name__ == case.split(":")[0])
    input = arguments(input)
    call = layers.Call(module, input, {}, ("cpu", False, torch.bfloat16))
    with torch.no_grad():
        output = module(*input)
    wanted = frozenset(name for name, _ in module.named_parameters())
    assert layer.confirms(call, output, layer.covers(module) & wanted) == wanted
    output_grads = [torch.randn_like(one) for one in floating(output)]
    rows = [[[one[n : n + 1] for one in tensors] for tensors in (input, output_grads)] for n in range(N)]
    truth = [grads_of(with_float_weight(module), *row) for row in rows]
    found = dict(layer.per_example_grads(call, output_grads if layer.several else output_grads[0], wanted))
    for name in wanted:
        total = torch.ones_like(truth[0][name])
        found[name].add_squares_(total)
        torch.testing.assert_close(total, 1 + sum(grads[name].square() for grads in truth))
        for n in range(N):
            torch.testing.assert_close(found[name].example(n), truth[n][name])


class Alone(nn.Sequential):
    """A model of one layer."""

    def forward(self, *input):
        return self[0](*input)


def losses(model: nn.Module, batch: dict) -> torch.Tensor:
    output = model(*batch.values())
    if "Router" in type(model[0]).__name__:
        return sum(one.sin().sum(1) for one in floating(output))
    output = (output[0] if isinstance(output, tuple) else output).flatten(1)
    return (output.sin() * torch.linspace(1, 2, output.shape[1]).to(output)).sum(1)


def assert_exact(layer: nn.Module, make, **options) -> fk.Statistics:
    inputs = [arguments(make(N)) for N in (3, 1, 2)]
    batches = [{f"input{place}": one for place, one in enumerate(input)} for input in inputs]
    statistics = fk.estimate(Alone(layer), batches, likelihood=losses, **options)
    twin = Alone(with_float_weight(layer)).requires_grad_()
    truth = squares_one_by_one(twin, batches, lambda model, row: losses(model, row)[0])
    assert all(statistics[name].shape == truth[name].shape for name in truth)
    error, name = worst_error(statistics, truth)
    limit = LIMIT[getattr(layer, "inner", None) or torch.float64]
    assert error < limit, f"{name}: relative error {error:.1e}, by {statistics.coverage[name].path}"
    return statistics


class Powers(nn.Module):
    """Features by powers of their entries, after these are mixed."""

    def __init__(self, D: int, power: int, mix: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.power, self.mix = nn.Parameter(1 + torch.rand(D, dtype=torch.float64)), power, mix

    def forward(self, x):
        return x * (self.mix @ self.weight) ** self.power


@pytest.mark.parametrize("D", [1, 2, 7])
def test_a_factor_is_linear_in_its_own_entry_alone(D):
    """One derivative tells it, along entries that are all different, also of one feature."""

    def is_one(layer: layers.Layer, power: int, mix: torch.Tensor) -> bool:
        return confirmed(layer, Powers(D, power, mix.double()), torch.randn(3, 4, D, dtype=torch.float64))

    alone = torch.eye(D)
    mixes = [] if D == 1 else [alone.roll(1, 0), torch.full((D, D), 1 / D), alone + 1e-4, alone - 1 / D]
    assert is_one(layers.Factor(), 1, alone)
    assert all(not is_one(layers.Factor(), power, alone) for power in (0, 2, 3, 4))
    assert all(is_one(layers.Scale(), power, alone) for power in (1, 2, 3))  # entry by entry, of any form
    assert not any(is_one(layer, 1, mix) for layer in (layers.Factor(), layers.Scale()) for mix in mixes)


class Bent(nn.Module):
    """Features times a function of their entries, and normalised before if asked."""

    def __init__(self, of, weight: torch.Tensor, eps: float | None = None, beta: float = 0.0) -> None:
        super().__init__()
        self.weight, self.of, self.eps = nn.Parameter(weight), of, eps
        self.beta = beta * torch.linspace(-1, 1, len(weight), dtype=weight.dtype)

    def forward(self, x):
        if self.eps is not None:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return x * self.of(self.weight) + self.beta


def confirmed(rule: layers.Layer, module: nn.Module, *args: torch.Tensor, **kwargs: torch.Tensor) -> bool:
    call = layers.Call(module, args, kwargs, ("cpu", False, torch.bfloat16))
    names = frozenset({"weight"}) & rule.covers(module)
    return bool(rule.confirms(call, module(*args, **kwargs).detach(), names))


BENDS = [torch.relu, partial(torch.clamp, min=0.1), torch.tanh, torch.square, torch.abs]


@pytest.mark.parametrize("D", [1, 6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("of", BENDS)
def test_no_factor_bends_where_training_may_bring_it(of, dtype, D):
    """Now, or elsewhere: entries where the function is straight tell nothing of the others."""
    x, low, high = (torch.rand(3, 4, D, dtype=dtype) + 0.5, torch.full((D,), -0.3), torch.full((D,), 2.5))
    for weight in (torch.linspace(0.5, 1.5, D), low, high):
        module = Bent(of, weight.to(dtype))
        assert not confirmed(layers.Factor(), module, x)
        assert not confirmed(layers.OnePlusFactor(), module, x)
        assert not confirmed(layers.RMSScale(), Bent(of, weight.to(dtype), 1e-6), x)
    assert confirmed(layers.Scale(), Bent(of, torch.linspace(0.5, 1.5, D, dtype=dtype), 1e-6), x)
    assert confirmed(layers.Factor(), Bent(lambda w: w, high.to(dtype)), x)
    assert confirmed(layers.OnePlusFactor(), Bent(lambda w: 1 + w, high.to(dtype)), x)
    assert confirmed(layers.RMSScale(), Bent(lambda w: w, low.to(dtype), 1e-6), x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_what_is_added_to_a_product_is_no_part_of_its_factor(dtype):
    """It hides beside the rounding of 16 bits."""
    x, weight = torch.randn(8, 64, 16).to(dtype), 1 + 0.02 * torch.randn(16).to(dtype)
    for beta in (0.02, 0.05, 1.0):
        assert not confirmed(layers.Factor(), Bent(lambda w: w, weight, beta=beta), x)
        assert not confirmed(layers.OnePlusFactor(), Bent(lambda w: 1 + w, weight, beta=beta), x)
        assert confirmed(layers.Scale(), Bent(lambda w: w, weight, beta=beta), x)


def test_a_norm_does_not_run_once_more():
    """Its factor comes from its input, also where the module has inputs that only later calls have."""
    module, x = seeded((partial(Norm, 5), numbers(7, 5)))
    g, call = torch.randn_like(x), layers.Call(module, (x,), {}, ("cpu", False, torch.bfloat16))
    forward, module.forward = module.forward, None
    ((_, grads),) = layers.RMSScale().per_example_grads(call, g, frozenset({"weight"}))
    module.forward = lambda x, scale: scale * forward(x)
    call = layers.Call(module, (x, torch.tensor(2.0)), {}, call.autocast)
    ((_, doubled),) = layers.RMSScale().per_example_grads(call, g, frozenset({"weight"}))
    torch.testing.assert_close(doubled.example(0), 2 * grads.example(0))


def test_a_norm_by_its_values_alone():
    """What only resembles a norm on usual inputs, or is rounded otherwise, is no norm to the rule."""

    is_one = partial(confirmed, layers.RMSScale())
    x = 100 * torch.randn(3, 7, 5)  # beside which an eps does not show
    module = Norm(5)
    assert is_one(module, x)
    assert not is_one(Norm(5, largest=True), x)
    assert not is_one(Norm(5, centred=True), x)
    assert not is_one(module, torch.zeros(3, 7, 5))
    module.register_forward_pre_hook(lambda module, args: None)
    assert not is_one(module, x)
    rounded = RMSNorm(5, inner=torch.float32).double()
    rounded.eps = 1e-6
    assert not is_one(rounded, x.double())
    assert is_one(rounded.float(), x)


def by_rms(x: torch.Tensor, *axes: int, eps: float = 1e-6) -> torch.Tensor:
    """The norm in float32, rounded to the dtype of its input, as those of language models are."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(axes or -1, keepdim=True) + eps)).to(x.dtype)


class Resembling(nn.Module):
    """A module with an eps that computes what ``run`` does."""

    def __init__(self, run, weight: torch.Tensor, another: nn.Parameter | torch.Tensor | None = None) -> None:
        super().__init__()
        self.weight, self.eps, self.run = nn.Parameter(weight), 1e-6, run
        if isinstance(another, nn.Parameter):
            self.another = another
        elif another is not None:
            self.register_buffer("another", another)

    def forward(self, x):
        return self.run(self, x)


def with_a_large_feature(dtype: torch.dtype) -> torch.Tensor:
    """Inputs as language models have them: their mean is beside one feature what a rounding of it to 16 bits is."""
    x = torch.randn(2, 8, 256) + 0.5
    x[..., 3] = 60.0
    return x.to(dtype)


def centred(x: torch.Tensor) -> torch.Tensor:
    return (x.float() - x.float().mean(-1, keepdim=True)).to(x.dtype)


# What is the norm of two examples with these weights, and is none of others, or with others.
D = 64
GROUPS = torch.randn(2, 8, D // 4, generator=torch.Generator().manual_seed(0)).repeat(1, 1, 4)
RESEMBLING = {
    "one position": (lambda m, x: m.weight * by_rms(x, 1, 2), torch.ones(D), None, lambda: torch.randn(2, 1, D)),
    "no mean": (lambda m, x: m.weight * by_rms(centred(x)), torch.ones(D), None, lambda: centred(torch.randn(2, 8, D))),
    "equal groups": (
        lambda m, x: m.weight * by_rms(x.unflatten(-1, (4, -1))).flatten(-2), torch.ones(D), None, lambda: GROUPS,
    ),
    "nothing large": (lambda m, x: m.weight * by_rms(x.clamp(-100, 100)), torch.ones(D), None, lambda: GROUPS),
    "another weight": (
        lambda m, x: m.another * m.weight * by_rms(x), torch.ones(D), nn.Parameter(torch.ones(1)), lambda: GROUPS,
    ),
    "a buffer": (lambda m, x: m.another * m.weight * by_rms(x), torch.ones(D), torch.ones(1), lambda: GROUPS),
    "exponential": (lambda m, x: m.weight.exp() * by_rms(x), torch.zeros(D), None, lambda: GROUPS),
}  # fmt: skip


@pytest.mark.parametrize("run, weight, another, make", RESEMBLING.values(), ids=RESEMBLING)
def test_what_only_the_first_examples_make_a_norm(run, weight, another, make):
    """A later batch, or a weight after training, would have a wrong factor, and nothing would show it."""
    torch.manual_seed(0)
    module, x = Resembling(run, weight, another), make()
    slope = layers.RMSScale()._slope(layers.Call(module, (x,), {}, ("cpu", False, torch.bfloat16)), "weight", weight)
    expected = run(module, x) if bool(weight.any()) else by_rms(x)  # its derivative, as the weight is all ones or zeros
    torch.testing.assert_close(slope, expected.detach(), rtol=1e-4, atol=1e-4)
    assert not confirmed(layers.RMSScale(), module, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_hide_no_mean_beside_a_large_feature(dtype):
    """A layer norm was served as an RMS norm, and features that are coupled as ones that are not."""
    x = with_a_large_feature(dtype)
    norm = Resembling(lambda m, x: m.weight * by_rms(centred(x)), torch.ones(256)).to(dtype)
    layer_norm = Resembling(lambda m, x: m.weight * by_rms(x.float() - x.float().mean(-1, keepdim=True)).to(x.dtype),
                            torch.ones(256)).to(dtype)  # fmt: skip
    for module in (norm, layer_norm):
        assert not confirmed(layers.RMSScale(), module, x)
    assert confirmed(layers.LayerNormScale(), layer_norm, x)
    assert confirmed(layers.RMSScale(), Resembling(lambda m, x: m.weight * by_rms(x), torch.ones(256)).to(dtype), x)
    coupled = Resembling(lambda m, x: centred(m.weight * x), torch.ones(256)).to(dtype)
    assert not any(confirmed(rule, coupled, x) for rule in (layers.Factor(), layers.Scale()))


def test_a_factor_is_one_for_every_weight():
    """An exponential of zeros has the derivative of ``1 + w``, and has another after a step of training."""
    module, x = Resembling(lambda m, x: m.weight.exp() * x, torch.zeros(5)), torch.randn(3, 7, 5)
    assert not confirmed(layers.OnePlusFactor(), module, x)
    assert confirmed(layers.Scale(), module, x)  # which takes the derivative anew in each call


class ByKeyword(nn.Module):
    """A norm whose input is not its first argument."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(5)), 1e-6

    def forward(self, residual=None, *, x):
        return self.weight * by_rms(x if residual is None else x + residual)


def test_a_norm_that_is_called_by_keyword():
    x = torch.randn(3, 7, 5)
    assert confirmed(layers.RMSScale(), ByKeyword(), x=x)
    refuses = Resembling(lambda m, x: m.weight * by_rms(x.reshape(3, 7, 5)), torch.ones(5))  # no other shape
    assert not confirmed(layers.RMSScale(), refuses, x)


def test_a_norm_that_gets_a_hook_or_another_dtype_later():
    """It then runs once more, as a norm that was not recognised does."""
    module, x = ByKeyword(), torch.randn(3, 7, 5)
    names = frozenset({"weight"})

    def first(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        call = layers.Call(module, (), {"x": x}, ("cpu", False, torch.bfloat16))
        ((_, grads),) = layers.RMSScale().per_example_grads(call, torch.ones_like(x, dtype=dtype), names)
        return grads.example(0)

    hook = module.register_forward_pre_hook(lambda m, args, kwargs: (args, {"x": kwargs["x"] ** 3}), with_kwargs=True)
    torch.testing.assert_close(first(x, x.dtype), by_rms(x**3)[0].sum(0))
    hook.remove()
    module.forward = lambda x: module.weight * by_rms(x.float())
    torch.testing.assert_close(first(x.bfloat16(), torch.float32), by_rms(x.bfloat16().float())[0].sum(0))


def test_a_layer_that_is_the_whole_model():
    """Its parameters have no path before their names."""

    def losses(model, batch):
        return model(batch["input"]).sum((1, 2))

    x = numbers(7, 5)(4).float()
    statistics = fk.estimate(Int8Linear(5, 3), [{"input": x}], likelihood=losses, parameters="all")
    inputs = x.double().sum(1)  # [N, I], and every output gradient is 1
    torch.testing.assert_close(statistics["weight"], inputs.square().mean(0).float().expand(3, 5))


@pytest.mark.filterwarnings("ignore:.*slow exact path")
@pytest.mark.parametrize("case", FLAT | OTHERS)
def test_a_model_of_one_layer_is_exact(case):
    """By its rule, where there is one; the state of an LSTM has no example axis in front."""
    module, _ = seeded((FLAT | OTHERS)[case])
    by_path = paths(assert_exact(module, (FLAT | OTHERS)[case][1], parameters="all"))
    if case in FLAT or "frames" in case:
        assert by_path.keys() == {"fused"}
    else:
        assert ("loop" if case == "lstm" else "generic") in by_path


@pytest.mark.parametrize("case", [case for case in FLAT if case[0] not in "QSO" and case.endswith(("D", "(7, 5)"))])
def test_no_rule_claims_a_subclass_that_computes_something_else(case):
    """But the scales, which know no class, and the quantised linear, whose weight is not asked for here."""
    module, input = seeded(FLAT[case])
    plain = type(module)
    module.__class__ = type("Custom", (plain,), {"forward": lambda self, input: plain.forward(self, input).sin()})
    call = layers.Call(module, (input,), {}, ("cpu", False, torch.bfloat16))
    for layer in layers.LAYERS[:-1]:
        assert not layer.confirms(call, module(input).detach(), layer.covers(module))
    assert_exact(module, FLAT[case][1])


def routed_forms(draw, N: int, T: int, V: int, D: int) -> dict:
    """Every position sends two rows, each to one of ``V`` experts, perhaps the same."""
    sent, x, g = draw(N, T, 2).long() % V, draw(N, T, 2, D), draw(N, T, 2, 1)
    expert, order = sent.flatten().sort(stable=True)
    routes = layers.Routes(expert, order // 2, N * T, N)
    at = F.one_hot(sent, V)[..., None].double()
    of_rows = {"x": x.reshape(-1, D)[order], "g": g.reshape(-1, 1)[order]}

    def of_weights(output_grads: str, activations: str, axes: tuple[int, ...]) -> layers.RoutedGrads:
        factors = dict(output_grads=of_rows[output_grads], activations=of_rows[activations])
        return layers.RoutedGrads(**factors, routes=routes, shape=torch.Size((V, D)), sizes=(V, 1, D), axes=axes)

    weights, bias = (at * (g * x)[..., None, :]).sum(2), (at * x[..., None, :]).sum(2)
    common = dict(routes=routes, shape=torch.Size((V, D)), sizes=(V, D), axes=(0, 1))
    return {
        "routed": (of_weights("g", "x", (0, 1, 2)), weights),
        "routed, transposed": (of_weights("x", "g", (0, 2, 1)), weights),
        "routed bias": (layers.RoutedBiasGrads(output_grads=of_rows["x"], **common), bias),
    }


def forms(seed: int, N: int, T: int, V: int, D: int) -> dict:
    """Every form, and its dense terms ``[N, T, V, D]``: integers, so that sums are exact in any order."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randint(-4, 5, shape, generator=generator).double()

    x, g, terms, indices, rows = draw(N, T, D), draw(N, T, V), draw(N, T, V, D), draw(N, T).long() % V, draw(N, T, D)
    other = draw(N, T, V, D)
    scattered = F.one_hot(indices, V)[..., None] * rows[:, :, None]
    return {
        "outer product": (layers.OuterProductGrads(x, g, torch.Size((V, D))), torch.einsum("nto,nti->ntoi", g, x)),
        "embedding": (layers.EmbeddingGrads(indices, rows, V), scattered),
        "padded": (layers.EmbeddingGrads(indices, rows, V, 0), scattered.index_fill(2, torch.tensor(0), 0)),
        "position": (layers.PositionGrads(terms), terms),
        "scale": (layers.PositionGrads(terms, factors=layers.Factors(other)), terms * other),
        **routed_forms(draw, N, T, V, D),
        "dense": (layers.DenseGrads(terms[:, 0]), terms[:, :1]),
    }


def assert_groups(parts, squares: torch.Tensor) -> None:
    """Squares summed over groups are the sums of the squares; integers, so exactly."""
    by_hand = {"row": squares.sum(1), "column": squares.sum(0), "tensor": squares.sum()}
    for by, expected in by_hand.items():
        assert layers.group_shape(squares.shape, by) == expected.shape
        total = torch.ones_like(expected)
        for grads in parts if isinstance(parts, tuple) else (parts,):
            grads.add_group_squares_(total, by)
        assert torch.equal(total, 1 + expected), by


@pytest.mark.parametrize("shape", [(), (3,), (3, 1), (2, 3), (2, 3, 2)], ids=str)
@pytest.mark.parametrize("by", ["row", "column", "tensor"])
def test_a_gradient_is_squared_and_summed_over_groups(by, shape):
    grad = torch.randn(shape, dtype=torch.float64)
    squares = grad.square()
    if by == "tensor":
        expected = squares.sum()
    elif grad.ndim < 2:
        expected = squares
    else:
        expected = squares.flatten(1).sum(1) if by == "row" else squares.sum(0)
    torch.testing.assert_close(layers.group_squares(grad, by), expected)
    for grads in (layers.DenseGrads(grad[None]), layers.PositionGrads(grad[None, None])):
        total = torch.zeros(layers.group_shape(grad.shape, by), dtype=torch.float64)
        grads.add_group_squares_(total, by)
        torch.testing.assert_close(total, expected)


sizes = st.tuples(*[st.integers(1, 4)] * 4)
use = st.tuples(st.integers(0, 2**31), st.sampled_from(sorted(forms(0, 1, 1, 1, 1))))


@given(sizes=sizes, uses=st.lists(use, min_size=1, max_size=3))
def test_uses_of_one_parameter_add_up_before_the_square(sizes, uses):
    found = [forms(seed, *sizes)[name] for seed, name in uses]
    grads, terms = layers.join([grads for grads, _ in found]), torch.cat([terms for _, terms in found], dim=1)
    assert grads.num_examples == sizes[0]
    assert torch.equal(torch.stack([grads.example(n) for n in range(sizes[0])]), terms.sum(1))
    squares, position_squares = torch.ones(2, *sizes[2:], dtype=torch.float64)
    grads.add_squares_(squares)
    assert torch.equal(squares, 1 + terms.sum(1).square().sum(0))
    assert_groups(grads, terms.sum(1).square().sum(0))
    if "dense" in dict(map(reversed, uses)):
        with pytest.raises(NotImplementedError, match="sums over positions"):
            grads.add_position_squares_(position_squares)
    else:
        grads.add_position_squares_(position_squares)
        assert torch.equal(position_squares, 1 + terms.square().sum((0, 1)))


@given(sizes=sizes, seed=st.integers(0, 2**31), table=st.sampled_from(["embedding", "padded"]))
def test_the_rows_of_a_tied_embedding_complete_the_squares_of_its_head(sizes, seed, table):
    (head, head_terms), (table, table_terms) = (forms(seed, *sizes)[name] for name in ("outer product", table))
    pairs = (torch.arange(sizes[0])[:, None] * sizes[2] + table.indices).unique()
    example, row = pairs // sizes[2], pairs % sizes[2]
    assert torch.equal(head.rows(example, row), head_terms.sum(1)[example, row])
    total = torch.ones(sizes[2:], dtype=torch.float64)
    head.add_squares_(total)
    tied = layers.TiedRows(table, pairs, head.rows(example, row))
    tied.add_squares_(total)
    squares = (head_terms.sum(1) + table_terms.sum(1)).square().sum(0)
    assert torch.equal(total, 1 + squares)
    assert_groups((head, tied), squares)


class Scaled(nn.Module):
    def __init__(self, rule: object) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5))
        self.fishkern_layer = rule

    def forward(self, x):
        return x @ self.weight.T / 2


class OfScaled(layers.Layer):
    def __init__(self, factor: float = 0.5) -> None:
        self.factor = factor

    def covers(self, module):
        return frozenset({"weight"})

    def gives_factors(self, name):
        return True

    def per_example_grads(self, call, output_grads, names):
        scaled = layers.positions(output_grads) * self.factor
        yield "weight", layers.OuterProductGrads(layers.positions(call.input), scaled, call.module.weight.shape)


def test_a_module_brings_its_own_rule():
    """It comes before those of fishkern, serves what reads factors, and is compared with autograd as they are."""
    torch.manual_seed(0)
    batches = [(torch.randn(4, 5), torch.randint(3, (4,)))]
    classes = dict(likelihood=fk.Classification())
    exact = fk.estimate(nn.Sequential(Scaled(None)), batches, **classes)
    assert exact.coverage["0.weight"].path == "generic"
    module = nn.Sequential(Scaled(OfScaled()))
    statistics = fk.estimate(module, batches, **classes)
    assert statistics.coverage["0.weight"].path == "fused"
    assert fk.verify(module, batches, statistics, **classes).ok
    norms = fk.estimate(module, batches, fk.InputNorms(), parameters="0.weight", **classes)
    torch.testing.assert_close(norms["0.weight"], batches[0][0].square().mean(0))
    wrong = nn.Sequential(Scaled(OfScaled(1.0)))
    with pytest.warns(UserWarning, match="weight"):
        corrected = fk.estimate(wrong, batches, **classes)
    assert corrected.coverage["0.weight"].path == "loop"
    assert fk.verify(wrong, batches, corrected, **classes).ok
    for rule, what in ((OfScaled, "the class OfScaled"), ("rule", "got str")):
        with pytest.raises(TypeError, match=f"fishkern_layer of a Scaled must be an instance.*{what}"):
            fk.estimate(nn.Sequential(Scaled(rule)), batches, **classes)
