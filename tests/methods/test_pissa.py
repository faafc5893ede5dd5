"""PiSSA against the singular value decomposition of torch, and PEFT's own start."""

from __future__ import annotations

import copy

import pytest
import torch

import fishkern as fk
from tests.support import zoo

pytest.importorskip("transformers")


@pytest.mark.parametrize("scaling", [1.0, 2.0])
@pytest.mark.parametrize("family", [zoo.llama, zoo.gpt2], ids=["llama", "gpt2"])
def test_it_starts_from_the_largest_singular_values(family, scaling):
    model = family().model.eval()
    init = fk.pissa(model, rank=3, scaling=scaling)
    for path, start in init.items():
        module = model.get_submodule(path)
        weight = module.weight.detach().double()
        U, sigma, Vh = torch.linalg.svd(weight.T if type(module).__name__ == "Conv1D" else weight)
        torch.testing.assert_close(start.delta().double(), (U[:, :3] * sigma[:3]) @ Vh[:3], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(start.A.norm(dim=1), start.B.norm(dim=0))
        assert start.scaling == scaling
        assert start.chosen.tolist() == [0, 1, 2]
    init.check(model)


def test_peft_starts_from_the_same():
    peft = pytest.importorskip("peft")
    model = zoo.llama().model.eval()
    init = fk.pissa(model, rank=4, targets=["q_proj", "down_proj"])
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "down_proj"], init_lora_weights="pissa")
    theirs = peft.get_peft_model(copy.deepcopy(model), config).base_model.model
    assert len(init) == 4
    for path, start in init.items():
        delta = theirs.get_submodule(path).get_delta_weight("default").detach()
        torch.testing.assert_close(start.delta(), delta, rtol=1e-3, atol=1e-5)


def test_progress_counts_the_weights():
    told = []
    init = fk.pissa(zoo.llama().model, rank=1, progress=lambda *done: told.append(done))
    assert told == [(number, len(init)) for number in range(1, len(init) + 1)]


def test_what_is_refused():
    model = zoo.llama().model
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        fk.pissa(model, rank=0)
    with pytest.raises(ValueError, match=r"rank 100 of model.layers.0.* exceeds the smaller side of its"):
        fk.pissa(model, rank=100)
    with pytest.raises(ValueError, match="scaling must be a positive number, got 0"):
        fk.pissa(model, rank=1, scaling=0)
    with pytest.raises(ValueError, match="targets='nothing' matches none"):
        fk.pissa(model, targets="nothing")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[2:] = 0
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj.weight: rank 4 was asked for, and only 2 of its sing"):
        fk.pissa(model, rank=4)
