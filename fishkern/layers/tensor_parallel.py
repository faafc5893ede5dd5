"""Modules that several processes compute together: each gets the gradients of its part of the weights.

The rules of single modules serve, on a copy of the module that holds this process's part of the weights. What they need
is there already, since the model's own backward pass needs it: a weight that is split by output features has the whole
input and the gradient of its own outputs, one split by input features its own inputs and the whole gradient. Only where
positions are split over processes (sequence parallel), the sum over positions is one over processes as well, and it
comes before the square.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from fishkern import hosts
from fishkern.layers.base import Call, Layer
from fishkern.layers.embedding import Embedding
from fishkern.layers.expert_call import ExpertCall
from fishkern.layers.experts import Experts
from fishkern.layers.grads import PerExampleGrads, PositionGrads
from fishkern.layers.layer_norm import LayerNorm
from fishkern.layers.linear import Linear
from fishkern.layers.scale import Factor, OnePlusFactor, Scale
from fishkern.ops.dtypes import accumulates_in

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class SplitLinear(Linear):
    """A linear of which each process has some output features (colwise) or some input features (rowwise)."""

    def covers(self, module: nn.Module) -> frozenset[str]:
        return super().covers(own_copy(module))

    def per_example_grads(
        self, call: Call, output_grads: Tensor, names: frozenset[str]
    ) -> Iterator[tuple[str, PerExampleGrads]]:
        split, axis = hosts.split_of(call.module), _split_axis(call.module)
        g = _placed(output_grads, split, split.gives, _last(output_grads) if axis == 0 else None)
        x = _placed(call.input, split, split.takes, _last(call.input) if axis == 1 else None)
        yield from super().per_example_grads(_own_call(call, x), g, names)


class SplitEmbedding(Embedding):
    """An embedding of which each process has some rows (vocabulary) or some columns.

    A token of another process's rows counts as one of the first row, with a gradient of zero.
    """

    def covers(self, module: nn.Module) -> frozenset[str]:
        return super().covers(own_copy(module))

    def confirms(self, call: Call, output: Tensor, names: frozenset[str]) -> frozenset[str]:
        return names if type(call.module).forward is nn.Embedding.forward else frozenset()

    def own_tokens(self, module: nn.Module, indices: Tensor) -> Tensor:
        split = hosts.split_of(module)
        indices = _placed(indices, split, split.takes, None)
        rows = _own_rows(module)
        return torch.where((indices >= rows.start) & (indices < rows.stop), indices - rows.start, 0)

    def per_example_grads(
        self, call: Call, output_grads: Tensor, names: frozenset[str]
    ) -> Iterator[tuple[str, PerExampleGrads]]:
        split, axis = hosts.split_of(call.module), _split_axis(call.module)
        g = _placed(output_grads, split, split.gives, _last(output_grads) if axis == 1 else None)
        indices, rows = _placed(call.input, split, split.takes, None), _own_rows(call.module)
        if axis == 0:
            inside = (indices >= rows.start) & (indices < rows.stop)
            g = torch.where(inside[..., None], g, 0)
        own = _own_call(call, self.own_tokens(call.module, indices))
        yield from super().per_example_grads(own, g, names)


class SplitNorm(Layer):
    """A norm that every process holds whole, and that may run on some positions or heads of each example there.

    Args:
        rule: The rule of such a norm in one process.
    """

    sums_processes = True

    def __init__(self, rule: Layer) -> None:
        self._rule = rule

    def covers(self, module: nn.Module) -> frozenset[str]:
        whole = all(one is None or _split_axis(module, name) is None for name, one in module._parameters.items())
        return self._rule.covers(own_copy(module)) if whole else frozenset()

    def confirms(self, call: Call, output: Any, names: frozenset[str]) -> frozenset[str]:
        if not isinstance(output, Tensor):
            return frozenset()
        own, output, _ = self._own(call, output)
        return self._rule.confirms(own, output, names)

    def reads_input(self, names: frozenset[str]) -> bool:
        return self._rule.reads_input(names)

    def per_example_grads(
        self, call: Call, output_grads: Tensor, names: frozenset[str]
    ) -> Iterator[tuple[str, PerExampleGrads]]:
        own, g, group = self._own(call, output_grads)
        for name, grads in self._rule.per_example_grads(own, g, names):
            yield name, grads if group is None else _summed(grads, group)

    def _own(self, call: Call, output: Tensor) -> tuple[Call, Tensor, Any]:
        """Give this process's part of a call and of its output, and the processes to sum over."""
        split = hosts.split_of(call.module)
        if split.summed:
            return _own_call(call, call.input if call.args or call.kwargs else None), output, split.mesh.get_group()
        placement = output.placements[0] if hosts.is_distributed(output) else split.gives
        shared = placement is not None and placement.is_shard()
        group, placement = (split.mesh.get_group(), placement) if shared else (None, None)
        x = _placed(call.input, split, split.takes, placement) if call.args or call.kwargs else None
        return _own_call(call, x), _placed(output, split, split.gives, placement), group


class SplitExperts(Experts):
    """Experts of each of which every process has some features between the two maps.

    A process routes all positions, and its part of the features gives a summand of the output.
    """

    def covers(self, module: nn.Module) -> frozenset[str]:
        return super().covers(own_copy(module))

    def confirms(self, call: Call, output: Tensor, names: frozenset[str]) -> frozenset[str]:
        if not names or not isinstance(output, Tensor):
            return frozenset()
        own = own_copy(call.module)
        computed = ExpertCall.of(call, own, own._parameters)
        group = hosts.split_of(call.module).mesh.get_group()
        summed = computed is not None and computed.gives(output, partial(dist.all_reduce, group=group))
        return names if summed else frozenset()

    def per_example_grads(
        self, call: Call, output_grads: Tensor, names: frozenset[str]
    ) -> Iterator[tuple[str, PerExampleGrads]]:
        yield from super().per_example_grads(replace(call, module=own_copy(call.module)), output_grads, names)


SPLIT_LAYERS: tuple[Layer, ...] = (
    SplitLinear(), SplitEmbedding(), SplitNorm(LayerNorm()), SplitNorm(Factor()), SplitNorm(OnePlusFactor()),
    SplitNorm(Scale()), SplitExperts(),
)  # fmt: skip
"""The rules for modules that several processes compute together, first match first."""


def own_copy(module: nn.Module) -> nn.Module:
    """Copy a module with this process's part of its weights, and as the class computes it.

    Args:
        module: A module that several processes compute together.

    Returns:
        A module without hooks that shares memory and everything else with it.
    """
    own = object.__new__(hosts.class_of(module))  # copy.copy would make a unit of FSDP2 anew
    state = vars(own)
    state |= vars(module)
    state.pop("forward", None)
    state |= {name: OrderedDict() for name in _HOOKS}
    state["_parameters"] = {
        name: None if one is None else nn.Parameter(hosts.local_part(one.detach()), requires_grad=False)
        for name, one in module._parameters.items()
    }
    split = hosts.split_of(module)
    if isinstance(module, nn.Linear):
        state["out_features"], state["in_features"] = hosts.computed_shape(module.weight, split.mesh)
    elif isinstance(module, nn.Embedding):
        state["num_embeddings"], state["embedding_dim"] = hosts.computed_shape(module.weight, split.mesh)
        rows, padding = _own_rows(module), module.padding_idx
        state["padding_idx"] = padding - rows.start if padding is not None and padding in rows else None
    return own


def _own_call(call: Call, x: Tensor | None) -> Call:
    """Make a call of the copy, with another first argument."""
    args, kwargs = call.args, call.kwargs
    if args:
        args = (x, *args[1:])
    elif kwargs:
        kwargs = {**kwargs, next(iter(kwargs)): x}
    return replace(call, module=own_copy(call.module), args=args, kwargs=kwargs)


def _split_axis(module: nn.Module, name: str = "weight") -> int | None:
    """Say along which axis processes hold parts of a parameter; ``None`` where each holds the whole."""
    part = hosts.split_range(module._parameters[name], hosts.split_of(module).mesh)
    return None if part is None else part[0]


def _own_rows(module: nn.Module) -> range:
    """Say which rows of an embedding this process has."""
    part = hosts.split_range(module.weight, hosts.split_of(module).mesh)
    return part[1] if part is not None and part[0] == 0 else range(module.weight.shape[0])


def _last(tensor: Tensor) -> Any:
    from torch.distributed.tensor import Shard

    return Shard(tensor.ndim - 1)


def _placed(tensor: Tensor, split: hosts.Split, plain: Any, wanted: Any) -> Tensor:
    """Give this process's part of a tensor.

    Args:
        tensor: A ``DTensor``, or this process's part of one.
        split: How the module is split.
        plain: Placement of a tensor that is no ``DTensor``; ``None`` for whole.
        wanted: The placement to give the part of; ``None`` for the whole.

    Returns:
        The part.
    """
    from torch.distributed.tensor import DTensor, Replicate

    plain, wanted = plain or Replicate(), wanted or Replicate()
    if not hosts.is_distributed(tensor):
        tensor = DTensor.from_local(tensor, split.mesh, [plain], run_check=False)
    return (tensor if tensor.placements == (wanted,) else tensor.redistribute(placements=[wanted])).to_local()


def _summed(grads: PerExampleGrads, group: Any) -> PositionGrads:
    """Sum the terms of each example over its positions in all processes."""
    sums = grads.terms.sum(1, keepdim=True, dtype=accumulates_in(grads.terms.dtype))
    dist.all_reduce(sums, group=group)
    return PositionGrads(sums)
