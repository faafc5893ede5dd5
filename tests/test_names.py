"""One name per parameter, whatever the model is wrapped in."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fishkern as fk
from fishkern import hosts
from fishkern.names import canonical_name


@pytest.mark.parametrize(
    ("wrapped", "canonical"),
    [
        ("layers.0.weight", "layers.0.weight"),
        ("module.layers.0.weight", "layers.0.weight"),
        ("module.module.layers.0.weight", "layers.0.weight"),
        ("_orig_mod.layers.0.weight", "layers.0.weight"),
        ("_orig_mod.module.layers.0._orig_mod.weight", "layers.0.weight"),
        ("module._orig_mod.layers.0.weight", "layers.0.weight"),
        ("_fsdp_wrapped_module.layers.0._fsdp_wrapped_module.mlp.weight", "layers.0.mlp.weight"),
        ("layers.0._checkpoint_wrapped_module.mlp.weight", "layers.0.mlp.weight"),
        ("encoder.module.weight", "encoder.module.weight"),
        ("base_model.model.model.layers.0.q_proj.lora_A.default.weight",) * 2,
        ("module", "module"),
        ("module.module", "module"),
        ("_orig_mod", "_orig_mod"),
    ],
)
def test_wrappers_go(wrapped: str, canonical: str):
    assert canonical_name(wrapped) == canonical


@given(st.lists(st.sampled_from(["module", "_orig_mod", "_fsdp_wrapped_module", "layers", "0", "weight"]), min_size=1))
def test_idempotent(components: list[str]):
    once = canonical_name(".".join(components))
    assert canonical_name(once) == once
    assert once.split(".")[-1] == components[-1]


def test_torchs_own_wrappers():
    """The names are those that torch itself makes up."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    plain = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    wrapped = nn.DataParallel(torch.compile(nn.Sequential(checkpoint_wrapper(plain[0]), torch.compile(plain[1]))))
    canonical = [canonical_name(name) for name, _ in wrapped.named_parameters()]
    assert canonical == [name for name, _ in plain.named_parameters()]
    raw = [".".join(path) for path, _ in _raw_parameters(wrapped)]
    assert [canonical_name(name) for name in raw] == canonical


def _raw_parameters(module: nn.Module, path: tuple[str, ...] = ()):
    """Walk through the modules, since torch's checkpoint wrapper hides itself from ``named_parameters``."""
    for name, parameter in module._parameters.items():
        yield (*path, name), parameter
    for name, child in module._modules.items():
        yield from _raw_parameters(child, (*path, name))


class Inner(nn.Module):
    """Has a submodule called ``module``, and a parameter with the name of one in it."""

    def __init__(self) -> None:
        super().__init__()
        self.module, self.weight = nn.Linear(4, 3), nn.Parameter(torch.rand(4))

    def forward(self, x):
        return self.module(x * self.weight)


WRAPS = {
    "bare": lambda model: model,
    "compiled": torch.compile,
    "parallel": nn.DataParallel,
    "both": lambda model: nn.DataParallel(torch.compile(model)),
}


@pytest.mark.filterwarnings("ignore:.*slow exact path")
@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_a_submodule_called_module_keeps_its_name(wrap):
    inner = Inner()
    model, batches = wrap(inner), [(torch.randn(3, 4), torch.tensor([0, 1, 2]))]
    statistics = fk.estimate(model, batches, likelihood=fk.Classification())
    names = [name for name, _ in inner.named_parameters()]
    assert list(statistics) == names == ["weight", "module.weight", "module.bias"]
    assert sum(covered.numel for covered in statistics.coverage.values()) == sum(map(torch.numel, inner.parameters()))
    assert all(statistics[name].shape == parameter.shape for name, parameter in inner.named_parameters())
    assert fk.verify(model, batches, statistics, likelihood=fk.Classification()).ok
    selection = fk.select(statistics, fk.PerTensorTopK(k=2))
    selection.check(model)
    selection.check(inner.named_parameters())
    for parameters in (model, inner.named_parameters(), nn.DataParallel(inner).named_parameters()):
        optimizer = fk.MaskedSGD(parameters, selection, lr=0.1)
        assert sum(len(group["params"]) for group in optimizer.param_groups) == 3


def test_the_average_of_a_trained_model_gives_its_delta():
    """torch's EMA holds a copy as ``module``: the same parameters by the same names."""
    torch.manual_seed(0)
    model, batches = nn.Sequential(nn.Linear(4, 3)), [(torch.randn(3, 4), torch.tensor([0, 1, 2]))]
    statistics = fk.estimate(model, batches, likelihood=fk.Classification())
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    of_average = fk.estimate(average, batches, likelihood=fk.Classification())
    assert list(of_average) == list(statistics) == ["0.weight", "0.bias"]
    assert torch.equal(of_average["0.weight"], statistics["0.weight"])
    selection = fk.select(statistics, fk.GlobalTopK(k=3))
    base, optimizer = copy.deepcopy(model), fk.MaskedAdamW(model, selection, lr=0.1)
    for _ in range(3):
        model(batches[0][0]).sum().backward()
        optimizer.step()
        average.update_parameters(model)
    fk.apply_delta(base, fk.delta(average, selection))
    assert torch.equal(base[0].weight, average.module[0].weight)
    assert not torch.equal(base[0].weight, model[0].weight)


def test_names_that_would_become_one_are_refused():
    model = nn.Module()
    model.weight, model._orig = nn.Parameter(torch.rand(3)), nn.Module()
    model.add_module("_fsdp_wrapped_module", nn.Module())
    model._fsdp_wrapped_module.weight = nn.Parameter(torch.rand(3))
    with pytest.raises(ValueError, match="weight and _fsdp_wrapped_module.weight would both be named weight"):
        hosts.named_parameters(model)
