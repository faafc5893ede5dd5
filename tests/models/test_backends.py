"""The whole pass with the kernels agrees with the whole pass of the references."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fishkern as fk
from fishkern import backend as backends
from tests.support.closeness import assert_as_accurate
from tests.support.oracle import squares_one_by_one
from tests.support.zoo import Specimen, bert_classifier, gpt2, llama

pytest.importorskip("triton")

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


def lora() -> Specimen:
    peft = pytest.importorskip("peft")
    specimen = llama()
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return Specimen(peft.get_peft_model(specimen.model, config), specimen.batch, specimen.loss)


MODELS = {
    "llama": llama,
    "tied llama": lambda: llama(tie_word_embeddings=True),
    "lora": lora,
    "gpt2": gpt2,
    "bert classifier": bert_classifier,  # whose head has one position
}


# The interpreter is slow, and what the plain one launches the tied one does too.
NAMES = [pytest.param(name, marks=[] if name in ("tied llama", "lora") else [pytest.mark.slow]) for name in MODELS]


@pytest.mark.parametrize("name", NAMES)
def test_agree(name, monkeypatch):
    """Each parameter is as near to the float64 loop with the kernels as with the references."""
    torch.manual_seed(0)
    specimen = MODELS[name]()
    model = specimen.model.to(DEVICE)
    batches = [{k: v.to(DEVICE) for k, v in specimen.batch(seed=seed).items()} for seed in range(2)]
    launched = []
    kernel = backends._kernel
    monkeypatch.setattr(backends, "_kernel", lambda op: launched.append(op) or kernel(op))
    ours = fk.estimate(model, batches, backend="triton")
    assert "sum_grad_squared" in launched
    launched.clear()
    plain = fk.estimate(model, batches, backend="torch")
    assert not launched
    truth = squares_one_by_one(copy.deepcopy(model).double(), batches, specimen.loss)
    assert ours.keys() == plain.keys()
    for parameter, values in ours.items():
        assert_as_accurate(values, plain[parameter], truth[parameter])
        assert ours.coverage[parameter].path == plain.coverage[parameter].path


def test_factors_reach_the_kernel_as_they_are(monkeypatch):
    """A linear's activations and output gradients are not copied on the way: the kernel gets their memory."""
    from fishkern.kernels import sum_grad_squared as kernels

    model = nn.Sequential(nn.Linear(8, 12, bias=False), nn.Linear(12, 4, bias=False)).to(DEVICE)
    inputs = torch.randn(3, 5, 8, device=DEVICE)
    seen = []
    real = kernels.sum_grad_squared

    def spy(activations, output_grads, **options):
        seen.append((activations.data_ptr(), options["out"]))
        return real(activations, output_grads, **options)

    monkeypatch.setattr(backends, "_kernel", lambda op: spy)
    given = []
    model[0].register_forward_pre_hook(lambda module, args: given.append(args[0].data_ptr()))

    def losses(model: nn.Module, batch: tuple) -> torch.Tensor:
        return model(batch[0]).square().sum((1, 2))

    statistics = fk.estimate(model, [(inputs, torch.zeros(3))], likelihood=losses, backend="triton", check=False)
    assert given[-1] in [address for address, _ in seen]
    assert all(out.is_contiguous() for _, out in seen)
    assert (len(seen), len(statistics)) == (4, 2)  # the first two examples come by themselves


def test_the_reason_is_named():
    if ON_GPU:
        assert fk.why_not_triton(torch.ones(1, device=DEVICE)) is None
    else:
        assert "CPU" in fk.why_not_triton(torch.ones(1))


def test_a_kernel_that_fails_raises(monkeypatch):
    """Nothing falls back to the reference."""
    from fishkern.kernels import sum_grad_squared as kernels

    def broken(*args, **options):
        raise RuntimeError("no registers left")

    monkeypatch.setattr(kernels, "launches", broken)
    x, g = torch.ones(2, 3, 4, device=DEVICE), torch.ones(2, 3, 5, device=DEVICE)
    with pytest.raises(RuntimeError, match="no registers left"):
        fk.ops.sum_grad_squared(x, g, backend="triton")
