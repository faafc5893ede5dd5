"""One name per parameter, whatever the model is wrapped in."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

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
