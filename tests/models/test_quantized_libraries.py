"""The libraries of quantised weights themselves, on a CPU; ``make slow`` installs them (the extra ``quant``)."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fishkern as fk
from tests.support import zoo
from tests.support.oracle import next_token, squares_one_by_one, worst_error
from tests.support.starts import start_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*inputs will be cast from torch.float32 to float16"),
    pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered to the Autograd key"),
]

Weights = dict[str, Tensor]


def llama() -> nn.Module:
    torch.manual_seed(0)
    return zoo.llama(hidden_size=128, intermediate_size=256).model.eval()


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: one for name, one in model.named_modules() if isinstance(one, nn.Linear) and name != "lm_head"}


def is_inner(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and name != "lm_head"


def replaced(model: nn.Module, make: Callable[[nn.Linear], tuple[nn.Module, Tensor]]) -> Weights:
    """Put quantised linears into a model, and give their dequantised weights."""
    weights = {}
    for name, linear in linears(model).items():
        parent, _, leaf = name.rpartition(".")
        quantised, weights[name] = make(linear)
        setattr(model.get_submodule(parent), leaf, quantised.eval())
    return weights


def bitsandbytes_4bit(model: nn.Module, storage: torch.dtype) -> Weights:
    bnb = pytest.importorskip("bitsandbytes")
    model.is_loaded_in_4bit = True  # which PEFT asks

    def make(linear):
        sizes, options = (linear.in_features, linear.out_features), dict(compute_dtype=torch.float32)
        quantised = bnb.nn.LinearNF4(*sizes, bias=False, quant_storage=storage, **options)
        quantised.load_state_dict({"weight": linear.weight.data})
        quantised = quantised.to("cpu")  # which quantises
        return quantised, bnb.functional.dequantize_4bit(quantised.weight.data, quantised.weight.quant_state).float()

    return replaced(model, make)


def bitsandbytes_int8(model: nn.Module) -> Weights:
    bnb = pytest.importorskip("bitsandbytes")

    def make(linear):
        sizes = linear.in_features, linear.out_features
        quantised = bnb.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False, threshold=6.0)
        quantised.load_state_dict({"weight": linear.weight.data})
        quantised = quantised.to("cpu")
        return quantised, quantised.weight.data.float() * quantised.weight.SCB.view(-1, 1) / 127

    return replaced(model, make)


def torchao(model: nn.Module, config: str, **options) -> Weights:
    quantization = pytest.importorskip("torchao.quantization")
    if "granularity" in options:
        options["granularity"] = quantization.PerGroup(options["granularity"])
    quantization.quantize_(model, getattr(quantization, config)(**options), filter_fn=is_inner)
    return {name: linear.weight.dequantize() for name, linear in linears(model).items()}


def quanto(model: nn.Module, weights: str) -> Weights:
    library = pytest.importorskip("optimum.quanto")
    if weights == "qint4" and shutil.which("c++") is None:
        pytest.skip("quanto compiles its 4-bit unpacking with a C++ compiler, and there is none")
    library.quantize(model, weights=getattr(library, weights), exclude="lm_head")
    library.freeze(model)
    return {name: linear.weight.dequantize() for name, linear in linears(model).items()}


def hqq(model: nn.Module) -> Weights:
    library = pytest.importorskip("hqq.core.quantize")
    library.HQQLinear.set_backend(library.HQQBackend.PYTORCH)
    config = library.BaseQuantizeConfig(nbits=4, group_size=64)

    def make(linear):
        quantised = library.HQQLinear(copy.deepcopy(linear), config, compute_dtype=torch.float32, device="cpu")
        return quantised, quantised.dequantize()

    return replaced(model, make)


EXACT: dict[str, Callable[[nn.Module], Weights]] = {
    "bitsandbytes nf4": lambda model: bitsandbytes_4bit(model, torch.uint8),
    "bitsandbytes nf4, stored as bfloat16": lambda model: bitsandbytes_4bit(model, torch.bfloat16),
    "torchao int8": lambda model: torchao(model, "Int8WeightOnlyConfig"),
    "torchao float8": lambda model: torchao(model, "Float8WeightOnlyConfig"),
    "torchao int4": lambda model: torchao(model, "IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=32),
    "quanto int8": lambda model: quanto(model, "qint8"),
    "quanto float8": lambda model: quanto(model, "qfloat8"),
    "quanto int4": lambda model: quanto(model, "qint4"),
    "hqq": hqq,
}


def twin_of(weights: Weights) -> nn.Module:
    twin = llama()
    for name, weight in weights.items():
        twin.get_submodule(name).weight.data = weight.detach().clone()
    return twin


@pytest.mark.parametrize("case", EXACT)
def test_every_weight_has_the_fisher_of_the_dequantised_model(case):
    model = llama()
    weights = EXACT[case](model)
    batches = [zoo.text_batch(4, 7), zoo.text_batch(2, 5, seed=1)]
    statistics = fk.estimate(model, batches, parameters="all")
    truth = squares_one_by_one(twin_of(weights), batches, next_token)
    error, name = worst_error(statistics, truth, torch.float32)
    assert error < 1e-4, f"{name}: {error:.1e}"
    assert {statistics.coverage[f"{name}.weight"].path for name in weights} == {"fused"}
    unquantised = squares_one_by_one(llama(), batches, next_token)
    assert worst_error(statistics, unquantised, torch.float32)[0] > 1e-2  # the twin matters
    assert fk.verify(model, batches, statistics).ok


def test_int8_of_bitsandbytes_has_the_fisher_of_its_own_inputs_and_gradients():
    """It rounds activations, so that no other model has its gradients; see docs/layers.md for how far off they are."""
    model = llama()
    weights = bitsandbytes_int8(model)
    batches = [zoo.text_batch(4, 7)]
    statistics = fk.estimate(model, batches, parameters="all")
    truth = {name: torch.zeros_like(weight, dtype=torch.float64) for name, weight in weights.items()}
    inputs, grads = {}, {}
    for name in weights:
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0].detach()))
        module.register_full_backward_hook(lambda _, __, grad, name=name: grads.__setitem__(name, grad[0]))
    for n in range(4):
        next_token(model, {key: value[n : n + 1] for key, value in batches[0].items()}).backward()
        for name in weights:
            truth[name] += (grads[name][0].double().T @ inputs[name][0].double()).square() / 4
    ours = {name: statistics[f"{name}.weight"] for name in weights}
    # each row is quantised by itself, so that its batch changes nothing but rounding
    error, name = worst_error(ours, truth, torch.float32)
    assert error < 1e-4, f"{name}: {error:.1e}"
    twin = squares_one_by_one(twin_of(weights), batches, next_token)
    distance, _ = worst_error(ours, {name: twin[f"{name}.weight"] for name in weights}, torch.float32)
    assert 1e-3 < distance < 0.1


def test_a_linear_that_quantises_its_activations_is_refused_by_name():
    model = llama()
    torchao(model, "Int8DynamicActivationInt8WeightConfig")
    for parameters in (None, "all"):
        with pytest.raises(fk.UnsupportedModuleError, match=r"q_proj' \(Linear\) cuts the gradient"):
            fk.estimate(model, [zoo.text_batch()], parameters=parameters)


def packed(model: nn.Module) -> int:
    states = [getattr(module.weight, "quant_state", None) for module in linears(model).values()]
    return sum(bool(getattr(state, "packing_format_for_cpu", False)) for state in states)


def with_adapter(model: nn.Module, kind: str) -> nn.Module:
    peft = pytest.importorskip("peft")
    targets = ["k_proj", "v_proj", "down_proj"]
    if kind == "(IA)^3":
        config = peft.IA3Config(target_modules=targets, feedforward_modules=["down_proj"])
    else:
        config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, use_dora=kind == "DoRA")
    return peft.get_peft_model(model, config)


def gradients(model: nn.Module, batch: dict) -> dict[str, Tensor]:
    model.train().zero_grad()
    model(**batch).loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "(IA)^3"])
def test_qlora_is_exact_and_trains_afterwards_as_before(kind):
    model = llama()
    weights = bitsandbytes_4bit(model, torch.uint8)
    model = with_adapter(model, kind)
    batch = zoo.text_batch(4, 7)
    before = gradients(model, batch)
    model.eval()
    statistics = fk.estimate(model, [batch])
    assert fk.verify(model, [batch], statistics).ok
    fk.estimate(model, [batch], fk.SketchedFisher())
    fk.fish_tuning(model, [batch], density=0.1)
    assert packed(model.base_model.model) == 0
    after = gradients(model, batch)
    assert before.keys() == after.keys() == statistics.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    twin = with_adapter(twin_of(weights), kind)  # the loop itself would repack a quantised model
    twin.load_state_dict({name: one for name, one in model.named_parameters() if name in before}, strict=False)
    truth = squares_one_by_one(twin, [batch], next_token)
    error, name = worst_error(statistics, truth, torch.float32)
    assert error < 1e-4, f"{name}: {error:.1e}"


def test_a_model_that_has_repacked_itself_is_refused_by_name():
    model = llama()
    bitsandbytes_4bit(model, torch.uint8)
    model = with_adapter(model, "LoRA").eval()
    batch = zoo.text_batch(2, 5)
    with torch.no_grad():
        model(**batch)
    if not packed(model.base_model.model):
        pytest.skip("bitsandbytes repacks on processors with AVX512-BF16 only")
    with pytest.raises(fk.UnsupportedModuleError, match="cuts the gradient.*bitsandbytes.*load the model again"):
        fk.estimate(model, [batch])


@pytest.mark.parametrize("case", ["bitsandbytes nf4", "bitsandbytes int8", "torchao int8", "hqq"])
def test_a_lora_with_a_start_leaves_the_output_to_the_bit(case, tmp_path):
    peft = pytest.importorskip("peft")
    from fishkern.integrations.lora import attach_init, plain_lora

    def quantised() -> nn.Module:
        model = llama()
        {**EXACT, "bitsandbytes int8": bitsandbytes_int8}[case](model)
        model.is_loaded_in_8bit = "int8" in case  # which PEFT asks
        return model.train()  # a 4-bit linear would repack itself

    batch, model = zoo.text_batch(4, 7), quantised()
    init = start_of(model, lambda n: 1 + n % 5)
    with pytest.raises(ValueError, match="cannot be subtracted from quantised weights"):
        attach_init(model, init, residual="weights")
    expected = model(**batch).logits.detach()
    adapted = attach_init(model, init)
    output = adapted(**batch)
    assert torch.equal(output.logits, expected)
    output.loss.backward()
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert all(parameter.grad.abs().max() > 0 for parameter in trained)
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.05 * torch.randn_like(parameter))
    moved = adapted(**batch).logits.detach()
    assert (moved - expected).abs().max() > 1e-2
    loaded = peft.PeftModel.from_pretrained(quantised(), plain_lora(adapted, tmp_path)).train()
    assert (loaded(**batch).logits - moved).abs().max() < 1e-3
