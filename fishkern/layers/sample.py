"""A call with random values in the place of one on tensors that have none, to see what a small module computes."""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map

from fishkern.layers.base import _AROUND_FORWARD, Call, Layer

# Norms and scales have far fewer entries; what is larger is not computed on the side.
_MOST_ENTRIES = 2**22
_POSITIONS = 4


def confirmed_on_sample(layer: Layer, call: Call, names: frozenset[str]) -> frozenset[str]:
    """Check a rule on a copy of the module and a few positions of the call, both with random values.

    Args:
        layer: The rule.
        call: A call on tensors without values.
        names: The requested ones of the names that the rule covers.

    Returns:
        The names for which the rule holds; none if the copy cannot run.
    """
    tensors = [*call.module.parameters(), *call.module.buffers()]
    hooked = any(module._forward_pre_hooks for module in call.module.modules())  # which may compute a weight
    if hooked or sum(tensor.numel() for tensor in tensors) > _MOST_ENTRIES:
        return frozenset()
    generator = torch.Generator().manual_seed(0)

    def valued(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        shape = [*value.shape[:1], *(min(size, _POSITIONS) for size in value.shape[1:-1]), *value.shape[1:][-1:]]
        if not value.is_floating_point():
            return torch.zeros(shape, dtype=value.dtype)
        return torch.randn(shape, generator=generator).to(value.dtype)

    with _disable_current_modes():
        copies = {id(one): _positive(one, generator) for one in tensors}
        hooks = (vars(module)[name] for module in call.module.modules() for name in _AROUND_FORWARD)
        module = copy.deepcopy(call.module, {**copies, **{id(one): OrderedDict() for one in hooks}})
        sample = replace(call, module=module, args=tree_map(valued, call.args), kwargs=tree_map(valued, call.kwargs))
        try:
            with torch.no_grad():
                output = module(*sample.args, **sample.kwargs)
            return layer.confirms(sample, output, names)
        except Exception:  # any error of a module that does not take random values
            return frozenset()


def _positive(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Make random values for a parameter or a buffer: a variance, for one, is never below zero."""
    if not tensor.is_floating_point():
        return torch.zeros(tensor.shape, dtype=tensor.dtype)
    values = (torch.rand(tensor.shape, generator=generator) + 0.5).to(tensor.dtype)
    return nn.Parameter(values, requires_grad=False) if isinstance(tensor, nn.Parameter) else values
