"""Insertion points of real architectures: what is inserted there is run, and comes out again without a trace."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils._pytree import tree_leaves

from fishkern import hosts
from fishkern.hosts import InsertionPoints, Wrapper
from tests.support.layered import FAMILIES

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.matrix

KNOWN = {name: family for name, family in FAMILIES.items() if name != "mamba"}
NORMED = {"vit", "deit", "dinov2", "dinov2-gated", "dinov2-registers", "dinov3", "clip", "clip-vision", "siglip"}


class Identity(Wrapper):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_layer(*args, **kwargs)


class Offset(Wrapper):
    """Adds to every feature another number: a norm would take away the same one."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.base_layer(*args, **kwargs)
        first, *rest = output if isinstance(output, tuple) else (output,)
        first = first + torch.linspace(-1.0, 1.0, first.shape[-1])
        return (first, *rest) if isinstance(output, tuple) else first


def run(model: nn.Module, inputs: dict) -> list[Tensor]:
    with torch.no_grad():
        return [leaf for leaf in tree_leaves(dict(model(**inputs))) if isinstance(leaf, Tensor)]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def paths_in(points: InsertionPoints) -> Iterator[str]:
    """Every path in the points but that of the keys: attention ignores what is added to all of them."""
    for branch in (points.attention, points.feed_forward):
        yield from filter(None, vars(branch).values())
    yield from points.projections if len(points.projections) == 1 else points.projections[::2]


@pytest.mark.parametrize("name", KNOWN)
def test_an_identity_changes_nothing_and_an_offset_does(name):
    family = FAMILIES[name]
    model, inputs = family.model(), family.inputs()
    state, before = list(model.state_dict()), run(model, inputs)
    for layers in hosts.stacks(model).values():
        layer = layers[1]
        for path in paths_in(hosts.insertion_points(layer)):
            for kind in (Identity, Offset):
                hosts.insert(layer, {path: kind(layer.get_submodule(path))})
                assert same(run(model, inputs), before) == (kind is Identity), path
                hosts.remove(model)
                assert list(model.state_dict()) == state
                assert same(run(model, inputs), before), path


@pytest.mark.parametrize("name", sorted(KNOWN.keys() - {"modernbert"}))  # it reads attributes of its layers
def test_around_a_whole_layer(name):
    family = FAMILIES[name]
    model, inputs = family.model(), family.inputs()
    before = run(model, inputs)
    for stack, layers in hosts.stacks(model).items():
        for kind in (Identity, Offset):
            hosts.insert(model, {f"{stack}.1": kind(layers[1])})
            assert same(run(model, inputs), before) == (kind is Identity)
            hosts.remove(model)
    assert same(run(model, inputs), before)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_norms_are_those_of_what_the_layer_adds(name):
    """With them the layer can be put together from its parts, to the bit; where it cannot, none are given."""
    family = FAMILIES[name]
    model = family.model()
    calls: list[tuple] = []
    for layers in hosts.stacks(model).values():
        for layer in layers:
            layer.register_forward_hook(lambda *call: calls.append(call), with_kwargs=True)
    run(model, family.inputs())
    assert calls
    for layer, args, kwargs, output in calls:
        points = hosts.insertion_points(layer)
        branches = (points.attention, points.feed_forward) if points else ()
        assert [branch.norm is not None for branch in branches] == [name in NORMED] * len(branches)
        if name in NORMED:
            with torch.no_grad():
                x = args[0]
                for branch, more in zip(branches, ((args[1:], kwargs), ((), {})), strict=True):
                    module, norm = layer.get_submodule(branch.module), layer.get_submodule(branch.norm)
                    added = module(norm(x), *more[0], **more[1])
                    added = added[0] if isinstance(added, tuple) else added
                    x = x + (layer.get_submodule(branch.scale)(added) if branch.scale else added)
            assert torch.equal(x, output)


def test_layers_of_unknown_kinds_have_no_points():
    assert hosts.insertion_points(nn.TransformerEncoderLayer(8, 2)) is None
    (layers,) = hosts.stacks(FAMILIES["mamba"].model()).values()
    assert hosts.insertion_points(layers[0]) is None


@pytest.mark.parametrize("name", ["bert", "llama", "dinov2", "clip"])
def test_points_are_found_through_other_wrappers(name):
    family = FAMILIES[name]
    model, inputs = family.model(), family.inputs()
    before = run(model, inputs)
    bare = hosts.insertion_points(next(iter(hosts.stacks(model).values()))[1])
    linear = [path for path, module in model.named_modules() if type(module) is nn.Linear and ".1." in path]
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=linear)).eval()
    stack, layers = next(iter(hosts.stacks(model).items()))
    assert hosts.insertion_points(layers[1]) == bare
    hosts.insert(layers[1], {bare.attention.module: Identity(layers[1].get_submodule(bare.attention.module))})
    hosts.insert(model, {f"{stack}.1": Identity(layers[1])})
    model.get_submodule(stack)[1] = checkpoint_wrapper(model.get_submodule(stack)[1])
    (layer,) = hosts.stacks(model)[stack][1:2]
    points = hosts.insertion_points(layer)
    prefix = "_checkpoint_wrapped_module.base_layer"
    assert points.attention.module == f"{prefix}.{bare.attention.module}"
    assert points.projections[0] == f"{prefix}.{bare.projections[0]}".replace(
        bare.attention.module, f"{bare.attention.module}.base_layer"
    )
    assert (points.attention.norm is None) == (bare.attention.norm is None)
    assert same(run(model, inputs), before)
    for path in paths_in(points):
        hosts.insert(layer, {path: Offset(layer.get_submodule(path))})
        assert not same(run(model, inputs), before), path
        hosts.remove(model, Offset)
        assert same(run(model, inputs), before)


def test_one_kind_is_removed_and_others_stay():
    class Inner(Identity): ...

    class Outer(Identity): ...

    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    names = list(model.state_dict())
    first = model[0][0]
    for kind in (Inner, Outer, Inner):
        hosts.insert(model, {"0.0": kind(model[0][0])})
    hosts.insert(model, {"0": Outer(model[0])})
    hosts.remove(model, Inner)
    assert [type(module) for module in model.modules() if isinstance(module, Wrapper)] == [Outer, Outer]
    hosts.remove(model)
    assert model[0][0] is first
    assert list(model.state_dict()) == names


def test_a_wrapper_inside_the_part_of_another():
    """The paths are those before insertion, in whatever order they come."""
    for paths in (["0", "0.1"], ["0.1", "0"]):
        model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
        hosts.insert(model, {path: Identity(model.get_submodule(path)) for path in paths})
        assert {path for path, module in model.named_modules() if isinstance(module, Wrapper)} == {
            "0",
            "0.base_layer.1",
        }


def test_a_wrapper_under_two_names():
    shared = nn.Linear(2, 2)
    model = nn.Sequential(shared, shared)
    model[0] = model[1] = Identity(shared)
    hosts.remove(model)
    assert list(model) == [shared, shared]


def test_a_wrapper_of_another_module_is_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    wrappers = {"0": Identity(model[0]), "1": Identity(model[0])}
    with pytest.raises(ValueError, match="wrapper for '1' was made around another module"):
        hosts.insert(model, wrappers)
    assert not any(isinstance(module, Wrapper) for module in model.modules())
