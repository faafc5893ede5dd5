"""Models with sharded parameters are refused by name where they are not served, and the same in one piece are served.

What FSDP2 shards is served by ``estimate`` and ``verify`` (``tests/statistics/test_sharded_ranks.py``) and by masked
optimizers (``tests/optim/test_sharded.py``). What tensor parallel splits is served by ``estimate``
(``tests/statistics/test_tensor_parallel_ranks.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import fishkern as fk

BATCHES = [(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 2, 1]))]


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("group") / "store"
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))


def fsdp2() -> nn.Module:
    return fully_shard(net(), mesh=init_device_mesh("cpu", (1,)))


def fsdp2_inside() -> nn.Module:
    model = net()
    fully_shard(model[2], mesh=init_device_mesh("cpu", (1,)))
    return model


def fsdp1(use_orig_params: bool) -> nn.Module:
    return FullyShardedDataParallel(net(), device_id=torch.device("cpu"), use_orig_params=use_orig_params)


def split_by_torch() -> nn.Module:
    return parallelize_module(net(), init_device_mesh("cpu", (1,)), {"0": ColwiseParallel()})


def split_by_transformers() -> nn.Module:
    model = net()
    model._tp_size = 2
    return model


def zero3() -> nn.Module:
    model = net()
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id = number
    return model


FSDP2 = "fully_shard of torch; fsdp_version: 2"
SHARDED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "FSDP1": (lambda: fsdp1(False), "FSDP shards the parameters of 'the model'"),
    "FSDP1 with its names": (lambda: fsdp1(True), "FSDP shards the parameters of 'the model'"),
    "tp_plan": (split_by_transformers, "split it over 2 processes.*without tp_plan="),
    "ZeRO-3": (zero3, "ZeRO-3 has partitioned 0.weight.*ZeRO stage 2"),
}
FULLY = {
    "FSDP2": (fsdp2, "FSDP shards the parameters of 'the model'.*DistributedDataParallel"),
    "FSDP2 of a part": (fsdp2_inside, "FSDP shards the parameters of '2'"),
    "tensor parallel": (split_by_torch, "0.weight is a DTensor, split over processes.*whole model"),
}


def of_the_whole() -> tuple[fk.Statistics, fk.Selection]:
    statistics = fk.estimate(net(), BATCHES, likelihood=fk.Classification())
    return statistics, fk.select(statistics, fk.GlobalTopK(density=0.5))


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`:UserWarning")
@pytest.mark.parametrize("case", SHARDED)
def test_a_sharded_model_is_refused_by_name(case):
    make, words = SHARDED[case]
    model, likelihood = make(), fk.Classification()
    statistics, selection = of_the_whole()
    estimates = [
        lambda: fk.estimate(model, BATCHES, likelihood=likelihood),
        lambda: fk.estimate(model, BATCHES, fk.SketchedFisher(), likelihood=likelihood, parameters="all"),
        lambda: fk.verify(model, BATCHES, statistics, likelihood=likelihood),
    ]
    others = [
        lambda: fk.MaskedAdamW(model, selection, lr=1e-3),
        lambda: fk.fish_tuning(model, BATCHES, density=0.5, pool="model", likelihood=likelihood, order="random"),
    ]
    for call in [*estimates, *others]:
        with pytest.raises(fk.UnsupportedModuleError, match=words):
            call()
    with pytest.raises(fk.UnsupportedModuleError, match=FSDP2):
        estimates[0]()


@pytest.mark.filterwarnings("ignore:`torch.distributed.reduce_scatter_tensor` is deprecated:FutureWarning")
@pytest.mark.parametrize("case", FULLY)
def test_what_is_held_in_parts_is_estimated_and_trained_and_refused_by_name_elsewhere(case):
    make, words = FULLY[case]
    model, likelihood = make(), fk.Classification()
    statistics, selection = of_the_whole()
    found = fk.estimate(model, BATCHES, likelihood=likelihood)
    for name in statistics:
        torch.testing.assert_close(found.full(name), statistics[name])
    with pytest.raises(fk.UnsupportedModuleError, match="DiagonalKronecker.* is not computed on (shards|parts)"):
        fk.estimate(model, BATCHES, fk.DiagonalKronecker(), likelihood=likelihood)
    if case == "tensor parallel":
        with pytest.raises(fk.UnsupportedModuleError, match="prepare is not built for tensor parallel models"):
            fk.prepare(model, BATCHES[0], likelihood=likelihood)
    else:
        ready = fk.prepare(model, BATCHES[0], likelihood=likelihood)
        assert fk.estimate(model, BATCHES, prepared=ready) == found
    with pytest.raises(fk.UnsupportedModuleError, match=words):
        fk.fish_tuning(model, BATCHES, density=0.5, pool="model", likelihood=likelihood, order="random")
    optimizer = fk.MaskedAdamW(model, selection, lr=1e-3)
    model(BATCHES[0][0]).square().sum().backward()
    optimizer.step()
    moved = fk.delta(model, selection)
    before = {name: one for name, one in net().named_parameters() if selection.counts[name]}
    assert all(not torch.equal(moved.values(n), selection.entries(n).gather(p)) for n, p in before.items())
    expected = fk.select(found.whole(), fk.GlobalTopK(density=0.5))
    assert fk.select(found, fk.GlobalTopK(density=0.5)).gathered() == expected == selection


def test_a_wrapper_that_keeps_parameters_whole_is_served():
    likelihood = fk.Classification()
    expected = fk.estimate(net(), BATCHES, likelihood=likelihood)
    found = fk.estimate(nn.parallel.DistributedDataParallel(net()), BATCHES, likelihood=likelihood)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
